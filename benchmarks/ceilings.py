"""What the device can do at best, measured in the same run: how fast it copies and multiplies."""

import statistics
from dataclasses import dataclass

import torch

from benchmarks.timing import Clock, Step
from liger_fn.testing.spec import Benchmark


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second of a copy (read and written), operations a second of bf16 matrices."""

    copy: float
    matrix: float

    def floor_ms(self, benchmark: Benchmark, mode: str) -> float | None:
        """The least time that the case can take; None where the spec states no traffic or work."""
        passes = {
            "fwd": [(benchmark.bytes_fwd, benchmark.flops_fwd)],
            "bwd": [(benchmark.bytes_bwd, benchmark.flops_bwd)],
        }
        passes["full"] = passes["fwd"] + passes["bwd"]
        seconds = sum(max(b / self.copy, f / self.matrix) for b, f in passes.get(mode, ()))
        return seconds * 1e3 or None


def measure(clock: Clock) -> Ceilings:
    """Copy 1 GiB, multiply 8192³, each for about a second; little matrices on a CPU."""
    large = clock.device.type == "cuda"
    elements, side, repeats = (2**29, 8192, 200) if large else (2**20, 128, 5)
    source = torch.randn(elements, device=clock.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy_ms = _median(clock, lambda _: target.copy_(source), repeats)
    # Numbers, not zeros: zeros draw less power and multiply faster.
    a, b = source[: 2 * side * side].view(2, side, side)
    product = torch.empty_like(a)
    matrix_ms = _median(clock, lambda _: torch.mm(a, b, out=product), repeats * 2)
    return Ceilings(4 * elements / copy_ms * 1e3, 2 * side**3 / matrix_ms * 1e3)


def _median(clock: Clock, run, repeats: int) -> float:
    """The later half: by then the clocks have settled under the load."""
    step = Step(lambda: None, run, lambda: None)
    samples = [clock.time(step) for _ in range(repeats)]
    return statistics.median(samples[repeats // 2 :])
