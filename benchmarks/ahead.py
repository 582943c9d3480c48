"""Compile before timing: processes that launch nothing fill Triton's cache, one on every core.

A process runs the op itself, on memory that it allocates but never touches, with a Triton that
compiles for the device of the run and leaves it alone.
"""

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import sweep
from benchmarks.inputs import draw_inputs
from liger_fn.functional import using
from liger_fn.functional.core import launch as chip
from liger_fn.testing.spec import Draw
from liger_fn.testing.specs import specs


def compile_ahead(
    cases: Sequence[sweep.Case], dtype: str, device: torch.device, end: float
) -> None:
    """Compile the candidates of all cases, until it is `end` on the monotonic clock."""
    if device.type != "cuda" or chip.interpreted():
        return
    from triton.runtime import driver

    facts = driver.active.get_current_target(), chip.sm_count(device)
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), spawn, launch_nothing, facts)
    try:
        work = [pool.submit(compile_case, *_names(case), dtype) for case in cases]
        bar = tqdm(total=len(work), unit="case", desc="compile", file=sys.stderr)
        left = end - time.monotonic() if end < float("inf") else None
        with bar, contextlib.suppress(TimeoutError):
            for done in as_completed(work, left):
                done.result()
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)


def _names(case: sweep.Case) -> tuple[str, str, int]:
    """A case, said so that another process finds it."""
    return case.spec.name, case.benchmark.id, case.spec.launches.index(case.launch)


class OnlyTarget:
    """As much of a driver as compilation asks for."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def launch_nothing(target: Any, sms: int) -> None:
    """From now on let this process's kernels be compiled for `target`, and not be launched."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        return run(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only
    driver.set_active(OnlyTarget(target))
    # Every op's file has its own name for it.
    for module in list(sys.modules.values()):
        if getattr(module, "sm_count", None) is chip.sm_count and module is not chip:
            module.sm_count = lambda device: sms  # type: ignore[attr-defined]


class Untouched(Draw):
    """Gives memory that nobody has touched: it costs an address, and what is in it is not read."""

    def normal(self, *shape, scale=1.0, dtype=None):
        return torch.empty(shape, dtype=dtype or self.dtype)

    def uniform(self, *shape, high=1.0, dtype=None):
        return torch.empty(shape, dtype=dtype or self.dtype)

    def integers(self, high, *shape):
        return torch.zeros(shape, dtype=torch.int64)


def compile_case(op: str, shape: str, launch: int, dtype: str) -> int:
    """Compile what the candidates of one case launch; return how many did not compile."""
    spec = next(spec for spec in specs() if spec.name == op)
    benchmark = next(b for b in spec.benchmarks if b.id == shape)
    inputs = draw_inputs(spec, benchmark, Untouched("cpu", getattr(torch, dtype)))
    configuration, failed = spec.launches[launch], 0

    def call() -> None:
        inputs.backward(inputs.forward(spec.op))
        with torch.no_grad():
            spec.op(**inputs.detached)

    with using("kernels"):
        with sweep.recorded(configuration) as seen:
            call()
        for config in sweep.configurations(seen, configuration)[1:]:
            try:
                with sweep.replaced(configuration, config):
                    call()
            except Exception:
                # The run itself will meet it again, and say so.
                failed += 1
    return failed
