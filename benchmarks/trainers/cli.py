"""The command line of the trainers: what to run, in which order, and what comes of it."""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import rows as files
from benchmarks.command_line import among, device, names_a_mode
from benchmarks.e2e import cli as e2e
from benchmarks.e2e.figures import read, require_matplotlib
from benchmarks.e2e.readme import put_between
from benchmarks.plot import bars
from benchmarks.report import columns
from benchmarks.trainers import report
from benchmarks.trainers.providers import NUDGED, ON_A_CPU, PROVIDERS, REFERENCE, missing
from benchmarks.trainers.report import Row
from benchmarks.trainers.sizes import SIZES, TRAINERS, Task

MODES = ("trl",)
DESCRIPTION = """
Trains a Qwen3 with random weights by TRL's SFT, DPO and GRPO trainers: TRL's own, and those of
liger_fn.hf.trl; each in a process of its own, from the same seed, on the same texts. Nothing is
downloaded. Compares time, memory and every loss.
"""
PLOTS, RESULTS = e2e.PLOTS, e2e.RESULTS
_COLORS = {
    "trl": "#30638e",
    "trl-nudged": "#8fb3d1",
    "trl+liger": "#00798c",
    "liger_fn-loss": "#e9a3ad",
    "liger_fn": "#d1495b",
    "liger_fn-small": "#a33345",
    "liger_fn-lean": "#7d1d2b",
}
_PLOTTED = {"tokens_per_s": "tokens/s", "peak_mib": "peak memory, MiB"}


def asked(argv: Sequence[str] | None) -> bool:
    """Say whether a command line names this mode."""
    return names_a_mode(argv, MODES)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    try:
        if options.plot or options.table or options.insert:
            show(options)
            return 0
        if options.csv:
            files.append(options.csv, Row, [])
        with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
            return Run(options, Path(folder)).trainers()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks --mode trl", description=DESCRIPTION
    )
    add = parser.add_argument
    cuda = torch.cuda.is_available()
    add("--mode", choices=MODES, required=True)
    add("--size", choices=tuple(SIZES), help="default: real, on a CPU tiny")
    add("--trainers", default="", metavar="NAME,...", help=f"default: {','.join(TRAINERS)}")
    add("--providers", default="", metavar="NAME,...", help=f"default: {','.join(PROVIDERS)}, on a"
        f" CPU {','.join(ON_A_CPU)}")  # fmt: skip
    add("--steps", type=int, default=8, help="that are timed")
    add("--warm-up", type=int, default=4, help="steps before those")
    add("--seed", type=int, default=0, help="of weights and texts")
    add("--timeout", type=float, default=120, help="seconds for one process")
    add("--limit", type=float, default=570, help="seconds in all; what is left is named")
    add("--csv", type=Path, metavar="F", help="append the rows to this file")
    add("--plot", action="store_true", help="measure nothing; plot --csv, or all of results/")
    add("--table", action="store_true", help="measure nothing; print --csv, or all of results/")
    add("--insert", type=Path, metavar="PAGE", help="measure nothing; write the table of all"
        " committed results between the markers of a page")  # fmt: skip
    add("--commit", default=os.environ.get("LIGER_FN_COMMIT", ""), help="where there is no git")
    add("--device", type=device, default="cuda" if cuda else "cpu")
    options = parser.parse_args(argv)
    options.size = options.size or ("tiny" if options.device.type == "cpu" else "real")
    options.trainers = among(parser, "--trainers", options.trainers, TRAINERS) or list(TRAINERS)
    names = among(parser, "--providers", options.providers, PROVIDERS)
    names = names or list(ON_A_CPU if options.device.type == "cpu" else PROVIDERS)
    first = (REFERENCE, NUDGED)
    options.providers = sorted(names, key=lambda n: first.index(n) if n in first else len(first))
    if options.steps < 1 or options.warm_up < 0:
        parser.error("--steps: must be 1 at least, and --warm-up 0")
    return options


class Run(e2e.Run):
    """One run: a process for each trainer of each provider, and a row."""

    worker = "benchmarks.trainers.worker"

    def trainers(self) -> int:
        rows: list[Row] = []
        for task, facts in self._measure(tasks(self.options, self._present())):
            rows.append(self._judged(task, facts, rows))
            self._write(Row, rows[-1])
        print("\n" + columns(report.grid(rows), False))
        return self._finish(report.remarks(rows))

    def title(self, task: Any) -> str:
        return f"{task.trainer} {task.size} {task.provider}"

    def _within_time(self, task: Any) -> Any:
        return task

    def _why_missing(self, name: str) -> str:
        return missing(name, self.options.device)

    def _judged(self, task: Task, facts: dict[str, Any], rows: Sequence[Row]) -> Row:
        listed = {name: _spaced(facts.pop(name, ())) for name in ("losses", "entropies")}
        row = Row(
            trainer=task.trainer,
            size=task.size,
            precision="float32" if self.options.device.type == "cpu" else "bfloat16",
            provider=task.provider,
            **listed,
            **e2e.known(Row, facts),
            **self.about,
        )
        like = {r.provider: r for r in rows if r.trainer == row.trainer}
        loss_gap, verdict = report.judged(row, like.get(REFERENCE), like.get(NUDGED))
        return replace(row, loss_gap=loss_gap, verdict=verdict)


def _spaced(numbers: Sequence[float | None]) -> str:
    return " ".join(f"{x:.9g}" for x in numbers if x is not None)


def tasks(options: argparse.Namespace, providers: Sequence[str]) -> list[Task]:
    """Trainer by trainer the providers that differ for it."""
    return [
        Task(
            trainer=trainer,
            provider=provider,
            size=options.size,
            device=str(options.device),
            steps=options.steps,
            warm_up=options.warm_up,
            seed=options.seed,
        )
        for trainer in options.trainers
        for provider in providers
        if trainer in PROVIDERS[provider].trainers
    ]


def results() -> list[Path]:
    """The files among the committed results."""
    return sorted(RESULTS.glob("*/trl/*.csv"))


def show(options: argparse.Namespace) -> None:
    """Plot, print or insert what was measured before."""
    paths = [options.csv] if options.csv else results()
    if options.insert:
        put_between(options.insert, report.BEGIN, report.END, report.section(read(results(), Row)))
    if options.table:
        for path in paths:
            rows = report.latest(files.read(path, Row))
            print(f"{path}\n\n{columns(report.grid(rows), False)}")
            print("\n".join(report.remarks(rows)))
    if options.plot:
        for path in draw(read(paths, Row)):
            print(path)


def draw(rows: Sequence[Row]) -> list[Path]:
    """Bars of speed and of memory, for every device."""
    require_matplotlib()
    PLOTS.mkdir(parents=True, exist_ok=True)
    drawn = []
    rows = [r for r in report.latest(rows) if not r.verdict.startswith(report.DIFFERS)]
    for device_name in dict.fromkeys(row.device for row in rows):
        for name, label in _PLOTTED.items():
            of_device = {
                (f"{r.trainer} {r.size}", r.provider): getattr(r, name)
                for r in rows
                if r.device == device_name and getattr(r, name) is not None
            }
            if of_device:
                drawn.append(PLOTS / f"{device_name.replace(' ', '_')}-trl-{name}.png")
                bars(drawn[-1], f"TRL's trainers: {device_name}", label, of_device, _COLORS)
    return drawn
