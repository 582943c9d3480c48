"""Launching without Triton's overhead.

    launch(kernel, grid, x, y, N, BLOCK=128)        for     kernel[grid](x, y, N, BLOCK=128)

At every launch Triton finds out anew which of its compiled kernels the arguments want, which takes
several times as long as the launch itself. Here the kernel is looked up by the arguments as they
are, and Triton is asked only about arguments that it has not yet seen.

Most of what remains is to look at the constants. A launcher that keeps a kernel with its constants
saves that, and the choice of the constants as well:

    @functools.lru_cache(MOST)
    def _copy(D: int) -> Bound:
        return Bound(_copy_kernel, BLOCK=min(1024, next_power_of_2(D)), num_warps=4)

    copy = _copy(D)
    copy((cdiv(N, copy.constants["BLOCK"]),), x, y, N)
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from liger_fn.functional.core.launch import TRITON_MISSING, interpreted, triton

_current_device: Callable[[], int] | None = getattr(torch._C, "_cuda_getDevice", None)
_current_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)

# The call by which Triton launches a compiled kernel. A Triton without it is left to itself.
_TRITONS_CALL = """
    kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata,
               launch_metadata, knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook,
               *bound_args.values())
"""


def _known_run() -> Any:
    """Triton's `JITFunction.run`, if that launches as `Bound` does and is not interpreted."""
    if TRITON_MISSING or interpreted() or torch.version.hip or _current_stream is None:
        return None
    run = triton.runtime.jit.JITFunction.run
    try:
        source = inspect.getsource(run)
    except (OSError, TypeError):
        return None
    return run if _unspaced(_TRITONS_CALL) in _unspaced(source) else None


def _unspaced(source: str) -> str:
    return "".join(source.split())


_KNOWN_RUN = _known_run()

# Sizes, strides and constants of a program's calls are few. One that has ever new ones (a sequence
# that grows, an eps that is annealed) starts afresh now and then, and pays Triton's price once.
MOST = 512


# Bits do not depend on what a version of Triton or the environment take for the default.
OPTIONS = {"enable_fp_fusion": True}


def by_triton(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> Any:
    """Launch as `kernel[grid](*args, **constants)` does, and give what Triton compiled."""
    return kernel[grid](*args, **constants, **OPTIONS)


class _Compiled(NamedTuple):
    """What Triton's launcher wants of a compiled kernel, and the kernel, to keep it loaded."""

    run: Callable
    function: Any
    metadata: Any
    constants: tuple[None, ...]
    kernel: Any


class Bound:
    """A kernel with its constants and options: `Bound(kernel, BLOCK=128)(grid, x, y, N)`.

    Threads may share one: what they race for is a dictionary's entry, the same from each.
    """

    __slots__ = ("_compiled", "constants", "kernel")

    def __init__(self, kernel: Any, **constants: Any) -> None:
        if torch.version.hip:
            # AMD's compiler takes no limit of registers.
            constants.pop("maxnreg", None)
        self.kernel, self.constants = kernel, constants
        self._compiled: dict[tuple, _Compiled] = {}

    def __call__(self, grid: tuple[int, ...], *args: Any) -> None:
        """Launch as `kernel[grid](*args, **constants)` does, on the current device and stream.

        Integers are looked up by value, tensors by dtype and alignment: that is all on which Triton
        specialises a kernel, and more.
        """
        if _is_watched(self.kernel):
            by_triton(self.kernel, grid, *args, **self.constants)
            return

        device = _current_device()
        key: list[Any] = [device]
        values = []
        for value in args:
            kind = type(value)
            if kind is int or value is None:
                key.append(value)
            elif kind is bool or kind is float:
                # True == 1 == 1.0, but Triton has a kernel for each.
                key.append((kind, value))
            else:
                key.append(value.dtype)
                value = value.data_ptr()
                if value % 16:
                    key.append((value % 16,))
            values.append(value)
        compiled = self._compiled.get(tuple(key))

        if compiled is None:
            compiled = by_triton(self.kernel, grid, *args, **self.constants)
            self._remember(tuple(key), compiled, len(args))
            return
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        stream = _current_stream(device)
        run, function, metadata, constants, _ = compiled
        run(x, y, z, stream, function, metadata, None, None, None, *values, *constants)

    def _remember(self, key: tuple, compiled: Any, n_args: int) -> None:
        """Keep what Triton launched, if all parameters that were not passed are compiled in."""
        rest = self.kernel.params[n_args:]
        # A hook of Triton's that forbids to compile makes it launch nothing.
        if compiled is None or not all(p.is_constexpr for p in rest):
            return
        if len(self._compiled) >= MOST:
            self._compiled.clear()
        self._compiled[key] = _Compiled(
            compiled.run,
            compiled.function,
            compiled.packed_metadata,
            # Counted by Triton's launcher, but not read.
            (None,) * len(rest),
            compiled,
        )


_bound: dict[tuple, Bound] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launch as `kernel[grid](*args, **constants)` does, with constants by name and no others."""
    key = (id(kernel), *constants, *constants.values())
    bound = _bound.get(key)
    if bound is None:
        if len(_bound) >= MOST:
            _bound.clear()
        bound = _bound[key] = Bound(kernel, **constants)
    bound(grid, *args)


def _is_watched(kernel: Any) -> bool:
    """Say whether Triton, or somebody who changed how it launches, must see this launch."""
    runtime = triton.knobs.runtime
    return bool(
        _KNOWN_RUN is None
        or getattr(getattr(kernel, "run", None), "__func__", None) is not _KNOWN_RUN
        or kernel.pre_run_hooks
        or getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
        or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
        or runtime.add_stages_inspection_hook
        or runtime.debug
        or triton.knobs.compilation.instrumentation_mode
    )
