"""The longest sequence that a training step fits into memory, one sequence at a time."""

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.e2e.providers import Provider
from benchmarks.e2e.trainee import Task, Tell, Trainee, is_out_of_memory

UNIT = 1024


class OutOfTime(Exception):
    """The search has used up its seconds."""


def search(fits: Callable[[int], bool], unit: int, most: int) -> int:
    """Find the largest multiple of `unit`, at most `most`, that fits: doubling, then bisection.

    What is longer than one that does not fit is taken not to fit either. 0 if nothing does.
    """
    low, high = 0, most // unit + 1
    while low < most // unit:
        longer = min(max(1, 2 * low), most // unit)
        if not fits(longer * unit):
            high = longer
            break
        low = longer
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle * unit):
            low = middle
        else:
            high = middle
    return low * unit


def measure_lengths(task: Task, provider: Provider, tell: Tell) -> dict[str, Any]:
    """Take training steps of growing length; every one that fits is told at once."""
    end = time.monotonic() + task.seconds
    trainee = Trainee(task, provider, tell)
    longest = 0

    def fits(length: int) -> bool:
        nonlocal longest
        if time.monotonic() > end:
            raise OutOfTime
        tell(doing=f"length {length:,}")
        if not _fits(trainee, length, tell):
            return False
        longest = max(longest, length)
        tell(longest=longest)
        return True

    try:
        longest = search(fits, UNIT, task.longest)
    except OutOfTime:
        return {"longest": longest, "note": "the time was over: longer ones may fit"}
    if longest >= task.longest // UNIT * UNIT:
        return {"longest": longest, "note": "no longer one was tried"}
    return {"longest": longest}


def _fits(trainee: Trainee, length: int, tell: Tell) -> bool:
    batch = trainee.tokens(1, length)
    try:
        trainee.first_gradients(batch, tell)
        trainee.update()
        trainee.synchronize()
        return True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        trainee.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if trainee.device.type == "cuda":
            torch.cuda.empty_cache()
