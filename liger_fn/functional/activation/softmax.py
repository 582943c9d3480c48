"""Softmax over the last dimension, of scaled and masked inputs.

    z = scale · x, −∞ where the mask is False          e = exp(z − top)          top = max z
    y = e / total                                      total = Σ e

    dx = scale · y · (dy − Σ dy · y)

Memory traffic in bytes per element of a 2-byte x: 4 forward (read x, write y), 6 backward (read x
and dy, write dx), and the mask, which neighbouring rows often share and find in the cache. `top`
and `total` are kept side by side, 8 bytes a row, and y is computed again from them: it is then as
exact as in the forward pass, where a rounded y, or one sum top + log(total), would lose digits.

A row that fits into a program's registers is read once. A wider one is read twice, the second time
backwards: what was read last is still in the first- and second-level cache. The first time it asks
the cache to keep what it reads, the second time not to. Of rows of two bytes an element without a
mask, some blocks stay in registers between the two, as they were read: 0.52 ms instead of 0.57
forward at 16384 x 32768 on an H200, and 0.82 instead of 1.01 backward at 8192 x 65536. Forward
there, no share that was tried gains anything.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.direct import MOST, Bound
from liger_fn.functional.core.kernels import columns_of, exp_of, no_blocks, times, with_block
from liger_fn.functional.core.launch import (
    HOPPERS_SHARED_MEMORY,
    accumulator,
    cdiv,
    dense_like,
    has_work,
    next_power_of_2,
    rows_of,
    shared_memory,
    tl,
    triton,
    triton_dtype,
    unit_stride,
)


def reference(x: Tensor, *, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
    z = x.to(accumulator(x.dtype)) * scale
    if mask is None:
        return torch.softmax(z, -1).to(x.dtype)
    z = z.masked_fill(~mask, -torch.inf)
    nothing_left = (z == -torch.inf).all(-1, keepdim=True)
    y = torch.softmax(z.masked_fill(nothing_left, 0.0), -1)
    return y.masked_fill(nothing_left, 0.0).to(x.dtype)


@triton.jit
def _mask_offset(row, H, T, stride_b, stride_h, stride_t):
    """Give where a row (b, h, t) of the mask begins."""
    return row // (H * T) * stride_b + row // T % H * stride_h + row % T * stride_t


@triton.jit
def _seen(row, col, D, inside, CAUSAL: tl.constexpr):
    """Give which elements a row looks at: all inside, of a causal one none past the diagonal."""
    if CAUSAL:
        inside &= col <= row % D
    return inside


@triton.jit
def _load_logits(
    x_ptr, mask_ptr, col, mask_stride_d, inside,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr, COMPUTE: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Load z; outside it is −∞, which adds nothing to a sum of exponentials."""
    x = tl.load(x_ptr + col, mask=inside, other=float("-inf"), eviction_policy=EVICT)
    return _logits(x, mask_ptr, col, mask_stride_d, inside, SCALE, HAS_MASK, COMPUTE)


@triton.jit
def _logits(
    x, mask_ptr, col, mask_stride_d, inside,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Turn x, as it was loaded, into z; −∞ where it is masked."""
    z = x.to(COMPUTE) * SCALE
    if HAS_MASK:
        allowed = tl.load(mask_ptr + col.to(tl.int64) * mask_stride_d, mask=inside, other=0)
        inside &= allowed != 0
    if HAS_MASK or SCALE <= 0.0:
        z = tl.where(inside, z, float("-inf"))
    return z


@triton.jit(do_not_specialize=["N", "H", "T"])
def _softmax_fwd_kernel(
    x_ptr, mask_ptr, y_ptr, top_total_ptr,
    x_stride_n, mask_stride_b, mask_stride_h, mask_stride_t, mask_stride_d, H, T, D, N,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, LOWEST: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < N)[:, None] & (col < D)
    seen = _seen(row[:, None], col, D, inside, CAUSAL)
    x_ptr += row[:, None] * x_stride_n
    if HAS_MASK:
        mask_ptr += _mask_offset(row, H, T, mask_stride_b, mask_stride_h, mask_stride_t)[:, None]
    z = _load_logits(x_ptr, mask_ptr, col, mask_stride_d, seen, SCALE, HAS_MASK, COMPUTE, "")

    # Not below the lowest number: the sum over a row of −∞ is then 0, and y 0/0, NaN.
    top = tl.maximum(tl.max(z, axis=1), LOWEST)
    e = exp_of(z - top[:, None])
    total = tl.sum(e, axis=1)
    if HAS_MASK or CAUSAL:
        total = tl.where(total == 0.0, 1.0, total)

    tl.store(y_ptr + row[:, None] * D + col, e * (1.0 / total)[:, None], mask=inside)
    if top_total_ptr is not None:
        tl.store(top_total_ptr + 2 * row, top, mask=row < N)
        tl.store(top_total_ptr + 2 * row + 1, total, mask=row < N)


@triton.jit
def _anew(x, zero):
    """The same numbers, which the compiler takes for others: converted where it first saw them to
    float32, it would keep these, in twice the registers.
    """
    if x.dtype.primitive_bitwidth == 16:
        x = (x.to(tl.int16, bitcast=True) ^ zero).to(x.dtype, bitcast=True)
    return x


@triton.jit(do_not_specialize=["H", "T"])
def _softmax_fwd_wide_kernel(
    x_ptr, mask_ptr, y_ptr, top_total_ptr,
    x_stride_n, mask_stride_b, mask_stride_h, mask_stride_t, mask_stride_d, H, T, D,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, LOWEST: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_D: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = columns_of(BLOCK_D)
    width = (row % D).to(tl.int32) + 1 if CAUSAL else D
    x_ptr += row * x_stride_n
    if HAS_MASK:
        mask_ptr += _mask_offset(row, H, T, mask_stride_b, mask_stride_h, mask_stride_t)
    last = (D - 1) // BLOCK_D * BLOCK_D
    # Where the blocks begin that registers hold.
    kept = last + BLOCK_D - HELD * BLOCK_D

    tops = tl.full((block.shape[0],), LOWEST, COMPUTE)
    sums = tl.zeros((block.shape[0],), COMPUTE)
    for start in range(0, tl.minimum(width, kept) if HELD else width, BLOCK_D):
        col = start + block
        z = _load_logits(
            x_ptr, mask_ptr, col, mask_stride_d, col < width,
            SCALE, HAS_MASK, COMPUTE, "evict_last",
        )  # fmt: skip
        tops, sums = with_block(tops, sums, z)
    held = no_blocks()
    for i in tl.static_range(HELD):
        col = last - (HELD - 1 - i) * BLOCK_D + block
        x = tl.load(x_ptr + col, mask=col < width, other=float("-inf"))
        z = _logits(x, mask_ptr, col, mask_stride_d, col < width, SCALE, HAS_MASK, COMPUTE)
        tops, sums = with_block(tops, sums, z)
        held += (x,)

    top = tl.max(tops, axis=0)
    total = tl.sum(sums * exp_of(tops - top), axis=0)
    zero = (total < 0.0).to(tl.int16)
    if HAS_MASK or CAUSAL:
        total = tl.where(total == 0.0, 1.0, total)
    if top_total_ptr is not None:
        tl.store(top_total_ptr + 2 * row, top)
        tl.store(top_total_ptr + 2 * row + 1, total)

    over = 1.0 / total
    for i in tl.static_range(HELD):
        col = last - i * BLOCK_D + block
        x = _anew(held[HELD - 1 - i], zero)
        z = _logits(x, mask_ptr, col, mask_stride_d, col < width, SCALE, HAS_MASK, COMPUTE)
        y = exp_of(z - top) * over
        tl.store(y_ptr + row * D + col, y, mask=col < D, cache_modifier=".cs")
    for step in range(HELD * BLOCK_D, D, BLOCK_D):
        col = last - step + block
        z = _load_logits(
            x_ptr, mask_ptr, col, mask_stride_d, col < width,
            SCALE, HAS_MASK, COMPUTE, "evict_first",
        )  # fmt: skip
        y = exp_of(z - top) * over
        # Streaming, so that y drives no x out of the cache that is still to be read again.
        tl.store(y_ptr + row * D + col, y, mask=col < D, cache_modifier=".cs")


def _holds(D: int, dtype: torch.dtype, masked: bool) -> bool:
    """Whether registers hold blocks of a wide row: of two bytes an element, in whole vectors, and
    with no mask beside it. For others they do not suffice.
    """
    return dtype.itemsize == 2 and D % 16 == 0 and not masked


def _with_blocks_of_a_row(config: dict, D: int) -> dict:
    """Hold no more blocks than a row has."""
    if "HELD" in config:
        config = config | {"HELD": min(config["HELD"], cdiv(D, config["BLOCK_D"]))}
    return config


def _softmax_fwd_config(D: int, holds: bool) -> dict:
    """A row in registers, 32 elements a thread: four 16-byte loads in flight. Of shorter rows 2048
    elements a program: more programs gain more than more loads a thread, as in the norms.

    Beyond 16384 elements a multiprocessor would have registers for one row, and nothing to do while
    its warps wait for each other: a program walks along the row and reads it twice, but for the
    blocks that it `holds`. Three programs of up to 40 registers a thread share a multiprocessor, or
    two of 32, so long as the rows in flight stay in the second-level cache; they are 34 MB of 132
    programs at 131072 elements.
    """
    if D > 65536:
        return {"BLOCK_D": 32768, "HELD": 0, "num_warps": 32}
    if D > 32768:
        return {"BLOCK_D": 16384, "HELD": 0, "num_warps": 32}
    if D > 16384 and holds:
        return {"BLOCK_D": 8192, "HELD": 1, "num_warps": 16, "maxnreg": 40}
    if D > 16384:
        return {"BLOCK_D": 16384, "HELD": 0, "num_warps": 16}
    block_d = next_power_of_2(D)
    block_n = min(32, max(1, 2048 // block_d))
    return {"BLOCK_D": block_d, "BLOCK_N": block_n, "num_warps": max(4, block_d // 1024)}


@functools.lru_cache(MOST)
def _softmax_fwd_with(
    D: int, scale: float, has_mask: bool, causal: bool, dtype: torch.dtype
) -> Bound:
    compute = accumulator(dtype)
    config = _softmax_fwd_config(D, _holds(D, dtype, has_mask or causal))
    config = _with_blocks_of_a_row(config, D)
    return Bound(
        _softmax_fwd_kernel if "BLOCK_N" in config else _softmax_fwd_wide_kernel,
        SCALE=scale, HAS_MASK=has_mask, CAUSAL=causal, LOWEST=torch.finfo(compute).min,
        COMPUTE=triton_dtype(compute), **config,
    )  # fmt: skip


def _launch(kernel: Bound, N: int, *args: Any) -> None:
    """Launch the kernel of several rows, or the one of a wide row, which need not know N."""
    block_n = kernel.constants.get("BLOCK_N")
    if block_n:
        kernel((cdiv(N, block_n),), *args, N)
    else:
        kernel((N,), *args)


def softmax_fwd(
    x: Tensor, mask: Tensor | None, scale: float, need_dx: bool
) -> tuple[Tensor, Tensor | None]:
    return _forward(x, mask, scale, causal=False, keep=need_dx)


def causal_softmax_fwd(x: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
    """The same of square x (..., D, D), of which row i sees columns 0 to i; no mask is read."""
    return _forward(x, None, 1.0, causal=True, keep=keep)


def _forward(
    x: Tensor, mask: Tensor | None, scale: float, causal: bool, keep: bool
) -> tuple[Tensor, Tensor | None]:
    y, top_total = dense_like(x), None
    if keep:
        top_total = x.new_empty(*x.shape[:-1], 2, dtype=accumulator(x.dtype))

    if has_work(y):
        D = x.shape[-1]
        N = x.numel() // D
        x, x_stride_n = rows_of(x)
        mask, (H, T), mask_strides = _rows_of_mask(mask)
        kernel = _softmax_fwd_with(D, scale, mask is not None, causal, x.dtype)
        _launch(kernel, N, x, mask, y, top_total, x_stride_n, *mask_strides, H, T, D)
    return y, top_total


def _rows_of_mask(
    mask: Tensor | None,
) -> tuple[Tensor | None, tuple[int, int], tuple[int, int, int, int]]:
    """View a mask (..., D) as (B, H, T, D), any strides; copy only where no view can do that.

    Three dimensions of rows are enough for masks that the heads share.
    """
    if mask is None:
        return None, (1, 1), (0, 0, 0, 0)
    dims: list[tuple[int, int]] = []
    for size, stride in zip(mask.shape[:-1], mask.stride()[:-1], strict=True):
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        elif size != 1:
            dims.append((size, stride))
    if len(dims) > 3:
        return _rows_of_mask(mask.contiguous())
    (_, b), (H, h), (T, t) = [(1, 0)] * (3 - len(dims)) + dims
    return mask.view(torch.uint8), (H, T), (b, h, t, mask.stride(-1))


# Wider rows have several numbers a lane, whatever their alignment (triton 3.6 to 3.9).
_ONE_A_LANE = tl.constexpr(128)


@triton.jit(do_not_specialize=["N", "H", "T"])
def _softmax_bwd_kernel(
    x_ptr, mask_ptr, top_total_ptr, dy_ptr, dx_ptr,
    x_stride_n, mask_stride_b, mask_stride_h, mask_stride_t, mask_stride_d, dy_stride_n,
    H, T, D, N,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < N)[:, None] & (col < D)
    seen = _seen(row[:, None], col, D, inside, CAUSAL)
    x_ptr += row[:, None] * x_stride_n
    if HAS_MASK:
        mask_ptr += _mask_offset(row, H, T, mask_stride_b, mask_stride_h, mask_stride_t)[:, None]
    z = _load_logits(x_ptr, mask_ptr, col, mask_stride_d, seen, SCALE, HAS_MASK, COMPUTE, "")
    dy = tl.load(dy_ptr + row[:, None] * dy_stride_n + col, mask=seen, other=0.0).to(COMPUTE)
    top = tl.load(top_total_ptr + 2 * row, mask=row < N, other=0.0)
    total = tl.load(top_total_ptr + 2 * row + 1, mask=row < N, other=1.0)

    y = exp_of(z - top[:, None]) * (1.0 / total)[:, None]
    dot = tl.sum(times(dy, y, _ONE_A_LANE), axis=1)
    dx = y * (dy - dot[:, None]) * SCALE

    tl.store(dx_ptr + row[:, None] * D + col, dx, mask=inside)


@triton.jit(do_not_specialize=["H", "T"])
def _softmax_bwd_wide_kernel(
    x_ptr, mask_ptr, top_total_ptr, dy_ptr, dx_ptr,
    x_stride_n, mask_stride_b, mask_stride_h, mask_stride_t, mask_stride_d, dy_stride_n, H, T, D,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_D: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK_D)
    width = (row % D).to(tl.int32) + 1 if CAUSAL else D
    x_ptr += row * x_stride_n
    dy_ptr += row * dy_stride_n
    if HAS_MASK:
        mask_ptr += _mask_offset(row, H, T, mask_stride_b, mask_stride_h, mask_stride_t)
    top = tl.load(top_total_ptr + 2 * row)
    over = 1.0 / tl.load(top_total_ptr + 2 * row + 1)
    last = (D - 1) // BLOCK_D * BLOCK_D
    # Where the blocks begin that registers hold.
    kept = last + BLOCK_D - HELD * BLOCK_D

    dots = tl.zeros((BLOCK_D,), COMPUTE)
    for start in range(0, tl.minimum(width, kept) if HELD else width, BLOCK_D):
        col = start + block
        z = _load_logits(
            x_ptr, mask_ptr, col, mask_stride_d, col < width,
            SCALE, HAS_MASK, COMPUTE, "evict_last",
        )  # fmt: skip
        dy = tl.load(dy_ptr + col, mask=col < width, other=0.0, eviction_policy="evict_last")
        dots += dy.to(COMPUTE) * exp_of(z - top)
    held = no_blocks()
    for i in tl.static_range(HELD):
        col = last - (HELD - 1 - i) * BLOCK_D + block
        x = tl.load(x_ptr + col, mask=col < width, other=float("-inf"))
        dy = tl.load(dy_ptr + col, mask=col < width, other=0.0)
        z = _logits(x, mask_ptr, col, mask_stride_d, col < width, SCALE, HAS_MASK, COMPUTE)
        dots += dy.to(COMPUTE) * exp_of(z - top)
        held += ((x, dy),)

    dot = tl.sum(dots, axis=0) * over
    zero = (over < 0.0).to(tl.int16)
    over *= SCALE

    for i in tl.static_range(HELD):
        col = last - i * BLOCK_D + block
        x, dy = held[HELD - 1 - i]
        x = _anew(x, zero)
        z = _logits(x, mask_ptr, col, mask_stride_d, col < width, SCALE, HAS_MASK, COMPUTE)
        dx = exp_of(z - top) * over * (_anew(dy, zero).to(COMPUTE) - dot)
        tl.store(dx_ptr + row * D + col, dx, mask=col < D, cache_modifier=".cs")
    for step in range(HELD * BLOCK_D, D, BLOCK_D):
        col = last - step + block
        z = _load_logits(
            x_ptr, mask_ptr, col, mask_stride_d, col < width,
            SCALE, HAS_MASK, COMPUTE, "evict_first",
        )  # fmt: skip
        dy = tl.load(dy_ptr + col, mask=col < width, other=0.0, eviction_policy="evict_first")
        dx = exp_of(z - top) * over * (dy.to(COMPUTE) - dot)
        tl.store(dx_ptr + row * D + col, dx, mask=col < D, cache_modifier=".cs")


def _softmax_bwd_config(D: int, holds: bool, hopper: bool = True) -> dict:
    """As many numbers a thread as in the forward pass, or half: two tensors are in registers.

    So are two tensors of wider rows in the cache. Where nothing is held for want of registers,
    there are none for a block of 32768 either. Of a row of 65536 half is held, on Hopper and later
    chips; what is compiled for others has fewer registers left.
    """
    if D > 65536 or (D > 32768 and not holds):
        return {"BLOCK_D": 32768 if holds else 16384, "HELD": 0, "num_warps": 32}
    if D > 32768:
        return {"BLOCK_D": 8192, "HELD": 4 if hopper else 3, "num_warps": 32}
    if D > 16384 and holds:
        return {"BLOCK_D": 8192, "HELD": 1, "num_warps": 16, "maxnreg": 64}
    if D > 16384:
        return {"BLOCK_D": 16384, "HELD": 0, "num_warps": 16}
    block_d = next_power_of_2(D)
    block_n = min(32, max(1, (1024 if block_d <= 256 else 2048) // block_d))
    return {"BLOCK_D": block_d, "BLOCK_N": block_n, "num_warps": max(4, block_d // 512)}


@functools.lru_cache(MOST)
def _softmax_bwd_with(
    D: int, scale: float, has_mask: bool, causal: bool, dtype: torch.dtype, hopper: bool
) -> Bound:
    config = _softmax_bwd_config(D, _holds(D, dtype, has_mask or causal), hopper)
    config = _with_blocks_of_a_row(config, D)
    return Bound(
        _softmax_bwd_kernel if "BLOCK_N" in config else _softmax_bwd_wide_kernel,
        SCALE=scale, HAS_MASK=has_mask, CAUSAL=causal,
        COMPUTE=triton_dtype(accumulator(dtype)), **config,
    )  # fmt: skip


def softmax_bwd(
    x: Tensor,
    mask: Tensor | None,
    top_total: Tensor,
    dy: Tensor,
    scale: float,
) -> tuple[Tensor]:
    return _backward(x, mask, top_total, dy, scale, causal=False)


def causal_softmax_bwd(x: Tensor, top_total: Tensor, dy: Tensor) -> tuple[Tensor]:
    """The same of square x; dy past the diagonal is not read."""
    return _backward(x, None, top_total, dy, 1.0, causal=True)


def _backward(
    x: Tensor,
    mask: Tensor | None,
    top_total: Tensor,
    dy: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor]:
    dx = dense_like(x)

    if has_work(dx):
        D = x.shape[-1]
        N = x.numel() // D
        (x, x_stride_n), (dy, dy_stride_n) = rows_of(x), rows_of(dy)
        top_total = unit_stride(top_total)
        mask, (H, T), mask_strides = _rows_of_mask(mask)
        strides = x_stride_n, *mask_strides, dy_stride_n
        hopper = shared_memory(x.device) >= HOPPERS_SHARED_MEMORY
        kernel = _softmax_bwd_with(D, scale, mask is not None, causal, x.dtype, hopper)
        _launch(kernel, N, x, mask, top_total, dy, dx, *strides, H, T, D)
    return (dx,)


_softmax = custom_vjp(
    "softmax",
    reference=reference,
    fwd=softmax_fwd,
    bwd=softmax_bwd,
    results="y",
    residuals="top_total",
    grads="x",
    rows="x mask y top_total",
)


def softmax(x: Tensor, *, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """Turn the last dimension into probabilities.

        y = exp(scale · x) / Σ exp(scale · x), over the elements that the mask allows

    Args:
        x: (..., D), floating point, any strides.
        mask: bool, of the shape of x or one that broadcasts to it, any strides: True allows an
            element, False gives it probability 0, as in torch's scaled_dot_product_attention. It is
            read as it lies: what the heads share is not copied for them.
        scale: multiplies x in float32; 1/temperature, or 1/√C for the scores of attention. Each
            value is compiled once.

    Returns:
        (..., D), dtype of x, contiguous. A row of −∞, or with NaN or +∞ in it, is NaN as in
        torch.softmax; with a mask a row of which nothing is left, masked or −∞, is 0, as in
        scaled_dot_product_attention, and so is its gradient.

    Raises:
        TypeError: x is not a floating-point tensor, mask not a bool tensor, scale no number.
        ValueError: mask does not broadcast to the shape of x, or lies on another device.

    Precision: computed in float32 (float64 for float64 x); every output is rounded once.
    Memory: x, mask and 8 bytes a row live until the backward pass; y does not.
    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
    """
    check.floating("softmax", "x", x)
    check.at_least_1d("softmax", "x", x)
    check.number("softmax", "scale", scale, "be a number", True)
    if mask is not None:
        _check_mask(x, mask)
        mask = mask.expand(x.shape)
    return _softmax(x, mask, scale)


def _check_mask(x: Tensor, mask: Tensor) -> None:
    check.tensor("softmax", "mask", mask)
    if mask.dtype is not torch.bool:
        check.fail("softmax", "mask", "have dtype torch.bool", mask.dtype, TypeError)
    check.device("softmax", "mask", mask, x, "x")
    sizes = zip(mask.shape, x.shape[x.dim() - mask.dim() :], strict=False)
    if mask.dim() > x.dim() or not all(m == 1 or m == n for m, n in sizes):
        contract = f"have a shape that broadcasts to {check.spell(x.shape)}, the shape of `x`"
        check.fail("softmax", "mask", contract, check.spell(mask.shape))
