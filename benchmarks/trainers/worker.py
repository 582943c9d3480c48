"""One process, one task: `python -m benchmarks.trainers.worker TASK FILE`, see `e2e/worker.py`."""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.e2e.worker import work


def main(task: dict[str, Any], path: Path) -> None:
    def get_ready() -> Callable:
        # Read when the libraries are imported. Nothing is asked of the network, and what they
        # leave behind goes with the folder.
        os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        tempfile.tempdir = str(path.parent)
        from benchmarks.trainers.providers import PROVIDERS
        from benchmarks.trainers.sizes import Task
        from benchmarks.trainers.training import measure

        provider = PROVIDERS[task["provider"]]
        provider.trainer(task["trainer"])
        return partial(measure, Task(**task), provider)

    work(path, task["device"], get_ready)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
