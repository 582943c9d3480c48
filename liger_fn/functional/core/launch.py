"""What launchers share: Triton or its absence, when to launch, layouts, facts about the chip."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TRITON_MISSING = ""
try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:  # macOS, Windows: the references run, and the op files still import
    TRITON_MISSING = str(error)

    class _Absent:
        """Stands for every name of Triton: as a decorator it returns the function untouched."""

        def __getattr__(self, name: str) -> "_Absent":
            return self

        def __call__(self, fn: Any = None, **_: Any) -> Any:
            return fn if callable(fn) else self

    triton = tl = TensorDescriptor = _Absent()

_TRITON_DTYPES: dict[torch.dtype, Any] = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


# Bytes that a program may have on Hopper and later chips, and on none before.
HOPPERS_SHARED_MEMORY = 220_000


def interpreted() -> bool:
    """Say whether Triton was imported in interpreter mode."""
    return not TRITON_MISSING and bool(triton.knobs.runtime.interpret)


def has_work(out: Tensor) -> bool:
    """Say whether a launcher that has allocated `out` must launch: there is memory, and some of it.

    This makes every launcher its own shape function: on meta and fake tensors it only allocates.
    """
    return not out.is_meta and out.numel() > 0


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type of statistics and sums over tensors of `dtype`."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def triton_dtype(dtype: torch.dtype) -> Any:
    return _TRITON_DTYPES[dtype]


def dense_like(x: Tensor) -> Tensor:
    """Allocate the shape and dtype of x in dense memory; this takes half as long as `new_empty`."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def as_rows(x: Tensor) -> Tensor:
    """View x (..., D) as (N, D) with unit stride along D; copy only if no view can do it."""
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """Give x (..., D) as a kernel reads rows with unit stride, and how far apart they are.

    It is as_rows, but that x itself will do where it is dense: a view costs more than to look.
    """
    if x.is_contiguous():
        return x, x.shape[-1]
    x = as_rows(x)
    return x, x.stride(0)


def per_row(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Allocate a number for each row of x (..., D)."""
    # Sizes one by one are read in half the time of a torch.Size.
    return x.new_empty(*x.shape[:-1], dtype=dtype) if x.dim() > 1 else x.new_empty((), dtype=dtype)


def unit_stride(x: Tensor | None) -> Tensor | None:
    """Give x dense memory, copying only if it has none."""
    return x if x is None or x.is_contiguous() else x.contiguous()


def in_vectors(*tensors: Tensor) -> bool:
    """Say whether rows (..., D) of all of these, with unit stride along D, lie in whole vectors.

    Triton loads none but such rows in vectors. Ask of tensors with memory: see has_work.
    """
    return all(
        x.data_ptr() % 16 == 0 and not any(n % 16 for n in (x.shape[-1], *x.stride()[:-1]))
        for x in tensors
    )


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def sm_count(device: torch.device) -> int:
    """The chip's multiprocessors; a few for the interpreter, so that sums have several parts."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device.index or 0).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; any number for the interpreter."""
    if device.type != "cuda":
        return 1 << 18
    properties = torch.cuda.get_device_properties(device.index or 0)
    return getattr(properties, "shared_memory_per_block_optin", 65536)


Launcher = Callable[..., tuple]
