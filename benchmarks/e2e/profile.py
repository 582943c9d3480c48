"""Where the time of a training step goes: every kernel of some steps, and what the host takes.

A profiler slows the host. What it says of kernels holds all the same; the times of the step and of
the host are therefore measured without it.
"""

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from benchmarks.e2e.parts import is_kernel, part_of
from benchmarks.e2e.providers import Provider
from benchmarks.e2e.trainee import Task, Tell, Trainee, measure_training

# One step has thousands of kernels; the mean of some evens out what the clocks do.
STEPS = 3


@dataclass(frozen=True)
class Span:
    """A kernel of a GPU, or an operator of a CPU; times are in microseconds.

    Attributes:
        own: its time without that of the operators which it calls; a kernel calls none.
    """

    name: str
    start: float
    end: float
    own: float


def measure_profile(task: Task, provider: Provider, tell: Tell) -> dict[str, Any]:
    """Train as the other measurement of steps does, then take some of them apart."""
    trainee = Trainee(task, provider, tell)
    batch = trainee.tokens(task.batch, task.seq)
    facts = measure_training(trainee, batch, tell)
    tell(doing="profile")
    host = host_ms(trainee, batch)
    spans = record(trainee, batch)
    if not spans:
        raise RuntimeError("the profiler has seen no kernel")
    return facts | {
        "host_ms": host,
        "busy_ms": busy_us(spans) / STEPS / 1e3,
        "parts": {
            part: (us / STEPS / 1e3, launches / STEPS)
            for part, (us, launches) in by_part(spans).items()
        },
    }


def host_ms(trainee: Trainee, batch: Tensor) -> float:
    """How long the host takes to queue a step for an idle device; the median of some.

    A device takes in so many kernels only: of a longer step some have run by then.
    """
    times = []
    for _ in range(STEPS):
        trainee.synchronize()
        start = time.perf_counter()
        trainee.step(batch)
        times.append((time.perf_counter() - start) * 1e3)
    trainee.synchronize()
    return statistics.median(times)


def record(trainee: Trainee, batch: Tensor) -> list[Span]:
    """All kernels of some steps, after one that lets the profiler get ready."""
    on_cuda = trainee.device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
    trainee.synchronize()
    with profile(activities=[activity], schedule=schedule(wait=0, warmup=1, active=1)) as profiler:
        trainee.step(batch)
        trainee.synchronize()
        profiler.step()
        for _ in range(STEPS):
            trainee.step(batch)
        trainee.synchronize()
    return list(spans_of(profiler.events(), DeviceType.CUDA if on_cuda else DeviceType.CPU))


def spans_of(events: Iterable[Any], device: DeviceType) -> Iterator[Span]:
    """What ran on a device of all that a profiler lists."""
    for event in events:
        if event.device_type != device or event.is_user_annotation or not is_kernel(event.name):
            continue
        lasted = event.time_range
        own = event.self_cpu_time_total if device == DeviceType.CPU else lasted.elapsed_us()
        yield Span(event.name, lasted.start, lasted.end, own)


def by_part(spans: Iterable[Span]) -> dict[str, tuple[float, int]]:
    """Microseconds and number of kernels for each part."""
    out: dict[str, tuple[float, int]] = {}
    for span in spans:
        us, launches = out.get(part_of(span.name), (0.0, 0))
        out[part_of(span.name)] = us + span.own, launches + 1
    return out


def busy_us(spans: Sequence[Span]) -> float:
    """How long anything ran at all: kernels that run at once count once."""
    busy, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        busy += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return busy
