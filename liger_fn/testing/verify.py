"""`python -m liger_fn verify`: every property of every op, on this machine, as a table."""

import argparse
import csv
import os
import platform
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

OK, FAILED, NOT_APPLICABLE = "ok", "failed", "not applicable"
SIGNS = {OK: "ok", FAILED: "FAILED", NOT_APPLICABLE: "-"}


@dataclass(frozen=True)
class Outcome:
    """What came of one trial."""

    op: str
    property: str
    case: str
    outcome: str
    seconds: float
    message: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Put every property to every op, print the table, and return 1 if anything failed."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        # Read once, when Triton is imported: without it the kernels could not run here.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    try:
        trials = _chosen(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2

    print(_machine(device))
    outcomes = list(_run(trials, device))
    print(table(outcomes), *_failures(outcomes), sep="\n")
    if options.csv:
        _write(options.csv, outcomes)
    return int(any(o.outcome == FAILED for o in outcomes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m liger_fn verify", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help="default: every op")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu (interpreted)")
    parser.add_argument("--property", action="append", default=[], metavar="P", help="only this")
    parser.add_argument("--csv", metavar="F", help="write every outcome to this file")
    return parser


def _chosen(options: argparse.Namespace) -> list:
    from liger_fn.testing.properties import PROPERTIES, trials
    from liger_fn.testing.specs import specs

    known = {spec.name: spec for spec in specs()}
    for asked, allowed in ((options.ops, known), (options.property, PROPERTIES)):
        for name in asked:
            if name not in allowed:
                raise ValueError(f"verify: {name!r} must be one of {', '.join(allowed)}.")
    return list(trials([known[n] for n in options.ops or known], options.property))


def _machine(device: torch.device) -> str:
    from liger_fn.functional.core.backend import why

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    backend, reason = why(device)
    return f"{device} {name}, torch {torch.__version__}; backend: {backend} ({reason})"


def _run(trials: Sequence[Any], device: torch.device) -> Iterator[Outcome]:
    from tqdm import tqdm

    from liger_fn.testing import interpreter

    interpreter.hasten()
    with warnings.catch_warnings(), tqdm(trials, unit="trial", leave=False) as bar:
        warnings.simplefilter("ignore")
        for trial in bar:
            bar.set_postfix_str(trial.id())
            yield _try(trial, device)


def _try(trial: Any, device: torch.device) -> Outcome:
    from liger_fn.testing.properties import NotApplicable

    outcome, message, start = OK, "", time.perf_counter()
    try:
        trial.check(device)
    except NotApplicable as reason:
        outcome, message = NOT_APPLICABLE, str(reason)
    except Exception as error:
        outcome, message = FAILED, traceback.format_exception_only(error)[-1].strip()
    seconds = round(time.perf_counter() - start, 3)
    return Outcome(trial.spec.name, trial.property.name, trial.case.id, outcome, seconds, message)


def table(outcomes: Sequence[Outcome], width: int = 0) -> str:
    """Properties down, ops across, in as many blocks as the width of the terminal asks for."""
    width = width or shutil.get_terminal_size((100, 24)).columns
    found: dict[tuple[str, str], set[str]] = {}
    for o in outcomes:
        found.setdefault((o.property, o.op), set()).add(o.outcome)
    properties = list(dict.fromkeys(o.property for o in outcomes))
    ops = list(dict.fromkeys(o.op for o in outcomes))

    def sign(property: str, op: str) -> str:
        seen = found.get((property, op), {NOT_APPLICABLE})
        return SIGNS[next(o for o in (FAILED, OK, NOT_APPLICABLE) if o in seen)]

    first = max(map(len, properties), default=0)
    blocks = []
    for group in _groups(ops, width - first):
        lines = [" " * first + "".join(f"  {op:>6}" for op in group)]
        lines += [
            f"{p:{first}}" + "".join(f"  {sign(p, op):>{max(6, len(op))}}" for op in group)
            for p in properties
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _groups(ops: Sequence[str], width: int) -> Iterator[list[str]]:
    """Cut the columns where the next one would pass the width."""
    group: list[str] = []
    for op in ops:
        if group and sum(2 + max(6, len(o)) for o in [*group, op]) > width:
            yield group
            group = []
        group.append(op)
    yield group


def _failures(outcomes: Sequence[Outcome]) -> list[str]:
    counts = {kind: sum(o.outcome == kind for o in outcomes) for kind in SIGNS}
    lines = [""] + [
        f"FAILED {o.op} {o.property} {o.case}: {o.message.splitlines()[0][:300]}"
        for o in outcomes
        if o.outcome == FAILED
    ]
    return [*lines, ", ".join(f"{n} {kind}" for kind, n in counts.items())]


def _write(path: str, outcomes: Sequence[Outcome]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, Outcome.__dataclass_fields__)
        writer.writeheader()
        writer.writerows(vars(o) for o in outcomes)


if __name__ == "__main__":
    sys.exit(main())
