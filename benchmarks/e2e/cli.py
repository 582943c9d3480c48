"""The command line of whole models: what to run, in which order, and what comes of it."""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import rows as files
from benchmarks.command_line import among, commit, device, device_name, names_a_mode
from benchmarks.e2e import breakdown, curves, figures, readme, report
from benchmarks.e2e.breakdown import Part
from benchmarks.e2e.processes import ROOT, Worker
from benchmarks.e2e.providers import NAMES, REFERENCE, is_name, missing
from benchmarks.e2e.report import NUDGED, Curve, Row
from benchmarks.e2e.shapes import CURVES, SHAPES, Shape
from benchmarks.e2e.trainee import Task
from benchmarks.report import columns
from liger_fn.info import version
from liger_fn.training import text

MODES = ("e2e", "curves")
DESCRIPTION = """
e2e trains models of Hugging Face with random weights for some steps (forward, backward, fused
AdamW) as they are, compiled, and patched, each in a process of its own, and compares tokens per
second, memory and losses; with --profile it says what the time of a step goes into. curves trains
small ones on real text, and compares their losses.
"""
PLOTS = ROOT / "benchmarks" / "plots"
RESULTS = ROOT / "benchmarks" / "results"

# What a run writes down, by what it measures.
ROWS = {"e2e": Row, "curves": Curve, "profile": Part}

# For so many cores one process more may import while another one measures.
_CORES_EACH = 8
# What a search keeps of its seconds, to end by itself.
_SHARE_OF_SEARCH = 0.8


def asked(argv: Sequence[str] | None) -> bool:
    """Say whether a command line names one of these modes."""
    return names_a_mode(argv, MODES)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    try:
        if options.plot or options.table or options.insert:
            show(options)
            return 0
        if options.csv:
            files.append(options.csv, ROWS[options.what], [])
        with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
            run = Run(options, Path(folder))
            runs = {"e2e": run.steps, "profile": run.profiles, "curves": run.curves}
            return runs[options.what]()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=DESCRIPTION)
    add = parser.add_argument
    cuda = torch.cuda.is_available()
    add("--mode", choices=MODES, required=True)
    add("--shape", default="", metavar="ID,...", help=f"of {', '.join(SHAPES)}, in e2e, or of"
        f" {', '.join(CURVES)}, in curves; default: all, on a CPU tiny")  # fmt: skip
    add("--config", nargs="+", type=Path, default=[], metavar="FILE", help="models of your own, in"
        " e2e: config.json, or a directory with one")  # fmt: skip
    add("--providers", default="", metavar="NAME,...", help="default: " + ",".join(NAMES) + ", in"
        " curves hf,liger_fn. module:function names a patch of your own, and +compile after a name"
        " compiles")  # fmt: skip
    add("--checkpointing", action="store_true", help="recompute each layer in the backward pass")
    add("--lora", action="store_true", help="train adapters beside frozen linear layers")
    add("--lengths", action="store_true", help="search the longest sequence that fits instead")
    add("--profile", action="store_true", help="say what the time of a step goes into instead")
    add("--longest", type=int, default=2**20, help="where that search ends in any case")
    add("--batch", type=int, help="default: the model's; the length search has one sequence")
    add("--seq", type=int, help="default: the model's; of --config, 1 and 2048")
    add("--steps", type=int, help="that are timed, default 10; in curves, default 500, on a CPU 20")
    add("--warm-up", type=int, default=3, help="steps before those")
    add("--rounds", type=int, default=1, help="how often the providers of a model take turns")
    add("--dtype", default="", help="default bfloat16, in curves bfloat16,float32")
    add("--backend", default="inductor", help="of torch.compile")
    add("--seed", type=int, default=0, help="of weights and tokens")
    add("--text", nargs="+", type=Path, help="files for curves; default: the standard library")
    add("--timeout", type=float, default=180, help="seconds for one process")
    add("--limit", type=float, default=570, help="seconds in all; what is left is named")
    add("--csv", type=Path, metavar="F", help="append the rows to this file")
    add("--plot", action="store_true", help="measure nothing; plot --csv, or all of results/")
    add("--table", action="store_true", help="measure nothing; print --csv, or all of results/")
    add("--insert", type=Path, metavar="PAGE", help="measure nothing; write the tables of all"
        " committed results between the markers of a page")  # fmt: skip
    add("--commit", default=os.environ.get("LIGER_FN_COMMIT", ""), help="where there is no git")
    add("--device", type=device, default="cuda" if cuda else "cpu")
    options = parser.parse_args(argv)

    on_cpu = options.device.type == "cpu"
    in_curves = options.mode == "curves"
    known = CURVES if in_curves else SHAPES
    options.shapes = among(parser, "--shape", options.shape, known)
    options.shapes += [str(path.resolve()) for path in options.config]
    options.shapes = options.shapes or [
        name for name, shape in known.items() if in_curves or shape.is_for_tests == on_cpu
    ]
    if options.config and in_curves:
        parser.error("--config: is for e2e; to train on text: python -m liger_fn train --config")
    if options.profile and (options.lengths or in_curves):
        parser.error("--profile: is for the steps of e2e, without --lengths")
    options.what = "profile" if options.profile else options.mode
    names = [name for name in options.providers.split(",") if name]
    for name in names:
        if not is_name(name):
            parser.error(f"--providers: {name!r} is not one of {', '.join(NAMES)}")
    names.sort(key=lambda name: name != REFERENCE)
    options.providers = names or ([REFERENCE, "liger_fn"] if in_curves else list(NAMES))
    dtypes = among(parser, "--dtype", options.dtype, ("bfloat16", "float16", "float32"))
    options.dtypes = dtypes or (["bfloat16", "float32"] if in_curves else ["bfloat16"])
    if options.steps is None:
        options.steps = (20 if on_cpu else 500) if in_curves else 10
    sizes = {"--steps": options.steps, "--rounds": options.rounds, "--longest": options.longest}
    sizes |= {"--batch": options.batch, "--seq": options.seq}
    for name, size in sizes.items():
        if size is not None and size < 1:
            parser.error(f"{name}: must be 1 at least")
    return options


class Run:
    """One run: its processes one after the other, and a row for each."""

    worker = "benchmarks.e2e.worker"

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.end = time.monotonic() + options.limit
        self.about = about(options)
        self.unfinished: list[str] = []
        print(
            "{device}, torch {torch}, triton {triton}, transformers {transformers},"
            " commit {commit}".format(**self.about)
        )

    def steps(self) -> int:
        """Measure training steps or lengths, and print the tables."""
        rows: list[Row] = []
        for task, facts in self._measure(step_tasks(self.options, self._present())):
            rows.append(self._row(task, facts, rows))
            self._write(Row, rows[-1])
        print("\n" + report.tables(rows, bold=sys.stdout.isatty()))
        return self._finish(report.remarks(rows))

    def profiles(self) -> int:
        """Take training steps apart, and print what they consist of."""
        rows: list[Row] = []
        parts: list[Part] = []
        for task, facts in self._measure(step_tasks(self.options, self._present())):
            rows.append(self._row(task, facts, rows))
            found = breakdown.parts_of(rows[-1], facts)
            parts += found
            self._write(Part, *found)
        print("\n" + breakdown.tables(parts, bold=sys.stdout.isatty()))
        return self._finish(report.remarks(parts))

    def curves(self) -> int:
        """Train on real text, and print how far the losses are apart."""
        given = self.options.text
        paths = text.files_under(given) if given else text.standard_library()
        tokens = self.folder / "tokens.pt"
        byte_pairs = curves.BYTE_PAIRS if self.options.device.type == "cuda" else 0
        print(f"text: {len(paths):,} files", flush=True)
        seq = self.options.seq or max(CURVES[name].seq for name in self.options.shapes)
        vocab = curves.write_tokens(tokens, paths, byte_pairs, seq)
        found: list[Curve] = []
        tasks = curve_tasks(self.options, self._present(), str(tokens), vocab)
        for task, facts in self._measure(tasks):
            found.append(self._curve(task, facts))
            self._write(Curve, found[-1])
        print("\n" + columns(report.curve_grid(found), False))
        return self._finish(report.curve_remarks(found))

    def _finish(self, remarks: list[str]) -> int:
        for line in remarks + self.unfinished:
            print(line)
        return 0

    def _present(self) -> list[str]:
        out = []
        for name in self.options.providers:
            if why := self._why_missing(name):
                print(f"absent: {name}: {why}")
            else:
                out.append(name)
        return out

    def _why_missing(self, name: str) -> str:
        return missing(name, self.options.device)

    def _measure(self, tasks: list[Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Let one process after the other measure; the next ones may import meanwhile."""
        ahead = (os.cpu_count() or 1) // _CORES_EACH
        started: dict[int, Worker] = {}

        def start(i: int) -> Worker:
            if i not in started:
                task = self._within_time(tasks[i])
                started[i] = Worker(task, self.folder, str(i), self.worker)
            return started[i]

        try:
            with tqdm(tasks, unit="process", file=sys.stderr, dynamic_ncols=True) as bar:
                for i, task in enumerate(bar):
                    left = self.end - time.monotonic()
                    if left <= 0:
                        self.unfinished.append(f"not run, out of time: {self.title(task)}")
                        continue
                    worker = start(i)
                    for following in range(i + 1, min(i + 1 + ahead, len(tasks))):
                        start(following)
                    watch = _shown(bar, self.title(task))
                    yield task, worker.measure(min(self.options.timeout, left), watch)
        finally:
            for worker in started.values():
                worker.end()

    def title(self, task: Any) -> str:
        return title(task)

    def _within_time(self, task: Any) -> Any:
        left = min(self.options.timeout, self.end - time.monotonic())
        return replace(task, seconds=_SHARE_OF_SEARCH * left)

    def _row(self, task: Task, facts: dict[str, Any], rows: Sequence[Row]) -> Row:
        row = Row(
            mode="lengths" if task.kind == "lengths" else "e2e",
            shape=task.shape,
            variant=variant(task),
            dtype=task.dtype,
            batch=task.batch,
            seq=task.seq,
            provider=task.provider,
            **known(Row, facts),
            **self.about,
        )
        if row.mode != "e2e" or row.status != "ok":
            return row
        like = [
            r for r in rows if (r.shape, r.dtype, r.provider) == (row.shape, row.dtype, REFERENCE)
        ]
        return replace(row, verdict=report.verdict(row, like[0] if like else None))

    def _curve(self, task: Task, facts: dict[str, Any]) -> Curve:
        facts["losses"] = " ".join(f"{x:.7g}" for x in facts.pop("losses", []))
        run = NUDGED if task.nudge else task.provider
        return Curve(task.shape, task.dtype, run, **known(Curve, facts), **self.about)

    def _write(self, kind: type, *rows: Any) -> None:
        if self.options.csv:
            files.append(self.options.csv, kind, rows)


def known(kind: type, facts: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(kind)}
    return {name: value for name, value in facts.items() if name in names}


def _shown(bar: Any, name: str) -> Callable[[str], None]:
    """Let the bar say what a process does; only news are drawn, as what it prints may be kept."""

    def watch(doing: str) -> None:
        now = f"{name}: {doing}"
        if bar.postfix != now:
            bar.set_postfix_str(now)

    return watch


def variant(task: Task) -> str:
    return ", ".join(n for n in ("checkpointing", "lora") if getattr(task, n))


def title(task: Task) -> str:
    parts = [task.shape, variant(task), task.dtype if task.kind == "curve" else "", task.provider]
    return " ".join(part for part in [*parts, "nudged" * task.nudge] if part)


def step_tasks(options: argparse.Namespace, providers: Sequence[str]) -> list[Task]:
    """Model by model the providers in turns, every other round from the last to the first."""
    turns = [providers if i % 2 == 0 else providers[::-1] for i in range(options.rounds)]
    return [
        _step_task(options, name, dtype, provider)
        for name in options.shapes
        for dtype in options.dtypes
        for turn in turns
        for provider in turn
    ]


def _step_task(options: argparse.Namespace, name: str, dtype: str, provider: str) -> Task:
    shape = SHAPES.get(name, Shape("", {}, batch=1, seq=2048))
    kind = "lengths" if options.lengths else "profile" if options.profile else "steps"
    return Task(
        kind=kind,
        shape=name,
        provider=provider,
        device=str(options.device),
        batch=1 if options.lengths else options.batch or shape.batch,
        seq=options.seq or shape.seq,
        dtype=dtype,
        checkpointing=options.checkpointing,
        lora=options.lora,
        steps=options.steps,
        warm_up=options.warm_up,
        seed=options.seed,
        backend=options.backend,
        longest=options.longest,
    )


def curve_tasks(
    options: argparse.Namespace, providers: Sequence[str], tokens: str, vocab: int
) -> list[Task]:
    """Model by model every provider, and in bfloat16 the reference with one weight nudged."""
    tasks = []
    for name in options.shapes:
        shape = CURVES[name]
        for dtype in options.dtypes:
            runs = [(provider, False) for provider in providers]
            if REFERENCE in providers and dtype == "bfloat16":
                runs.insert(1, (REFERENCE, True))
            tasks += [
                Task(
                    kind="curve",
                    shape=name,
                    provider=provider,
                    device=str(options.device),
                    batch=options.batch or shape.batch,
                    seq=options.seq or shape.seq,
                    dtype=dtype,
                    steps=options.steps,
                    seed=options.seed,
                    text=tokens,
                    vocab=vocab,
                    nudge=nudge,
                )
                for provider, nudge in runs
            ]
    return tasks


def about(options: argparse.Namespace) -> dict[str, str]:
    """What every row says of the run."""
    return {
        "device": device_name(options.device),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "commit": options.commit or commit(ROOT),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
    }


def results(what: str) -> list[Path]:
    """The files of one kind among the committed results; profiles lie beside the other steps."""
    if what == "profile":
        return sorted(RESULTS.glob("*/e2e/profile*.csv"))
    found = sorted(RESULTS.glob(f"*/{what}/*.csv"))
    return [path for path in found if not path.name.startswith("profile")]


def show(options: argparse.Namespace) -> None:
    """Plot, print or insert what was measured before."""
    if options.insert:
        found = (figures.read(results(what), kind) for what, kind in ROWS.items())
        readme.insert(options.insert, *found)
    what = options.what
    paths = [options.csv] if options.csv else results(what)
    if options.plot:
        for path in figures.DRAW[what](figures.read(paths, ROWS[what]), PLOTS):
            print(path)
    if options.table:
        for path in paths:
            print(f"{path}\n\n{_told(what, files.read(path, ROWS[what]))}")


def _told(what: str, rows: Sequence[Any]) -> str:
    """Rows in words, for a terminal."""
    bold = sys.stdout.isatty()
    if what == "curves":
        return columns(report.curve_grid(rows), False)
    rows = report.latest(rows)
    if what == "profile":
        return "\n".join([breakdown.tables(rows, bold), *report.remarks(rows)])
    return "\n".join([report.tables(rows, bold), *report.advice(rows), *report.remarks(rows)])
