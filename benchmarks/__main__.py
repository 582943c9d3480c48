"""`python -m benchmarks [OP ...]`: every op against its peers, over the shapes of its spec."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import catalogue, ceilings, layer, report, sweep
from benchmarks.ahead import compile_ahead
from benchmarks.bench import Bench, DeviceLost
from benchmarks.command_line import among, commit, device, device_name
from benchmarks.e2e import cli as e2e
from benchmarks.plot import plot_files
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.timing import Clock
from benchmarks.tiny import tiny
from benchmarks.trainers import cli as trainers
from liger_fn.testing.spec import Benchmark, OpSpec
from liger_fn.testing.specs import specs

# Of these every provider has rows; the other modes are about our ops alone.
BY_PROVIDER = ("fwd", "bwd", "full", "host", "memory")
MODES = (*BY_PROVIDER, "sweep", "layer")
MEANING = """
modes: fwd is a call without grad, bwd its backward pass, full both: milliseconds of the device,
kept busy beforehand until the host has enqueued all of the call. host is the milliseconds of the
host, of fwd and of full, on tiny tensors. memory is the peak of full above the inputs. sweep tries
other launch configurations of our ops, and says which are more than 3 % from the best. layer times
a decoder layer of Llama-3-8B forward and backward, eager and compiled, with and without our ops.
e2e and curves are about whole models, trl about TRL's trainers; these stand alone, and have options
of their own: `python -m benchmarks --mode e2e --help`.
"""
HERE = Path(__file__).parent
Cases = list[tuple[OpSpec, Benchmark, list[str]]]


@dataclass(frozen=True)
class Job:
    """A part of a run that is begun or left out as a whole."""

    label: str
    do: Callable[[], None]


def main(argv: Sequence[str] | None = None) -> int:
    for whole in (e2e, trainers):
        if whole.asked(argv):
            return whole.main(argv)
    options = parse(argv)
    try:
        if options.plot or options.table or options.insert:
            show(options)
            return 0
        if options.csv:
            report.append(options.csv, [])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2

    providers = present(options) if options.modes_by_provider else []
    why = ""
    if options.modes_by_provider and not providers:
        why = "None of these providers can run here."
    elif "sweep" in options.modes:
        why = sweep.missing(options.device)
    if why:
        print(why, file=sys.stderr)
        return 2
    measure(options, providers)
    return 0


def measure(options: argparse.Namespace, providers: list[Provider]) -> None:
    """Run every case and print what was found."""
    clock = Clock(options.device)
    bench = Bench(options, clock, ceilings.measure(clock), providers)
    bench.about, bench.end = about(bench), time.monotonic() + options.limit
    print(_heading(bench.about))
    unfinished = run(bench, jobs(bench))
    print("\n" + report.tables(bench.rows, bold=sys.stdout.isatty()))
    for line in report.remarks(bench.rows) + unfinished:
        print(line)


def show(options: argparse.Namespace) -> None:
    """Insert, plot or print what was measured before."""
    if options.insert:
        catalogue.insert(options.insert, catalogue.committed(HERE / "results"))
    files = [options.csv] if options.csv else sorted(HERE.glob("results/*/*.csv"))
    if options.plot:
        for path in plot_files(files, HERE / "plots"):
            print(path)
    if options.table:
        for path in files:
            rows = report.latest(report.read(path))
            rows = [row for row in rows if not options.ops or row.op in options.ops]
            print(f"{path}\n\n{report.tables(rows, bold=sys.stdout.isatty())}")
            print("\n".join(report.remarks(rows)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, epilog=MEANING
    )
    known = [spec.name for spec in specs()]
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"default: all of {', '.join(known)}")
    parser.add_argument("--mode", default="", help=f"some of {','.join(MODES)}; default: full")
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
        "--table",
        action="store_true",
        help="measure nothing; print the OPs of --csv, or of all results/",
    )
    parser.add_argument(
        "--insert",
        type=Path,
        metavar="PAGE",
        help="measure nothing; write the table of all that liger-kernel has, from the committed"
        " results, between the markers of a page",
    )
    parser.add_argument(
        "--quick", action="store_true", help="first shape only, a tenth of the budget"
    )
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for a case and mode")
    parser.add_argument("--repeats", type=int, default=5, help="repeats at least, budget or not")
    parser.add_argument(
        "--limit", type=float, default=float("inf"), help="start no case after seconds"
    )
    parser.add_argument(
        "--calls", type=int, default=1000, help="calls in a row that host times at most"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument(
        "--commit",
        default=os.environ.get("LIGER_FN_COMMIT", ""),
        help="what the rows name, where there is no git",
    )
    parser.add_argument(
        "--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    options = parser.parse_args(argv)

    if min(options.repeats, options.calls) < 1:
        parser.error("--repeats and --calls: must be 1 at least")
    options.modes = among(parser, "--mode", options.mode, MODES) or ["full"]
    options.modes_by_provider = [mode for mode in options.modes if mode in BY_PROVIDER]
    options.providers = among(parser, "--providers", options.providers, PROVIDERS) or list(
        PROVIDERS
    )
    options.ops = among(parser, "OP", ",".join(options.ops), known)
    shapes = [b.id for s in specs() if s.name in (options.ops or known) for b in s.benchmarks]
    options.shapes = among(parser, "--shape", options.shape, shapes)
    if options.quick:
        options.budget /= 10
    return options


def present(options: argparse.Namespace) -> list[Provider]:
    """The providers that can run here; the others are named with how to get them."""
    out = []
    for name in options.providers:
        if why := PROVIDERS[name].missing(options.device):
            print(f"absent: {name}: {why}")
        else:
            out.append(PROVIDERS[name])
    return out


def plan(options: argparse.Namespace) -> Cases:
    """The cases in order, each with its modes; the host is timed on a tiny call of its own."""
    modes = [mode for mode in options.modes_by_provider if mode != "host"]
    cases: Cases = []
    for spec in chosen(options):
        shapes = [b for b in spec.benchmarks if not options.shapes or b.id in options.shapes]
        if modes:
            cases += [(spec, b, modes) for b in (shapes[:1] if options.quick else shapes)]
        if "host" in options.modes:
            cases.append((spec, tiny(spec), ["host-fwd", "host-full"]))
    return cases


def chosen(options: argparse.Namespace) -> list[OpSpec]:
    return [spec for spec in specs() if not options.ops or spec.name in options.ops]


def jobs(bench: Bench) -> list[Job]:
    """All that the options ask for, in order."""
    options = bench.options
    out = [
        Job(f"{spec.name} {benchmark.id}", partial(bench.case, spec, benchmark, modes))
        for spec, benchmark, modes in plan(options)
    ]
    if "sweep" in options.modes:
        cases = sweep.plan(chosen(options), options.shapes, options.quick)
        ahead = partial(compile_ahead, cases, options.dtype, options.device, bench.end)
        out.append(Job("compile ahead", ahead))
        out += [Job(f"sweep {case.label}", partial(sweep.measure, bench, case)) for case in cases]
    if "layer" in options.modes:
        for name in ("eager", "compiled"):
            measure_layer = partial(layer.measure, bench, compiled=name == "compiled")
            out.append(Job(f"layer, {name}", measure_layer))
    return out


def run(bench: Bench, jobs: Sequence[Job]) -> list[str]:
    """Do the jobs under a progress bar; return a line for each that was not done."""
    lost, unfinished = "", []
    with tqdm(jobs, unit="case", file=sys.stderr, dynamic_ncols=True) as bar:
        for job in bar:
            bar.set_postfix_str(job.label)
            if lost or time.monotonic() > bench.end:
                unfinished.append(f"not run, {lost or 'out of time'}: {job.label}")
                continue
            try:
                job.do()
            except DeviceLost as error:
                lost = str(error)
                unfinished.append(f"broken off, {lost}: {job.label}")
    return unfinished


def about(bench: Bench) -> dict[str, Any]:
    """What every row says of the run."""
    return {
        "device": device_name(bench.clock.device),
        "copy_gb_s": bench.ceilings.copy / 1e9,
        "matrix_tflop_s": bench.ceilings.matrix / 1e12,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "commit": bench.options.commit or commit(HERE.parent),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


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


if __name__ == "__main__":
    sys.exit(main())
