"""One process, one task: `python -m benchmarks.e2e.worker TASK FILE`.

It imports what the task needs, waits for a line on its input, and writes what it finds to FILE, one
JSON object a line, as soon as it is found: whatever ends the process, that much is known.
"""

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.e2e import curves, lengths, profile, trainee
from benchmarks.e2e.providers import Provider, find
from benchmarks.e2e.trainee import Task, Tell, is_out_of_memory
from benchmarks.providers import first_line

MEASURES: dict[str, Callable[[Task, Provider, Tell], dict[str, Any]]] = {
    "steps": trainee.measure_steps,
    "profile": profile.measure_profile,
    "lengths": lengths.measure_lengths,
    "curve": curves.measure_curve,
}


Measure = Callable[[Tell], dict[str, Any]]


def main(task: Task, path: Path) -> None:
    def get_ready() -> Measure:
        provider = find(task.provider)
        # Not at the top: a worker that cannot import it has a row too.
        from transformers import AutoModelForCausalLM  # noqa: F401

        return partial(MEASURES[task.kind], task, provider)

    work(path, task.device, get_ready)


def work(path: Path, device: str, get_ready: Callable[[], Measure]) -> None:
    """Get ready, wait for a line on the input, measure, and tell how that ended; then end."""

    def tell(**facts: Any) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")

    try:
        logging.disable(logging.WARNING)
        measure = get_ready()
        if sys.stdin.readline():
            if (index := torch.device(device).index) is not None:
                torch.cuda.set_device(index)
            tell(**measure(tell), status="ok")
    except Exception as error:
        traceback.print_exc()
        tell(status=_status(error), note=first_line(error))
    # Nothing that is left, such as a compiler's threads, may hold the process up.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _status(error: Exception) -> str:
    if is_out_of_memory(error):
        return "out of memory"
    return "cannot" if isinstance(error, NotImplementedError) else "failed"


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])), Path(sys.argv[2]))
