"""How a call is timed: providers in turns, on a cold cache, the host ahead of the device.

The order of the turns is drawn anew each round. A chip at its power limit slows down for a while:
who always came after the hottest call would pay for it.

`fwd`, `bwd` and `full` are the device's time, which is what a training step pays as long as its
host keeps ahead: the device spins until the host has enqueued all of the call. Of a call that
itself waits for the device, what its host does after the wait is timed too. `host` is the host's
time.
"""

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.inputs import Inputs, Overwritten

# Larger than any L2, so that writing it leaves nothing of the inputs there.
_FLUSH_BYTES = 256 * 2**20

# How many cycles the device spins before a call: half a millisecond at first, doubled as long as
# the host needs more, up to about 17 ms.
_SHORTEST, _LONGEST = 2**20, 2**25

# Enough for every length of the head start, and for the allocator to find its memory.
_TRIES = 8

# Rounds that warm up at least, and rounds that are timed at most.
WARM_UP, _MOST = 2, 200


@dataclass
class Step:
    """What a mode repeats: `prepare` untimed, `run` timed on what it gave, `restore` untimed.

    Attributes:
        head_start: how many cycles the device spins before `run`.
        waits: whether no head start is enough, because `run` waits for the device.
    """

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]
    restore: Callable[[], None]
    head_start: int = _SHORTEST
    waits: bool = False

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Put back what is overwritten within, after a failure too: others are still to come."""
        try:
            yield
        finally:
            self.restore()

    def lengthen(self) -> None:
        """Give the host twice the time; one for which the most is too little needs none of it."""
        self.waits = self.head_start >= _LONGEST
        self.head_start = _SHORTEST if self.waits else 2 * self.head_start


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
            if device.index is not None:
                torch.cuda.set_device(device)
            self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
            self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, step: Step) -> float:
        """One repeat, in milliseconds.

        It is done again if the allocator had to ask the driver for memory, and if the device did
        not spin until the host was done.
        """
        for _ in range(_TRIES):
            before = self._allocations()
            ms, ahead = self._time_on_device(step) if self._cuda else self._time_on_host(step)
            if not ahead and not step.waits:
                step.lengthen()
            if (ahead or step.waits) and self._allocations() == before:
                break
        return ms

    def _time_on_device(self, step: Step) -> tuple[float, bool]:
        with step.restored():
            prepared = step.prepare()
            self._flush.zero_()
            torch.cuda._sleep(step.head_start)
            self._start.record()
            value = step.run(prepared)
            self._end.record()
            # All is enqueued: did the device still spin?
            ahead = not self._start.query()
            self._end.synchronize()
            del value, prepared
        return self._start.elapsed_time(self._end), ahead

    def _time_on_host(self, step: Step) -> tuple[float, bool]:
        with step.restored():
            prepared = step.prepare()
            start = time.perf_counter()
            step.run(prepared)
            ms = (time.perf_counter() - start) * 1e3
        return ms, True

    def _allocations(self) -> int:
        if not self._cuda:
            return 0
        return torch.cuda.memory_stats_as_nested_dict(self.device).get("num_device_alloc", 0)

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
        with step.restored():
            step.run(step.prepare())
            self.synchronize()
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
    """Time every contestant once a round, in any order, so that all see the same clocks.

    A quarter of the budget, and two rounds at least, warm up. One that fails is out.
    """
    shuffle = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    failures: dict[str, Exception] = {}

    def round_() -> None:
        for name in shuffle.sample(list(contestants), len(contestants)):
            if name not in failures:
                try:
                    samples[name].append(measure(contestants[name]))
                except Exception as error:
                    # Its traceback would keep the tensors of the failed call alive.
                    failures[name] = error.with_traceback(None)

    with _no_garbage_collection():
        _rounds(round_, budget / 4, WARM_UP, _MOST)
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


def host_ms(clock: Clock, most: int, seconds: float) -> Callable[[Step], float]:
    """Measure what a call costs the host: many in a row, none waited for, for some seconds."""

    def measure(step: Step) -> float:
        clock.synchronize()
        calls, start = 0, time.perf_counter()
        now = start
        while calls < most and (not calls or now < start + seconds):
            step.run(None)
            calls, now = calls + 1, time.perf_counter()
        clock.synchronize()
        return (now - start) * 1e3 / calls

    return measure


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
