"""Softmax over the last dimension, of scaled and masked inputs.

    z = scale · x, −∞ where the mask is False          e = exp(z − top)          top = max z
    y = e / total                                      total = Σ e

    dx = scale · y · (dy − Σ dy · y)

Memory traffic in bytes per element of a 2-byte x: 4 forward (read x, write y), 6 backward (read x
and dy, write dx), and the mask, which neighbouring rows often share and find in the cache. `top`
and `total`, 8 bytes a row, are kept, and y is computed again from them: it is then as exact as in
the forward pass, where a rounded y, or one sum top + log(total), would lose digits.

A row that fits into a program's registers is read once. A wider one of 2-byte elements is held as
words of two, half the registers, while the program's next row is on its way to shared memory. What
is wider still, or cannot be held, is read twice, the second time backwards: what was read last is
still in the first- and second-level cache.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.direct import MOST, Bound
from liger_fn.functional.core.exponential import exp_of
from liger_fn.functional.core.launch import (
    accumulator,
    cdiv,
    dense_like,
    has_work,
    next_power_of_2,
    per_row,
    rows_of,
    shared_memory,
    sm_count,
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
    z = x.to(COMPUTE) * SCALE
    if HAS_MASK:
        allowed = tl.load(mask_ptr + col.to(tl.int64) * mask_stride_d, mask=inside, other=0)
        inside &= allowed != 0
    if HAS_MASK or SCALE <= 0.0:
        z = tl.where(inside, z, float("-inf"))
    return z


@triton.jit
def _columns_of(BLOCK_D: tl.constexpr, NEAR: tl.constexpr = 8):
    """The columns of a block, eight in a row: what a thread loads at once when they are 2 bytes."""
    SIDE: tl.constexpr = NEAR if BLOCK_D >= NEAR else BLOCK_D
    return tl.arange(0, BLOCK_D // SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]


@triton.jit
def _eights_before(end, HELD: tl.constexpr):
    """Give which eights of the held columns are before `end`, a multiple of eight."""
    return tl.arange(0, HELD // 8)[:, None] * 8 < end


@triton.jit
def _load_pairs(row_ptr, end, HELD: tl.constexpr, BLANK: tl.constexpr):
    """Load the first HELD elements of a row, two in a word; from `end` on they are BLANK.

    Words, for an element of 2 bytes takes a register of 4 as soon as it is one by itself.
    """
    words = row_ptr.to(tl.pointer_type(tl.int32)) + _columns_of(HELD // 2, 4)
    before = _eights_before(end, HELD)
    return tl.where(before, tl.load(words, mask=before), BLANK)


@triton.jit
def _split(words, KIND: tl.constexpr):
    """Give the first elements of words and the second ones, in float32."""
    if KIND == tl.bfloat16:  # noqa: SIM300
        first = (words << 16).to(tl.float32, bitcast=True)
        second = (words & -65536).to(tl.float32, bitcast=True)
    else:
        first = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        second = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return first, second


@triton.jit
def _split_again(words, never, KIND: tl.constexpr):
    """The same. The compiler cannot know that `never` is False, and must split anew.

    Else it would keep what was split before, for which there are no registers.
    """
    return _split(words ^ tl.where(never, -1, 0), KIND)


@triton.jit
def _store_pairs(row_ptr, first, second, end, HELD: tl.constexpr):
    col = _columns_of(HELD)
    both = tl.join(first, second).reshape(col.shape)
    tl.store(row_ptr + col, both, mask=_eights_before(end, HELD), cache_modifier=".cs")


@triton.jit(do_not_specialize=["N", "H", "T"])
def _softmax_fwd_kernel(
    x_ptr, mask_ptr, y_ptr, top_ptr, total_ptr,
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
    tl.store(top_ptr + row, top, mask=row < N)
    tl.store(total_ptr + row, total, mask=row < N)


@triton.jit(do_not_specialize=["N", "H", "T"])
def _softmax_fwd_wide_kernel(
    x_ptr, mask_ptr, y_ptr, top_ptr, total_ptr,
    x_stride_n, mask_stride_b, mask_stride_h, mask_stride_t, mask_stride_d, H, T, D, N,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, LOWEST: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_D: tl.constexpr,
    HELD: tl.constexpr, FULL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    KIND: tl.constexpr = x_ptr.dtype.element_ty
    MINUS_INFINITIES: tl.constexpr = -8323200 if KIND == tl.bfloat16 else -67044352  # noqa: SIM300
    programs = tl.num_programs(0)
    block = _columns_of(BLOCK_D)
    # A constant where it can be: the compiler then drops the comparisons.
    end = HELD if FULL else D
    for step in tl.range(0, tl.cdiv(N - tl.program_id(0), programs), num_stages=2):
        row = (tl.program_id(0) + step * programs).to(tl.int64)
        x_row, y_row, mask_row = x_ptr + row * x_stride_n, y_ptr + row * D, mask_ptr
        if HAS_MASK:
            mask_row += _mask_offset(row, H, T, mask_stride_b, mask_stride_h, mask_stride_t)
        if HELD:
            words = _load_pairs(x_row, end, HELD, MINUS_INFINITIES)
            # This takes the words out of shared memory. Triton has the next row copied there
            # between that and what is under a condition: this one, always true, is there for it.
            first, second = _split(words, KIND)

        if row < N:
            width = (row % D).to(tl.int32) + 1 if CAUSAL else D
            top = tl.full((), LOWEST, COMPUTE)
            total = tl.zeros((), COMPUTE)
            if HELD:
                top = tl.maximum(top, tl.max(tl.max(tl.maximum(first, second), 1), 0) * SCALE)
                first, second = _split_again(words, D < 0, KIND)
                pairs = exp_of(first * SCALE - top) + exp_of(second * SCALE - top)
                total = tl.sum(tl.sum(pairs, 1), 0)

            if not WHOLE:
                # Eight neighbours share a maximum and a sum relative to it: one exponential an
                # element and few instructions more, and no thread waits for another before the
                # end of the row.
                tops = tl.zeros((block.shape[0],), COMPUTE) + top
                sums = tl.zeros((block.shape[0],), COMPUTE)
                for start in range(HELD, width, BLOCK_D):
                    col = start + block
                    z = _load_logits(
                        x_row, mask_row, col, mask_stride_d, col < width,
                        SCALE, HAS_MASK, COMPUTE, "evict_last",
                    )  # fmt: skip
                    higher = tl.maximum(tops, tl.max(z, axis=1))
                    e = exp_of(z - higher[:, None])
                    sums = sums * exp_of(tops - higher) + tl.sum(e, axis=1)
                    tops = higher
                total *= exp_of(top - tl.max(tops, axis=0))
                top = tl.max(tops, axis=0)
                total += tl.sum(sums * exp_of(tops - top), axis=0)
            if HAS_MASK or CAUSAL:
                total = tl.where(total == 0.0, 1.0, total)
            tl.store(top_ptr + row, top)
            tl.store(total_ptr + row, total)

            # First what is held, whose registers the rest can use. Streaming stores, so that y
            # drives no x out of the cache that is still to be read again.
            over = 1.0 / total
            if HELD:
                first, second = _split_again(words, total < 0.0, KIND)
                first = exp_of(first * SCALE - top) * over
                second = exp_of(second * SCALE - top) * over
                _store_pairs(y_row, first, second, end, HELD)
            if not WHOLE:
                last = HELD + (D - 1 - HELD) // BLOCK_D * BLOCK_D
                for back in range(0, D - HELD, BLOCK_D):
                    col = last - back + block
                    z = _load_logits(
                        x_row, mask_row, col, mask_stride_d, col < width,
                        SCALE, HAS_MASK, COMPUTE, "evict_first",
                    )  # fmt: skip
                    y = exp_of(z - top) * over
                    tl.store(y_row + col, y, mask=col < D, cache_modifier=".cs")


# Columns of the widest row that is one tile.
_WIDEST_TILE = 16384
# Elements of rows, in the backward pass of both, that the programs of a multiprocessor hold.
_MOST_FORWARD, _MOST_BACKWARD = 65536, 32768


def _softmax_fwd_config(D: int, room: int = 0) -> dict:
    """A row in registers, 32 elements a thread: four 16-byte loads in flight, and several rows
    where one is too short for that.

    Beyond 16384 elements that leaves a multiprocessor nothing to do while its warps wait for each
    other. Given the room, a program holds up to 65536 elements of 2 bytes in 64 of 128 registers a
    thread, and sends for the next as many before it computes: 128 KB are in flight on a
    multiprocessor. Two programs, of 64 registers a thread, share one if they hold 32768.

    Without, it walks along the row and reads it twice. Three programs of up to 42 registers a
    thread share a multiprocessor, or two of 32, so long as the rows in flight stay in the
    second-level cache; they are 34 MB of 132 programs at 131072 elements.
    """
    if D > _WIDEST_TILE and (held := _held(D, _MOST_FORWARD, room // 2)):
        return {"HELD": held, "BLOCK_D": held // 4, "num_warps": min(16, held // 2048)}
    if D > 65536:
        return {"BLOCK_D": 32768, "num_warps": 32}
    if D > _WIDEST_TILE:
        return {"BLOCK_D": 16384, "num_warps": 16 if D <= 32768 else 32}
    block_d = next_power_of_2(D)
    block_n = min(32, max(1, 4096 // block_d))
    return {"BLOCK_D": block_d, "BLOCK_N": block_n, "num_warps": max(4, block_d // 1024)}


def _held(D: int, most: int, room: int) -> int:
    """Choose how many of D elements to hold, where there is room for so many: a power of 2, at
    least 16384. A row that would leave a quarter of it empty is better walked to its end.
    """
    held = next_power_of_2(D)
    if held * 3 // 4 >= D:
        held //= 2
    held = min(held, most)
    while held > room:
        held //= 2
    return held if held >= 16384 else 0


def _room_for_pairs(D: int, *rows: tuple[Tensor, int]) -> int:
    """Say how many bytes of shared memory hold rows in words of two elements; 0 if they cannot, or
    if Triton, which asks whether sizes are multiples of 16, would copy word by word.
    """
    for x, stride_n in rows:
        if x.element_size() != 2 or (D | stride_n) % 16 or x.data_ptr() % 16:
            return 0
    # What is left is for sums over the warps.
    return shared_memory(rows[0][0].device) - 1024


def _kernel_for(D: int, tile: Any, wide: Any, config: dict, **constants: Any) -> Bound:
    """Bind the kernel of several rows, or the one of a wide row."""
    if "BLOCK_N" in config:
        return Bound(tile, **constants, **config)
    held = config.get("HELD", 0)
    constants |= {"HELD": held, "FULL": held <= D, "WHOLE": held >= D}
    return Bound(wide, **{**constants, **config})


@functools.lru_cache(MOST)
def _softmax_fwd_with(
    D: int, scale: float, has_mask: bool, causal: bool, dtype: torch.dtype, room: int
) -> Bound:
    compute = accumulator(dtype)
    return _kernel_for(
        D, _softmax_fwd_kernel, _softmax_fwd_wide_kernel, _softmax_fwd_config(D, room),
        SCALE=scale, HAS_MASK=has_mask, CAUSAL=causal, LOWEST=torch.finfo(compute).min,
        COMPUTE=triton_dtype(compute),
    )  # fmt: skip


def _launch(kernel: Bound, N: int, device: torch.device, most: int, *args: Any) -> None:
    """Launch a program for its rows, or those that share the chip, with `most` elements held on a
    multiprocessor, for all.
    """
    held = kernel.constants.get("HELD")
    if held:
        programs = min(N, sm_count(device) * max(1, most // held))
    else:
        programs = cdiv(N, kernel.constants.get("BLOCK_N", 1))
    kernel((programs,), *args, N)


def softmax_fwd(x: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, mask, scale, causal=False)


def causal_softmax_fwd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of square x (..., D, D), of which row i sees columns 0 to i; no mask is read."""
    return _forward(x, None, 1.0, causal=True)


def _forward(
    x: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y = dense_like(x)
    top = per_row(x, accumulator(x.dtype))
    total = torch.empty_like(top)

    if has_work(y):
        N, D = top.numel(), x.shape[-1]
        x, x_stride_n = rows_of(x)
        mask, (H, T), mask_strides = _rows_of_mask(mask)
        plain = mask is None and not causal and scale > 0.0
        room = _room_for_pairs(D, (x, x_stride_n)) if plain and D > _WIDEST_TILE else 0
        kernel = _softmax_fwd_with(D, scale, mask is not None, causal, x.dtype, room)
        args = x, mask, y, top, total, x_stride_n, *mask_strides, H, T, D
        _launch(kernel, N, x.device, _MOST_FORWARD, *args)
    return y, top, total


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


@triton.jit(do_not_specialize=["N", "H", "T"])
def _softmax_bwd_kernel(
    x_ptr, mask_ptr, top_ptr, total_ptr, dy_ptr, dx_ptr,
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
    top = tl.load(top_ptr + row, mask=row < N, other=0.0)
    total = tl.load(total_ptr + row, mask=row < N, other=1.0)

    y = exp_of(z - top[:, None]) * (1.0 / total)[:, None]
    dot = tl.sum(dy * y, axis=1)
    dx = y * (dy - dot[:, None]) * SCALE

    tl.store(dx_ptr + row[:, None] * D + col, dx, mask=inside)


@triton.jit(do_not_specialize=["N", "H", "T"])
def _softmax_bwd_wide_kernel(
    x_ptr, mask_ptr, top_ptr, total_ptr, dy_ptr, dx_ptr,
    x_stride_n, mask_stride_b, mask_stride_h, mask_stride_t, mask_stride_d, dy_stride_n,
    H, T, D, N,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_D: tl.constexpr,
    HELD: tl.constexpr, FULL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    KIND: tl.constexpr = x_ptr.dtype.element_ty
    MINUS_INFINITIES: tl.constexpr = -8323200 if KIND == tl.bfloat16 else -67044352  # noqa: SIM300
    programs = tl.num_programs(0)
    block = _columns_of(BLOCK_D)
    # A constant where it can be: the compiler then drops the comparisons.
    end = HELD if FULL else D
    for step in tl.range(0, tl.cdiv(N - tl.program_id(0), programs), num_stages=2):
        row = (tl.program_id(0) + step * programs).to(tl.int64)
        x_row, dy_row, mask_row = x_ptr + row * x_stride_n, dy_ptr + row * dy_stride_n, mask_ptr
        if HAS_MASK:
            mask_row += _mask_offset(row, H, T, mask_stride_b, mask_stride_h, mask_stride_t)
        top = tl.load(top_ptr + row)
        total = tl.load(total_ptr + row)
        if HELD:
            x_words = _load_pairs(x_row, end, HELD, MINUS_INFINITIES)
            dy_words = _load_pairs(dy_row, end, HELD, 0)
            x0, x1 = _split(x_words, KIND)
            dy0, dy1 = _split(dy_words, KIND)

        if row < N:
            width = (row % D).to(tl.int32) + 1 if CAUSAL else D
            dot = tl.zeros((), COMPUTE)
            if HELD:
                pairs = dy0 * exp_of(x0 * SCALE - top) + dy1 * exp_of(x1 * SCALE - top)
                dot = tl.sum(tl.sum(pairs, 1), 0)
            if not WHOLE:
                dots = tl.zeros((block.shape[0],), COMPUTE)
                for start in range(HELD, width, BLOCK_D):
                    col = start + block
                    z = _load_logits(
                        x_row, mask_row, col, mask_stride_d, col < width,
                        SCALE, HAS_MASK, COMPUTE, "evict_last",
                    )  # fmt: skip
                    dy = tl.load(
                        dy_row + col, mask=col < width, other=0.0, eviction_policy="evict_last"
                    )
                    dots += tl.sum(dy.to(COMPUTE) * exp_of(z - top), axis=1)
                dot += tl.sum(dots, axis=0)

            over = 1.0 / total
            dot *= over
            over *= SCALE
            dx_row = dx_ptr + row * D
            if HELD:
                x0, x1 = _split_again(x_words, total < 0.0, KIND)
                dy0, dy1 = _split_again(dy_words, total < 0.0, KIND)
                dx0 = exp_of(x0 * SCALE - top) * over * (dy0 - dot)
                dx1 = exp_of(x1 * SCALE - top) * over * (dy1 - dot)
                _store_pairs(dx_row, dx0, dx1, end, HELD)
            if not WHOLE:
                last = HELD + (D - 1 - HELD) // BLOCK_D * BLOCK_D
                for back in range(0, D - HELD, BLOCK_D):
                    col = last - back + block
                    z = _load_logits(
                        x_row, mask_row, col, mask_stride_d, col < width,
                        SCALE, HAS_MASK, COMPUTE, "evict_first",
                    )  # fmt: skip
                    dy = tl.load(
                        dy_row + col, mask=col < width, other=0.0, eviction_policy="evict_first"
                    )
                    dx = exp_of(z - top) * over * (dy.to(COMPUTE) - dot)
                    tl.store(dx_row + col, dx, mask=col < D, cache_modifier=".cs")


def _softmax_bwd_config(D: int, plain: bool = True, room: int = 0) -> dict:
    """Half the tile of the forward pass, for two tensors are in registers at once.

    So are two tensors of wider rows in the cache, and of a row that is held. What is not plain,
    masked or causal, has not the registers for a block of 32768.
    """
    if D > _WIDEST_TILE and (held := _held(D, _MOST_BACKWARD, room // 4)):
        return {"HELD": held, "BLOCK_D": held // 2, "num_warps": held // 2048}
    if D > 32768:
        return {"BLOCK_D": 32768 if plain else 16384, "num_warps": 32}
    if D > _WIDEST_TILE:
        return {"BLOCK_D": 16384, "num_warps": 16}
    block_d = next_power_of_2(D)
    block_n = min(32, max(1, 2048 // block_d))
    return {"BLOCK_D": block_d, "BLOCK_N": block_n, "num_warps": max(4, block_d // 512)}


@functools.lru_cache(MOST)
def _softmax_bwd_with(
    D: int, scale: float, has_mask: bool, causal: bool, dtype: torch.dtype, room: int
) -> Bound:
    return _kernel_for(
        D, _softmax_bwd_kernel, _softmax_bwd_wide_kernel,
        _softmax_bwd_config(D, not (has_mask or causal), room),
        SCALE=scale, HAS_MASK=has_mask, CAUSAL=causal, COMPUTE=triton_dtype(accumulator(dtype)),
    )  # fmt: skip


def softmax_bwd(
    x: Tensor,
    mask: Tensor | None,
    top: Tensor,
    total: Tensor,
    dy: Tensor,
    scale: float,
) -> tuple[Tensor]:
    return _backward(x, mask, top, total, dy, scale, causal=False)


def causal_softmax_bwd(x: Tensor, top: Tensor, total: Tensor, dy: Tensor) -> tuple[Tensor]:
    """The same of square x; dy past the diagonal is not read."""
    return _backward(x, None, top, total, dy, 1.0, causal=True)


def _backward(
    x: Tensor,
    mask: Tensor | None,
    top: Tensor,
    total: Tensor,
    dy: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor]:
    dx = dense_like(x)

    if has_work(dx):
        N, D = top.numel(), x.shape[-1]
        (x, x_stride_n), (dy, dy_stride_n) = rows_of(x), rows_of(dy)
        top, total = unit_stride(top), unit_stride(total)
        mask, (H, T), mask_strides = _rows_of_mask(mask)
        strides = x_stride_n, *mask_strides, dy_stride_n
        plain = mask is None and not causal and scale > 0.0
        rows = (x, x_stride_n), (dy, dy_stride_n)
        room = _room_for_pairs(D, *rows) if plain and D > _WIDEST_TILE else 0
        kernel = _softmax_bwd_with(D, scale, mask is not None, causal, x.dtype, room)
        args = x, mask, top, total, dy, dx, *strides, H, T, D
        _launch(kernel, N, x.device, _MOST_BACKWARD, *args)
    return (dx,)


_softmax = custom_vjp(
    "softmax",
    reference=reference,
    fwd=softmax_fwd,
    bwd=softmax_bwd,
    results="y",
    residuals="top total",
    grads="x",
    rows="x mask y top total",
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
