"""One run: every provider of a case is checked, then those that are right are timed in turns."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import report
from benchmarks.answers import LIMITS, Answer, answer, answer_without_grad, exact, worst
from benchmarks.ceilings import Ceilings
from benchmarks.inputs import DeviceDraw, Inputs, Overwritten, draw_inputs, watch
from benchmarks.providers import Provider, first_line, refusal
from benchmarks.report import Row
from benchmarks.timing import WARM_UP, Clock, Step, Timing, host_ms, in_turns, step
from liger_fn.testing.spec import Benchmark, OpSpec


class DeviceLost(RuntimeError):
    """An error that ended the device's context: nothing more can be measured in this process."""


@dataclass
class Contestant:
    """A provider in one case: what it is called by, and what its first call showed."""

    provider: Provider
    call: Any = None
    overwritten: Overwritten = field(default_factory=lambda: Overwritten([]))
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Bench:
    """One run: what is the same for all of its rows, the rows so far, and when to begin no more.

    `end` is a time of the monotonic clock.
    """

    options: argparse.Namespace
    clock: Clock
    ceilings: Ceilings
    providers: list[Provider]
    about: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    end: float = float("inf")

    def case(self, spec: OpSpec, benchmark: Benchmark, modes: Sequence[str]) -> None:
        """Check every provider that has the op, then time those that are right."""
        contestants = [Contestant(p, facts={"version": p.version()}) for p in self.providers]
        try:
            inputs, want = self._draw(spec, benchmark)
        except Exception as error:
            inputs = None
            failure = {"status": "failed", "note": f"no reference: {first_line(error)}"}
            for contestant in contestants:
                contestant.facts |= failure
        else:
            alone = any(mode.endswith("fwd") for mode in modes)
            contestants = [c for c in contestants if self._enter(c, spec.name, inputs, want, alone)]
            del want
            self.forget()
        for mode in modes:
            self.write(self._measure(spec, benchmark, mode, inputs, contestants))
        self.forget()

    def _draw(self, spec: OpSpec, benchmark: Benchmark) -> tuple[Inputs, Answer]:
        draw = DeviceDraw(self.clock.device, getattr(torch, self.options.dtype), self.options.seed)
        inputs = draw_inputs(spec, benchmark, draw)
        return inputs, exact(spec, inputs)

    def _enter(
        self, contestant: Contestant, op: str, inputs: Inputs, want: Answer, alone: bool
    ) -> bool:
        """Make the first calls and judge them; False if the provider has no such op."""
        facts = contestant.facts
        try:
            call = contestant.call = contestant.provider.call(op)
            if call is None:
                return False
            if refused := refusal(call, inputs.arguments):
                facts |= {"status": "cannot", "note": refused}
                return True

            def first() -> Answer:
                start = time.perf_counter()
                got = answer(inputs, call)
                self.clock.synchronize()
                facts["first_s"] = time.perf_counter() - start
                return got

            runs = [first] + [lambda: answer_without_grad(inputs, call)] * alone
            got, contestant.overwritten = watch(inputs, *runs)
            if contestant.provider.answers:
                facts |= _verdict(got, want, getattr(torch, self.options.dtype))
            else:
                facts |= {"status": "ok", "note": "a floor, no answer"}
            facts["overwrites"] = len(contestant.overwritten.pairs)
        except NotImplementedError as error:
            facts |= {"status": "cannot", "note": first_line(error)}
        except Exception as error:
            facts |= {"status": "failed", "note": first_line(error)}
            self.forget()
        return True

    def _measure(
        self,
        spec: OpSpec,
        benchmark: Benchmark,
        mode: str,
        inputs: Inputs | None,
        contestants: list[Contestant],
    ) -> list[Row]:
        """Time one mode of one case, or only take its memory."""
        kind = mode.removeprefix("host-").replace("memory", "full")
        steps = {
            c.provider.name: step(kind, inputs, c.call, c.overwritten)
            for c in contestants
            if inputs is not None and c.facts.get("status") == "ok"
        }
        timings: dict[str, Timing | Exception] = {}
        if mode.startswith("host"):
            timings = self._host(steps)
        elif mode != "memory":
            timings = in_turns(steps, self.clock.time, self.options.budget, self.options.repeats)

        rows = []
        for contestant in contestants:
            name, facts = contestant.provider.name, dict(contestant.facts)
            if name in steps:
                facts |= self._facts(timings.get(name), steps[name], benchmark, mode)
                facts["note"] += "; waits for the device" * steps[name].waits
            case = (spec.name, benchmark.id, mode, self.options.dtype, name)
            rows.append(Row(*case, **facts, **self.about))
        return rows

    def _host(self, steps: dict[str, Step]) -> dict[str, Timing | Exception]:
        """Time the host: the budget is shared out evenly, so that slow peers do not take more."""
        repeats = self.options.repeats
        seconds = self.options.budget / max(1, len(steps) * (repeats + WARM_UP))
        measure = host_ms(self.clock, self.options.calls, seconds)
        return in_turns(steps, measure, budget=0.0, fewest=repeats)

    def _facts(
        self, timing: Timing | Exception | None, step: Step, benchmark: Benchmark, mode: str
    ) -> dict[str, Any]:
        """What a row says of a time, and of the memory of one more repeat."""
        facts: dict[str, Any] = {}
        if isinstance(timing, Exception):
            self.forget()
            return {"status": "failed", "note": first_line(timing)}
        if timing is not None:
            floor = self.ceilings.floor_ms(benchmark, mode)
            facts = {"ms": timing.ms, "spread": timing.spread, "repeats": timing.repeats}
            facts["floor"] = floor / timing.ms if floor else None
        try:
            return facts | {"peak_mib": self.clock.peak_mib(step)}
        except Exception as error:
            return facts | {"note": f"peak memory: {first_line(error)}"}

    def write(self, rows: list[Row]) -> None:
        self.rows += rows
        if self.options.csv:
            report.append(self.options.csv, rows)

    def forget(self) -> None:
        """Give cached memory back, and stop if an error has cost us the device."""
        if self.clock.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.clock.device)
                torch.cuda.empty_cache()
            except RuntimeError as error:
                raise DeviceLost(f"The device is lost: {first_line(error)}") from error


def _verdict(got: Answer, want: Answer, dtype: torch.dtype) -> dict[str, Any]:
    part, error = worst(got, want)
    facts = {"status": "ok", "error": error, "note": f"largest error in {part}"}
    if error > LIMITS[dtype]:
        why = f"{part} is off by {error:.2g} of its norm, more than {LIMITS[dtype]:g}"
        facts |= {"status": "wrong", "note": why}
    return facts
