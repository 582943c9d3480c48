"""How a call is timed: providers in turns, on a cold cache, the device kept busy beforehand."""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.inputs import Inputs, Overwritten

# Larger than any L2, so that writing it leaves nothing of the inputs there.
_FLUSH_BYTES = 256 * 2**20

# The device spins for about half a millisecond before each call, in which the host enqueues it:
# timed is the device's work, and the waiting of those who make it wait. `host` times the host.
_HEAD_START_CYCLES = 1_000_000

_MOST = 200


@dataclass
class Step:
    """What a mode repeats: `prepare` untimed, `run` timed on what it gave, `restore` untimed."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]
    restore: Callable[[], None]


def step(mode: str, inputs: Inputs, call: Callable[..., Any], overwritten: Overwritten) -> Step:
    detached = inputs.detached

    def forward_only(_):
        with torch.no_grad():
            return call(**detached)

    def both(_):
        return inputs.backward(inputs.forward(call))

    if mode == "bwd":
        return Step(lambda: inputs.forward(call), inputs.backward, overwritten.restore)
    return Step(lambda: None, forward_only if mode == "fwd" else both, overwritten.restore)


class Clock:
    """Times one call at a time on one device, in milliseconds."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
            self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, step: Step) -> float:
        """One repeat. One that made the allocator ask the driver for memory is done again."""
        for _ in range(3):
            before = self._allocations()
            ms = self._time_on_device(step) if self._cuda else self._time_on_host(step)
            if self._allocations() == before:
                break
        return ms

    def _time_on_device(self, step: Step) -> float:
        prepared = step.prepare()
        self._flush.zero_()
        torch.cuda._sleep(_HEAD_START_CYCLES)
        self._start.record()
        value = step.run(prepared)
        self._end.record()
        self._end.synchronize()
        del value, prepared
        step.restore()
        return self._start.elapsed_time(self._end)

    def _time_on_host(self, step: Step) -> float:
        prepared = step.prepare()
        start = time.perf_counter()
        step.run(prepared)
        ms = (time.perf_counter() - start) * 1e3
        step.restore()
        return ms

    def _allocations(self) -> int:
        return torch.cuda.memory_stats(self.device).get("num_device_alloc", 0) if self._cuda else 0

    def synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def peak_mib(self, step: Step) -> float | None:
        """The most memory that one repeat holds above what was held before it; None on a CPU."""
        if not self._cuda:
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        step.run(step.prepare())
        self.synchronize()
        step.restore()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20


@dataclass
class Timing:
    """Milliseconds: the median, and the distance between the quartiles as a share of it."""

    ms: float
    spread: float
    repeats: int

    @staticmethod
    def of(samples: list[float]) -> "Timing":
        median = statistics.median(samples)
        low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else (median,) * 3
        return Timing(median, (high - low) / median if median else 0.0, len(samples))


def in_turns(
    contestants: Mapping[str, Step],
    measure: Callable[[Step], float],
    budget: float,
    fewest: int,
) -> dict[str, Timing | Exception]:
    """Time every contestant once a round (A B C A B C ...), so that all see the same clocks.

    A quarter of the budget, and two rounds where they are many, warm up. One that fails is out.
    """
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    failures: dict[str, Exception] = {}

    def round_() -> None:
        for name, contestant in contestants.items():
            if name not in failures:
                try:
                    samples[name].append(measure(contestant))
                except Exception as error:
                    # Its traceback would keep the tensors of the failed call alive.
                    failures[name] = error.with_traceback(None)

    with _no_garbage_collection():
        _rounds(round_, budget / 4, min(2, fewest), _MOST)
        for kept in samples.values():
            kept.clear()
        _rounds(round_, budget, fewest, _MOST)
    return {n: failures[n] if n in failures else Timing.of(samples[n]) for n in contestants}


def _rounds(round_: Callable[[], None], seconds: float, fewest: int, most: int) -> None:
    end = time.monotonic() + seconds
    for count in range(most):
        if count >= fewest and time.monotonic() > end:
            break
        round_()


def host_ms(clock: Clock, calls: int) -> Callable[[Step], float]:
    """Measure what a call costs the host: many of them, none waited for."""

    def measure(step: Step) -> float:
        clock.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            step.run(None)
        ms = (time.perf_counter() - start) * 1e3 / calls
        clock.synchronize()
        return ms

    return measure


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
