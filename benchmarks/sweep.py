"""`--mode sweep`: of the launch configurations that a spec names, which is the fastest?

A configuration is a pure function in the op's file. For the length of a call another one takes its
place; the op, its launchers and its kernels are what users run.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.answers import LIMITS, answer, worst
from benchmarks.bench import Bench
from benchmarks.inputs import DeviceDraw, Inputs, Overwritten, draw_inputs
from benchmarks.providers import first_line
from benchmarks.report import CURRENT, Row
from benchmarks.timing import Step, Timing, in_turns, step
from liger_fn.functional.core.launch import interpreted
from liger_fn.testing.spec import Benchmark, Config, Launch, OpSpec

# A first round of three repeats tells the slow ones; those within 15 % of the best are timed well.
_FEW, _NEAR = 3, 1.15


@dataclass(frozen=True)
class Case:
    """One configuration of an op at one shape."""

    spec: OpSpec
    benchmark: Benchmark
    launch: Launch

    @property
    def label(self) -> str:
        return f"{self.spec.name} {self.benchmark.id} {self.launch.config} {self.launch.mode}"


def missing(device: torch.device) -> str:
    """Say why nothing can be swept here; the empty string if it can."""
    return "" if device.type == "cuda" or interpreted() else "--mode sweep: needs a GPU."


def plan(specs: Sequence[OpSpec], shapes: Sequence[str], quick: bool) -> list[Case]:
    cases = []
    for spec in specs:
        chosen = [b for b in spec.benchmarks if not shapes or b.id in shapes]
        for benchmark in chosen[:1] if quick else chosen:
            cases += [Case(spec, benchmark, launch) for launch in spec.launches]
    return cases


def measure(bench: Bench, case: Case) -> None:
    """Check every candidate against what the configuration returns today, and time it."""
    dtype = getattr(torch, bench.options.dtype)
    inputs = draw_inputs(
        case.spec, case.benchmark, DeviceDraw(bench.clock.device, dtype, bench.options.seed)
    )
    bench.write(list(_rows(bench, case, inputs, LIMITS[dtype])))
    bench.forget()


def _rows(bench: Bench, case: Case, inputs: Inputs, limit: float) -> Iterator[Row]:
    op, launch = case.spec.op, case.launch
    with recorded(launch) as seen:
        want = answer(inputs, op)
    steps: dict[str, Step] = {}
    failures: dict[str, tuple[str, str]] = {}
    for config in configurations(seen, launch):
        name = settings(config)
        try:
            with replaced(launch, config):
                part, error = worst(answer(inputs, op), want)
            if error > limit:
                failures[name] = "wrong", f"{part} is off by {error:.2g} of its norm"
            else:
                steps[name] = _with(launch, config, step(launch.mode, inputs, op, Overwritten([])))
        except Exception as error:
            failures[name] = "failed", first_line(error)
    del want

    floor = bench.ceilings.floor_ms(case.benchmark, launch.mode)
    mode = f"sweep-{launch.mode} {launch.config}"
    about = (case.spec.name, case.benchmark.id, mode, bench.options.dtype)
    for name, (status, note) in failures.items():
        yield Row(*about, name, status, note=note, **bench.about)
    for name, timing in _time(bench, steps, settings(seen[0])).items():
        note = CURRENT if name == settings(seen[0]) else ""
        if isinstance(timing, Exception):
            yield Row(*about, name, "failed", note=first_line(timing), **bench.about)
            continue
        facts: dict[str, Any] = dataclasses.asdict(timing)
        facts["floor"] = floor / timing.ms if floor else None
        yield Row(*about, name, "ok", note=note, **facts, **bench.about)


def _time(bench: Bench, steps: dict[str, Step], current: str) -> dict[str, Timing | Exception]:
    """Time all a little, and those that may be the best, and today's, as long as is allowed."""
    timings = in_turns(steps, bench.clock.time, 0.0, _FEW)
    right = {name: t.ms for name, t in timings.items() if isinstance(t, Timing)}
    near = _NEAR * min(right.values(), default=0.0)
    last = {n: steps[n] for n, ms in right.items() if ms <= near or n == current}
    return timings | in_turns(last, bench.clock.time, bench.options.budget, bench.options.repeats)


def _with(launch: Launch, config: Config, step: Step) -> Step:
    def run(prepared: Any) -> Any:
        with replaced(launch, config):
            return step.run(prepared)

    return dataclasses.replace(step, run=run)


def settings(config: Config) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())


def configurations(seen: list[Config], launch: Launch) -> list[Config]:
    """What the configuration returned, first, and the candidates that differ from it."""
    if not seen:
        raise ValueError(f"sweep: {launch.config} was not asked in a call; is its name right?")
    found = [seen[0], *launch.candidates(dict(seen[0]))]
    return list({settings(config): config for config in found}.values())


@contextlib.contextmanager
def recorded(launch: Launch) -> Iterator[list[Config]]:
    """Note what the configuration returns within the block."""
    original, seen = getattr(launch.module, launch.config), []

    def config(*sizes: Any, **named: Any) -> Config:
        seen.append(dict(original(*sizes, **named)))
        return dict(seen[-1])

    with _attribute(launch, config):
        yield seen


@contextlib.contextmanager
def replaced(launch: Launch, config: Config) -> Iterator[None]:
    """Let the configuration return another one within the block."""
    with _attribute(launch, lambda *_, **__: dict(config)):
        yield


@contextlib.contextmanager
def _attribute(launch: Launch, value: Any) -> Iterator[None]:
    original = getattr(launch.module, launch.config)
    setattr(launch.module, launch.config, value)
    _forget_launches(launch)
    try:
        yield
    finally:
        setattr(launch.module, launch.config, original)
        _forget_launches(launch)


def _forget_launches(launch: Launch) -> None:
    """A launcher may keep what it made of a configuration."""
    for value in list(vars(launch.module).values()):
        if hasattr(value, "cache_clear"):
            value.cache_clear()
