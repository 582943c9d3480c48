"""Workers: each in a process of its own, so that a crash, or one that hangs, costs one row."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_LOOK_EVERY = 0.2


class Worker:
    """A process that imports at once and measures when it is told to.

    It leads a group of its own, which is ended with it: compilers start processes too.

    Args:
        task: a dataclass, which `module` understands.
        folder: where it writes, under `name`.
        module: what it runs: `work` of `worker.py` with a task.
    """

    def __init__(
        self, task: Any, folder: Path, name: str, module: str = "benchmarks.e2e.worker"
    ) -> None:
        self._is_over = False
        self.facts_path, self.log_path = folder / f"{name}.jsonl", folder / f"{name}.log"
        command = (sys.executable, "-m", module)
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                (*command, json.dumps(asdict(task)), str(self.facts_path)),
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def measure(self, timeout: float, watch: Callable[[str], None]) -> dict[str, Any]:
        """Let it measure for some seconds at most; return what it found and how it ended."""
        self._go()
        end = time.monotonic() + timeout
        while self.process.poll() is None and time.monotonic() < end:
            watch(self.facts().get("doing", "import"))
            time.sleep(_LOOK_EVERY)
        in_time = self.process.poll() is not None
        self.end()
        facts = self.facts()
        doing = facts.pop("doing", "import")
        if "status" in facts:
            return facts
        if not in_time:
            note = f"ended after {timeout:.0f} s, in: {doing}"
            return facts | {"status": "timed out", "note": note}
        note = f"{how_it_ended(self.process.returncode)}, in: {doing}{self._last_words()}"
        return facts | {"status": "crashed", "note": note}

    def _go(self) -> None:
        # One that is over already has left behind why.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b"go\n")
            self.process.stdin.close()

    def facts(self) -> dict[str, Any]:
        """All that it has told so far; of two facts of one name the later."""
        if not self.facts_path.exists():
            return {}
        out: dict[str, Any] = {}
        for line in self.facts_path.read_text(encoding="utf-8").splitlines(keepends=True):
            # A process may be ended in the middle of a line.
            if line.endswith("\n"):
                out |= json.loads(line)
        return out

    def end(self) -> None:
        """End it and what it has started; once, since its number may be another's afterwards."""
        if self._is_over:
            return
        self._is_over = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _last_words(self) -> str:
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"; {lines[-1].strip()[:160]}" if lines else ""


def how_it_ended(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"ended with status {code}"
