"""`python -m benchmarks [OP ...]`: every op against its peers, over the shapes of its spec."""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import ceilings, report
from benchmarks.bench import Bench, DeviceLost
from benchmarks.plot import plot_files
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.report import Row
from benchmarks.timing import Clock
from benchmarks.tiny import tiny
from liger_fn.testing.spec import Benchmark, OpSpec
from liger_fn.testing.specs import specs

MODES = ("fwd", "bwd", "full", "host", "memory")
HERE = Path(__file__).parent
Cases = list[tuple[OpSpec, Benchmark, list[str]]]


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.plot or options.table:
        try:
            show(options)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        return 0
    if options.csv:
        report.check_columns(options.csv)

    clock = Clock(torch.device(options.device))
    bench = Bench(options, clock, ceilings.measure(clock), present(options))
    bench.about = about(bench)
    print(_heading(bench.about))
    unfinished = run(bench, plan(options))
    print("\n" + report.tables(bench.rows, bold=sys.stdout.isatty()))
    for line in _remarks(bench.rows) + unfinished:
        print(line)
    return 0


def show(options: argparse.Namespace) -> None:
    """Plot or print what was measured before."""
    files = [options.csv] if options.csv else sorted(HERE.glob("results/*/*.csv"))
    if options.plot:
        for path in plot_files(files, HERE / "plots"):
            print(path)
    if options.table:
        for path in files:
            rows = report.latest(report.read(path))
            print(f"{path}\n\n{report.tables(rows, bold=sys.stdout.isatty())}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    known = [spec.name for spec in specs()]
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"default: all of {', '.join(known)}")
    parser.add_argument("--mode", default="full", help=f"some of {','.join(MODES)}")
    parser.add_argument("--providers", default="", help=f"default: all of {','.join(PROVIDERS)}")
    parser.add_argument(
        "--shape", default="", metavar="ID,...", help="default: all shapes of the spec"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--csv", type=Path, metavar="F", help="append the rows to this file")
    parser.add_argument(
        "--plot", action="store_true", help="measure nothing; plot --csv, or all of results/"
    )
    parser.add_argument(
        "--table", action="store_true", help="measure nothing; print --csv, or all of results/"
    )
    parser.add_argument(
        "--quick", action="store_true", help="first shape only, a tenth of the budget"
    )
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for a case and mode")
    parser.add_argument("--repeats", type=int, default=5, help="repeats at least, budget or not")
    parser.add_argument(
        "--limit", type=float, default=float("inf"), help="start no case after seconds"
    )
    parser.add_argument("--calls", type=int, default=1000, help="calls in a row that host times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", default=os.environ.get("LIGER_FN_COMMIT", ""))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)

    options.modes = _among(parser, "--mode", options.mode, MODES)
    options.providers = _among(parser, "--providers", options.providers, PROVIDERS) or list(
        PROVIDERS
    )
    options.ops = _among(parser, "OP", ",".join(options.ops), known) or known
    shapes = [b.id for s in specs() if s.name in options.ops for b in s.benchmarks]
    options.shapes = _among(parser, "--shape", options.shape, shapes)
    if options.quick:
        options.budget /= 10
    return options


def _among(parser: argparse.ArgumentParser, name: str, given: str, known) -> list[str]:
    chosen = [word for word in given.split(",") if word]
    for word in chosen:
        if word not in known:
            parser.error(f"{name}: {word!r} is not one of {', '.join(known)}")
    return chosen


def present(options: argparse.Namespace) -> list[Provider]:
    """The providers that can run here; the others are named with how to get them."""
    out = []
    for name in options.providers:
        if why := PROVIDERS[name].missing(torch.device(options.device)):
            print(f"absent: {name}: {why}")
        else:
            out.append(PROVIDERS[name])
    return out


def plan(options: argparse.Namespace) -> Cases:
    """The cases in order, each with its modes; the host is timed on a tiny call of its own."""
    modes = [mode for mode in options.modes if mode != "host"]
    cases: Cases = []
    for spec in specs():
        if spec.name not in options.ops:
            continue
        shapes = [b for b in spec.benchmarks if not options.shapes or b.id in options.shapes]
        if modes:
            cases += [(spec, b, modes) for b in (shapes[:1] if options.quick else shapes)]
        if "host" in options.modes:
            cases.append((spec, tiny(spec), ["host-fwd", "host-full"]))
    return cases


def run(bench: Bench, cases: Cases) -> list[str]:
    """Run the cases under a progress bar; return a line for each that was not run."""
    end, lost, unfinished = time.monotonic() + bench.options.limit, "", []
    with tqdm(cases, unit="case", file=sys.stderr, dynamic_ncols=True) as bar:
        for spec, benchmark, modes in bar:
            bar.set_postfix_str(f"{spec.name} {benchmark.id}")
            if lost or time.monotonic() > end:
                unfinished.append(f"not run, {lost or 'out of time'}: {spec.name} {benchmark.id}")
                continue
            try:
                bench.case(spec, benchmark, modes)
            except DeviceLost as error:
                lost = str(error)
                unfinished.append(f"broken off, {lost}: {spec.name} {benchmark.id}")
    return unfinished


def about(bench: Bench) -> dict[str, Any]:
    """What every row says of the run."""
    device = bench.clock.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "device": name or platform.machine(),
        "copy_gb_s": bench.ceilings.copy / 1e9,
        "matrix_tflop_s": bench.ceilings.matrix / 1e12,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "commit": bench.options.commit or commit(HERE.parent),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def commit(root: Path) -> str:
    """The checked-out commit, `-dirty` if files differ from it; results and plots do not count."""
    git = ("git", "-C", str(root))
    ours = ("--", ".", ":!benchmarks/results", ":!benchmarks/plots")
    try:
        run = {"check": True, "capture_output": True, "text": True}
        head = subprocess.run((*git, "rev-parse", "--short=12", "HEAD"), **run).stdout.strip()
        changed = subprocess.run((*git, "status", "--porcelain", *ours), **run).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if changed else "")


def _triton_version() -> str:
    try:
        from triton import __version__
    except ImportError:
        return ""
    return __version__


def _heading(about: dict[str, Any]) -> str:
    return (
        "{device}, torch {torch}, triton {triton}, commit {commit}\n"
        "ceilings: copy {copy_gb_s:.0f} GB/s, bf16 matrices {matrix_tflop_s:.0f} TFLOP/s"
    ).format(**about)


def _remarks(rows: list[Row]) -> list[str]:
    """One line for every provider without a time, and why."""
    lines = [
        f"{r.status}: {r.provider}, {r.op} {r.shape}: {r.note}" for r in rows if r.status != "ok"
    ]
    return list(dict.fromkeys(lines))


if __name__ == "__main__":
    sys.exit(main())
