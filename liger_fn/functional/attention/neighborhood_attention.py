"""Neighbourhood attention: each token attends to a window around it, along a line or in a plane.

    s_ij = scale · q_i · k_j, j in the window of i        top_i  = max_j s_ij
    p_ij = over_i exp(s_ij − top_i)                       over_i = 1 / Σ_j exp(s_ij − top_i)
    y_i  = Σ_j p_ij v_j

    ds_ij = p_ij (dy_i · v_j − delta_i)                   delta_i = dy_i · y_i
    dq_i  = scale Σ_j ds_ij k_j                           dk_j = scale Σ_i ds_ij q_i
    dv_j  = Σ_i p_ij dy_i

With dilation d the tokens of one residue modulo d are a sequence of their own, of which windows are
contiguous. A tile of its queries sees a rectangle of its keys, and a tile of its keys is seen by a
rectangle of its queries: programs walk along that rectangle alone, a block at a time, so that work
grows with T · window, and no score is ever in memory. In one dimension the rectangle is one row.
All sums have a fixed order.

Where windows are narrow, or sequences short, the rectangle is one block, and there is no walk: the
forward pass knows all scores of a query at once, and one kernel has all three gradients of a tile,
from one block of queries and one of keys. Pairs at the edge of two tiles are computed for both, and
each gradient is stored by one.

Such windows leave little to do for a byte, so that instructions decide. Kernels take powers of 2
(top has the factor log₂ e), which scales a score and takes the greatest off it at once. Tokens of
an image are counted in 32 bits, where it has no more elements than that.

Memory traffic in bytes per element of a 2-byte q, where caches hold what windows share: 8 forward
(read q, k, v, write y); 16 backward of narrow windows (read q, k, v, y, dy, write dq, dk, dv), of
others 22 (dq reads q, k, v, y, dy and writes dq; dk and dv read q, k, v, dy and write both; some of
that from the caches). Kept are q, k, v, y, top and over: of one sum, top − log over, large scores
would take the digits.

PyTorch's flex_attention takes such windows as a mask of blocks. Of it there is no forward mode, no
vmap, no second derivative and, on a CPU, no gradient.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.core.backend import interpreting
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.direct import launch
from liger_fn.functional.core.kernels import times
from liger_fn.functional.core.launch import (
    accumulator,
    cdiv,
    dense_like,
    has_work,
    next_power_of_2,
    tl,
    triton,
    triton_dtype,
)

OP = "neighborhood_attention"
Window = Literal["shifted", "cut", "causal"]
WINDOWS = ("shifted", "cut", "causal")
# Wider heads fill the registers with one tile of each tensor.
WIDEST = 256


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | tuple[int, ...],
    *,
    dilation: int | tuple[int, ...] = 1,
    window: Window = "shifted",
    scale: float | None = None,
) -> Tensor:
    return _on_grid(_reference, q, k, v, kernel_size, dilation, window, scale)


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_1: int,
    kernel_2: int,
    dilation_1: int,
    dilation_2: int,
    window: str,
    scale: float,
) -> Tensor:
    """Of (..., T₁, T₂, C), by gathering the keys and values of each window."""
    T1, T2 = q.shape[-3:-1]
    at_1, inside_1 = _neighbours(T1, kernel_1, dilation_1, window, q.device)
    at_2, inside_2 = _neighbours(T2, kernel_2, dilation_2, window, q.device)

    def gathered(x: Tensor) -> Tensor:
        x = x.to(accumulator(x.dtype))
        return x[..., at_1[:, None, :, None], at_2[None, :, None, :], :].flatten(-3, -2)

    inside = (inside_1[:, None, :, None] & inside_2[None, :, None, :]).flatten(-2)
    s = torch.einsum("...tuc,...tunc->...tun", q.to(accumulator(q.dtype)), gathered(k)) * scale
    p = torch.softmax(s.masked_fill(~inside, -torch.inf), -1)
    return torch.einsum("...tun,...tunc->...tuc", p, gathered(v)).to(q.dtype)


def _neighbours(
    T: int, kernel: int, dilation: int, window: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The keys (T, kernel) in the windows of T queries, and whether these are keys at all."""
    t = torch.arange(T, device=device)[:, None]
    residue, p = t % dilation, t // dilation
    # Of its own sequence.
    length = (T - residue + dilation - 1) // dilation
    start = p - _left(kernel, window)
    if window == "shifted":
        start = start.clamp(min=0).minimum(length - kernel)
    key = start + torch.arange(kernel, device=device)
    inside = (key >= 0) & (key < length)
    return key.clamp(min=0).minimum(length - 1) * dilation + residue, inside


def _left(kernel: int, window: str) -> int:
    """How many keys of a window are before the query's own."""
    return kernel - 1 if window == "causal" else kernel // 2


@triton.jit
def _product(a, b, acc):
    """acc + a · b, with no fewer digits than b has."""
    a = a.to(b.dtype)
    if b.dtype == tl.float64:
        # Of float64 not every chip has a product of tiles.
        acc += tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    elif b.dtype == tl.float32:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def _power(x):
    """2ˣ, which is one instruction; of float64, whose UNIT is another, eˣ."""
    if x.dtype == tl.float64:
        power = tl.exp(x)
    else:
        power = tl.exp2(x)
    return power


@triton.jit
def _tile_of_program(
    H, T1, T2, DILATION_1: tl.constexpr, DILATION_2: tl.constexpr,
    STEP_1: tl.constexpr, STEP_2: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Give a program's sample and head, the residues of its tokens, and the first of them.

    Heads lie side by side in a projection, so those of one tile are read at about the same time.
    """
    program = tl.program_id(0)
    head = program % H
    program //= H
    tiles_2 = tl.cdiv(tl.cdiv(T2, DILATION_2), STEP_2)
    first_2 = program % tiles_2 * STEP_2
    program //= tiles_2
    r1, first_1 = 0, 0
    if not LINE:
        tiles_1 = tl.cdiv(tl.cdiv(T1, DILATION_1), STEP_1)
        first_1 = program % tiles_1 * STEP_1
        program //= tiles_1
        r1 = program % DILATION_1
        program //= DILATION_1
    r2 = program % DILATION_2
    return (program // DILATION_2).to(tl.int64), head, r1, r2, first_1, first_2


@triton.jit
def _block(
    low_1, low_2, high_1, high_2,
    SIZE: tl.constexpr, SIZE_2: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Give where the tokens of a block are in their sequences, and whether below the bounds."""
    n = tl.arange(0, SIZE)
    p1, p2 = low_1 + n // SIZE_2, low_2 + n % SIZE_2
    inside = p2 < high_2
    if not LINE:
        inside &= p1 < high_1
    return p1, p2, inside


@triton.jit
def _is_owned(
    p1, p2, inside, first_1, first_2,
    STEP_1: tl.constexpr, STEP_2: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Say which tokens of a block are those that a program stores."""
    owned = inside & (p2 >= first_2) & (p2 < first_2 + STEP_2)
    if not LINE:
        owned &= (p1 >= first_1) & (p1 < first_1 + STEP_1)
    return owned


@triton.jit
def _tokens(
    p1, p2, r1, r2, T2, DILATION_1: tl.constexpr, DILATION_2: tl.constexpr,
    LINE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Give which tokens those at p1 and p2 of their sequences are."""
    token = p2.to(OFFSET) * DILATION_2 + r2
    if not LINE:
        token += (p1.to(OFFSET) * DILATION_1 + r1) * T2
    return token


@triton.jit
def _keys_of(p, L, KERNEL: tl.constexpr, LEFT: tl.constexpr, SHIFTED: tl.constexpr):
    """Give the first key in the window of query p of L, and how many there are."""
    if SHIFTED:
        begin = tl.minimum(tl.maximum(p - LEFT, 0), L - KERNEL)
        size = KERNEL
    else:
        begin = tl.maximum(p - LEFT, 0)
        size = tl.minimum(p - LEFT + KERNEL, L) - begin
    return begin, size


@triton.jit
def _queries_of(k, L, KERNEL: tl.constexpr, LEFT: tl.constexpr, SHIFTED: tl.constexpr):
    """Give the first query in whose window key k of L is, and how many there are."""
    begin, end = tl.maximum(k - KERNEL + 1 + LEFT, 0), tl.minimum(k + LEFT + 1, L)
    if SHIFTED:
        begin = tl.where(k < KERNEL, 0, begin)
        end = tl.where(k >= L - KERNEL, L, end)
    return begin, end - begin


@triton.jit
def _keys_of_tile(first, last, L, KERNEL: tl.constexpr, LEFT: tl.constexpr, SHIFTED: tl.constexpr):
    """Give the first key that queries from first to last see, and the one after the last."""
    low, _ = _keys_of(first, L, KERNEL, LEFT, SHIFTED)
    begin, size = _keys_of(last, L, KERNEL, LEFT, SHIFTED)
    return low, begin + size


@triton.jit
def _queries_of_tile(
    first, last, L, KERNEL: tl.constexpr, LEFT: tl.constexpr, SHIFTED: tl.constexpr
):
    """Give the first query that sees keys from first to last, and the one after the last."""
    low, _ = _queries_of(first, L, KERNEL, LEFT, SHIFTED)
    begin, size = _queries_of(last, L, KERNEL, LEFT, SHIFTED)
    return low, begin + size


@triton.jit
def _blocks(
    low_1, high_1, low_2, high_2,
    BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Give how many blocks the rectangle from low to high has, and how many across."""
    across = tl.cdiv(high_2 - low_2, BLOCK_2)
    blocks = across
    if not LINE:
        blocks = tl.cdiv(high_1 - low_1, BLOCK_1) * across
    return blocks, across


@triton.jit
def _first_of_block(
    block, across, low_1, low_2,
    BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Give where a block of the rectangle from low on begins."""
    from_1, from_2 = low_1, low_2 + block * BLOCK_2
    if not LINE:
        from_1 = low_1 + block // across * BLOCK_1
        from_2 = low_2 + block % across * BLOCK_2
    return from_1, from_2


@triton.jit
def _is_seen(
    low_1, low_2, begin_1, begin_2, size_1, size_2,
    SIZE: tl.constexpr, SIZE_2: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Say what of the block from low on, along the columns, is in the windows of the rows.

    What is before a window is a huge number without sign: one comparison tells both ends. No window
    goes beyond its sequence, so that columns that are none are in no window that matters.
    """
    n = tl.arange(0, SIZE)[None, :]
    seen = (low_2 - begin_2 + n % SIZE_2).to(tl.uint32, bitcast=True) < size_2
    if not LINE:
        seen &= (low_1 - begin_1 + n // SIZE_2).to(tl.uint32, bitcast=True) < size_1
    return seen


@triton.jit
def _image_of(x_ptr, sample, head, stride_b, stride_h):
    return x_ptr + sample * stride_b + head.to(tl.int64) * stride_h


@triton.jit
def _load(
    x_ptr, token, inside, stride_t,
    C: tl.constexpr, DTYPE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Load the rows of tokens."""
    c = tl.arange(0, BLOCK_C)[None, :]
    mask = inside[:, None]
    if C < BLOCK_C:
        mask = mask & (c < C)
    return tl.load(x_ptr + (token[:, None] * stride_t + c), mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _store(x_ptr, token, inside, stride_t, x, C: tl.constexpr, BLOCK_C: tl.constexpr):
    c = tl.arange(0, BLOCK_C)[None, :]
    mask = inside[:, None]
    if C < BLOCK_C:
        mask = mask & (c < C)
    tl.store(x_ptr + (token[:, None] * stride_t + c), x, mask=mask)


@triton.jit
def _products_of_rows(a, b, COMPUTE: tl.constexpr):
    """a · bᵀ"""
    return _product(a, tl.trans(b), tl.zeros((a.shape[0], b.shape[0]), COMPUTE))


@triton.jit
def _scores(q, k, seen, SCALE: tl.constexpr, COMPUTE: tl.constexpr):
    """q · kᵀ where it is seen, else −∞; times the scale, if that changes which is the greatest."""
    s = _products_of_rows(q, k, COMPUTE)
    if not SCALE > 0.0:
        s *= SCALE
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _probabilities(s, seen, top, FACTOR: tl.constexpr):
    """Give exp(s − top) from products, zero where it is not seen.

    To select the result leaves the scale and the difference to one instruction.
    """
    return tl.where(seen, _power(s * FACTOR - top), 0.0)


@triton.jit(do_not_specialize=["H", "T1", "T2"])
def _neighborhood_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, top_ptr, over_ptr,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t,
    v_stride_b, v_stride_h, v_stride_t, y_stride_b, y_stride_h, y_stride_t, H, T1, T2,
    C: tl.constexpr, SCALE: tl.constexpr, UNIT: tl.constexpr, SHIFTED: tl.constexpr,
    KERNEL_1: tl.constexpr, DILATION_1: tl.constexpr, LEFT_1: tl.constexpr,
    KERNEL_2: tl.constexpr, DILATION_2: tl.constexpr, LEFT_2: tl.constexpr,
    LINE: tl.constexpr, ONE: tl.constexpr, OFFSET: tl.constexpr,
    LOWEST: tl.constexpr, PRODUCT: tl.constexpr, COMPUTE: tl.constexpr,
    STEP_1: tl.constexpr, STEP_2: tl.constexpr, TILE_1: tl.constexpr, TILE_2: tl.constexpr,
    BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    FACTOR: tl.constexpr = SCALE * UNIT if SCALE > 0.0 else UNIT
    TILE: tl.constexpr = TILE_1 * TILE_2
    BLOCK_N: tl.constexpr = BLOCK_1 * BLOCK_2
    sample, head, r1, r2, first_1, first_2 = _tile_of_program(
        H, T1, T2, DILATION_1, DILATION_2, STEP_1, STEP_2, LINE
    )
    L1, L2 = tl.cdiv(T1 - r1, DILATION_1), tl.cdiv(T2 - r2, DILATION_2)
    end_1, end_2 = tl.minimum(first_1 + STEP_1, L1), tl.minimum(first_2 + STEP_2, L2)
    p1, p2, is_query = _block(first_1, first_2, end_1, end_2, TILE, TILE_2, LINE)
    query = _tokens(p1, p2, r1, r2, T2, DILATION_1, DILATION_2, LINE, OFFSET)
    begin_1, size_1 = _keys_of(p1[:, None], L1, KERNEL_1, LEFT_1, SHIFTED)
    begin_2, size_2 = _keys_of(p2[:, None], L2, KERNEL_2, LEFT_2, SHIFTED)
    low_1, high_1 = _keys_of_tile(first_1, end_1 - 1, L1, KERNEL_1, LEFT_1, SHIFTED)
    low_2, high_2 = _keys_of_tile(first_2, end_2 - 1, L2, KERNEL_2, LEFT_2, SHIFTED)
    q_ptr = _image_of(q_ptr, sample, head, q_stride_b, q_stride_h)
    k_ptr = _image_of(k_ptr, sample, head, k_stride_b, k_stride_h)
    v_ptr = _image_of(v_ptr, sample, head, v_stride_b, v_stride_h)
    q = _load(q_ptr, query, is_query, q_stride_t, C, PRODUCT, BLOCK_C)

    if ONE:
        k1, k2, is_key = _block(low_1, low_2, high_1, high_2, BLOCK_N, BLOCK_2, LINE)
        key = _tokens(k1, k2, r1, r2, T2, DILATION_1, DILATION_2, LINE, OFFSET)
        k = _load(k_ptr, key, is_key, k_stride_t, C, PRODUCT, BLOCK_C)
        v = _load(v_ptr, key, is_key, v_stride_t, C, PRODUCT, BLOCK_C)
        seen = _is_seen(low_1, low_2, begin_1, begin_2, size_1, size_2, BLOCK_N, BLOCK_2, LINE)
        s = _scores(q, k, seen, SCALE, COMPUTE)
        # Not below the lowest number: of −∞ alone, which is no query's, p is then 0.
        top = tl.maximum(tl.max(s, axis=1) * FACTOR, LOWEST)
        p = _power(s * FACTOR - top[:, None])
        total = tl.sum(p, axis=1)
        acc = _product(p, v, tl.zeros((TILE, BLOCK_C), COMPUTE))
    else:
        top = tl.full((TILE,), LOWEST, COMPUTE)
        total = tl.zeros((TILE,), COMPUTE)
        acc = tl.zeros((TILE, BLOCK_C), COMPUTE)
        blocks, across = _blocks(low_1, high_1, low_2, high_2, BLOCK_1, BLOCK_2, LINE)
        for block in range(blocks):
            from_1, from_2 = _first_of_block(block, across, low_1, low_2, BLOCK_1, BLOCK_2, LINE)
            k1, k2, is_key = _block(from_1, from_2, high_1, high_2, BLOCK_N, BLOCK_2, LINE)
            key = _tokens(k1, k2, r1, r2, T2, DILATION_1, DILATION_2, LINE, OFFSET)
            k = _load(k_ptr, key, is_key, k_stride_t, C, PRODUCT, BLOCK_C)
            seen = _is_seen(
                from_1, from_2, begin_1, begin_2, size_1, size_2, BLOCK_N, BLOCK_2, LINE
            )
            s = _scores(q, k, seen, SCALE, COMPUTE)

            higher = tl.maximum(top, tl.max(s, axis=1) * FACTOR)
            p = _power(s * FACTOR - higher[:, None])
            fade = _power(top - higher)
            total = total * fade + tl.sum(p, axis=1)
            v = _load(v_ptr, key, is_key, v_stride_t, C, PRODUCT, BLOCK_C)
            acc = _product(p, v, acc * fade[:, None])
            top = higher

    over = 1.0 / total
    y_ptr = _image_of(y_ptr, sample, head, y_stride_b, y_stride_h)
    _store(y_ptr, query, is_query, y_stride_t, acc * over[:, None], C, BLOCK_C)
    tokens = (sample * H + head) * T1 * T2
    tl.store(top_ptr + tokens + query, top, mask=is_query)
    tl.store(over_ptr + tokens + query, over, mask=is_query)


@triton.jit(do_not_specialize=["H", "T1", "T2"])
def _neighborhood_attention_bwd_near_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, top_ptr, over_ptr, dy_ptr, dq_ptr, dk_ptr, dv_ptr,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t,
    v_stride_b, v_stride_h, v_stride_t, y_stride_b, y_stride_h, y_stride_t,
    dy_stride_b, dy_stride_h, dy_stride_t, dq_stride_b, dq_stride_h, dq_stride_t,
    dk_stride_b, dk_stride_h, dk_stride_t, dv_stride_b, dv_stride_h, dv_stride_t, H, T1, T2,
    C: tl.constexpr, SCALE: tl.constexpr, UNIT: tl.constexpr, SHIFTED: tl.constexpr,
    KERNEL_1: tl.constexpr, DILATION_1: tl.constexpr, LEFT_1: tl.constexpr,
    KERNEL_2: tl.constexpr, DILATION_2: tl.constexpr, LEFT_2: tl.constexpr,
    LINE: tl.constexpr, OFFSET: tl.constexpr,
    NEED_DQ: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr,
    PRODUCT: tl.constexpr, COMPUTE: tl.constexpr,
    STEP_1: tl.constexpr, STEP_2: tl.constexpr, TILE_1: tl.constexpr, TILE_2: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All three gradients of a few tokens, from all queries and keys that have to do with them."""
    FACTOR: tl.constexpr = SCALE * UNIT
    TILE: tl.constexpr = TILE_1 * TILE_2
    sample, head, r1, r2, first_1, first_2 = _tile_of_program(
        H, T1, T2, DILATION_1, DILATION_2, STEP_1, STEP_2, LINE
    )
    L1, L2 = tl.cdiv(T1 - r1, DILATION_1), tl.cdiv(T2 - r2, DILATION_2)
    last_1, last_2 = tl.minimum(first_1 + STEP_1, L1) - 1, tl.minimum(first_2 + STEP_2, L2) - 1
    from_1, high_1 = _keys_of_tile(first_1, last_1, L1, KERNEL_1, LEFT_1, SHIFTED)
    from_2, high_2 = _keys_of_tile(first_2, last_2, L2, KERNEL_2, LEFT_2, SHIFTED)
    k1, k2, is_key = _block(from_1, from_2, high_1, high_2, TILE, TILE_2, LINE)
    key = _tokens(k1, k2, r1, r2, T2, DILATION_1, DILATION_2, LINE, OFFSET)
    low_1, high_1 = _queries_of_tile(first_1, last_1, L1, KERNEL_1, LEFT_1, SHIFTED)
    low_2, high_2 = _queries_of_tile(first_2, last_2, L2, KERNEL_2, LEFT_2, SHIFTED)
    p1, p2, is_query = _block(low_1, low_2, high_1, high_2, TILE, TILE_2, LINE)
    query = _tokens(p1, p2, r1, r2, T2, DILATION_1, DILATION_2, LINE, OFFSET)
    q_ptr = _image_of(q_ptr, sample, head, q_stride_b, q_stride_h)
    k_ptr = _image_of(k_ptr, sample, head, k_stride_b, k_stride_h)
    v_ptr = _image_of(v_ptr, sample, head, v_stride_b, v_stride_h)
    y_ptr = _image_of(y_ptr, sample, head, y_stride_b, y_stride_h)
    dy_ptr = _image_of(dy_ptr, sample, head, dy_stride_b, dy_stride_h)
    tokens = (sample * H + head) * T1 * T2
    q = _load(q_ptr, query, is_query, q_stride_t, C, PRODUCT, BLOCK_C)
    k = _load(k_ptr, key, is_key, k_stride_t, C, PRODUCT, BLOCK_C)
    dy = _load(dy_ptr, query, is_query, dy_stride_t, C, PRODUCT, BLOCK_C)
    top = tl.load(top_ptr + tokens + query, mask=is_query, other=0.0)
    over = tl.load(over_ptr + tokens + query, mask=is_query, other=0.0)
    NEED_DS: tl.constexpr = NEED_DQ or NEED_DK
    if NEED_DS:
        v = _load(v_ptr, key, is_key, v_stride_t, C, PRODUCT, BLOCK_C)
        y = _load(y_ptr, query, is_query, y_stride_t, C, COMPUTE, BLOCK_C)
        delta = tl.sum(times(dy.to(COMPUTE), y), axis=1)

    begin_1, size_1 = _keys_of(p1[:, None], L1, KERNEL_1, LEFT_1, SHIFTED)
    begin_2, size_2 = _keys_of(p2[:, None], L2, KERNEL_2, LEFT_2, SHIFTED)
    seen = _is_seen(from_1, from_2, begin_1, begin_2, size_1, size_2, TILE, TILE_2, LINE)
    s = _products_of_rows(q, k, COMPUTE)
    p = _probabilities(s, seen, top[:, None], FACTOR) * over[:, None]
    nothing = tl.zeros((TILE, BLOCK_C), COMPUTE)
    if NEED_DS:
        dp = _products_of_rows(dy, v, COMPUTE)
        ds = (p * (dp - delta[:, None])).to(PRODUCT)

    is_mine = _is_owned(k1, k2, is_key, first_1, first_2, STEP_1, STEP_2, LINE)
    if NEED_DV:
        dv = _product(tl.trans(p.to(PRODUCT)), dy, nothing)
        dv_ptr = _image_of(dv_ptr, sample, head, dv_stride_b, dv_stride_h)
        _store(dv_ptr, key, is_mine, dv_stride_t, dv, C, BLOCK_C)
    if NEED_DK:
        dk = _product(tl.trans(ds), q, nothing)
        dk_ptr = _image_of(dk_ptr, sample, head, dk_stride_b, dk_stride_h)
        _store(dk_ptr, key, is_mine, dk_stride_t, dk * SCALE, C, BLOCK_C)
    if NEED_DQ:
        dq = _product(ds, k, nothing)
        is_mine = _is_owned(p1, p2, is_query, first_1, first_2, STEP_1, STEP_2, LINE)
        dq_ptr = _image_of(dq_ptr, sample, head, dq_stride_b, dq_stride_h)
        _store(dq_ptr, query, is_mine, dq_stride_t, dq * SCALE, C, BLOCK_C)


@triton.jit(do_not_specialize=["H", "T1", "T2"])
def _neighborhood_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, top_ptr, over_ptr, dy_ptr, dq_ptr, delta_ptr,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t,
    v_stride_b, v_stride_h, v_stride_t, y_stride_b, y_stride_h, y_stride_t,
    dy_stride_b, dy_stride_h, dy_stride_t, dq_stride_b, dq_stride_h, dq_stride_t, H, T1, T2,
    C: tl.constexpr, SCALE: tl.constexpr, UNIT: tl.constexpr, SHIFTED: tl.constexpr,
    KERNEL_1: tl.constexpr, DILATION_1: tl.constexpr, LEFT_1: tl.constexpr,
    KERNEL_2: tl.constexpr, DILATION_2: tl.constexpr, LEFT_2: tl.constexpr,
    LINE: tl.constexpr, OFFSET: tl.constexpr,
    NEED_DQ: tl.constexpr, PRODUCT: tl.constexpr, COMPUTE: tl.constexpr,
    TILE_1: tl.constexpr, TILE_2: tl.constexpr,
    BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write delta, and dq where it is wanted."""
    FACTOR: tl.constexpr = SCALE * UNIT
    TILE: tl.constexpr = TILE_1 * TILE_2
    BLOCK_N: tl.constexpr = BLOCK_1 * BLOCK_2
    sample, head, r1, r2, first_1, first_2 = _tile_of_program(
        H, T1, T2, DILATION_1, DILATION_2, TILE_1, TILE_2, LINE
    )
    L1, L2 = tl.cdiv(T1 - r1, DILATION_1), tl.cdiv(T2 - r2, DILATION_2)
    p1, p2, is_query = _block(first_1, first_2, L1, L2, TILE, TILE_2, LINE)
    query = _tokens(p1, p2, r1, r2, T2, DILATION_1, DILATION_2, LINE, OFFSET)
    tokens = (sample * H + head) * T1 * T2
    dy_ptr = _image_of(dy_ptr, sample, head, dy_stride_b, dy_stride_h)
    y_ptr = _image_of(y_ptr, sample, head, y_stride_b, y_stride_h)
    dy = _load(dy_ptr, query, is_query, dy_stride_t, C, PRODUCT, BLOCK_C)
    y = _load(y_ptr, query, is_query, y_stride_t, C, COMPUTE, BLOCK_C)

    delta = tl.sum(times(dy.to(COMPUTE), y), axis=1)
    tl.store(delta_ptr + tokens + query, delta, mask=is_query)

    if NEED_DQ:
        begin_1, size_1 = _keys_of(p1[:, None], L1, KERNEL_1, LEFT_1, SHIFTED)
        begin_2, size_2 = _keys_of(p2[:, None], L2, KERNEL_2, LEFT_2, SHIFTED)
        last_1, last_2 = tl.minimum(first_1 + TILE_1, L1) - 1, tl.minimum(first_2 + TILE_2, L2) - 1
        low_1, high_1 = _keys_of_tile(first_1, last_1, L1, KERNEL_1, LEFT_1, SHIFTED)
        low_2, high_2 = _keys_of_tile(first_2, last_2, L2, KERNEL_2, LEFT_2, SHIFTED)
        q_ptr = _image_of(q_ptr, sample, head, q_stride_b, q_stride_h)
        k_ptr = _image_of(k_ptr, sample, head, k_stride_b, k_stride_h)
        v_ptr = _image_of(v_ptr, sample, head, v_stride_b, v_stride_h)
        q = _load(q_ptr, query, is_query, q_stride_t, C, PRODUCT, BLOCK_C)
        top = tl.load(top_ptr + tokens + query, mask=is_query, other=0.0)
        over = tl.load(over_ptr + tokens + query, mask=is_query, other=0.0)

        # Of a query all probabilities have the factor `over`: it can wait for their sum, unless
        # what is summed might then be out of range.
        LATE: tl.constexpr = q.dtype != tl.float16
        dq = tl.zeros((TILE, BLOCK_C), COMPUTE)
        blocks, across = _blocks(low_1, high_1, low_2, high_2, BLOCK_1, BLOCK_2, LINE)
        for block in range(blocks):
            from_1, from_2 = _first_of_block(block, across, low_1, low_2, BLOCK_1, BLOCK_2, LINE)
            k1, k2, is_key = _block(from_1, from_2, high_1, high_2, BLOCK_N, BLOCK_2, LINE)
            key = _tokens(k1, k2, r1, r2, T2, DILATION_1, DILATION_2, LINE, OFFSET)
            k = _load(k_ptr, key, is_key, k_stride_t, C, PRODUCT, BLOCK_C)
            v = _load(v_ptr, key, is_key, v_stride_t, C, PRODUCT, BLOCK_C)
            seen = _is_seen(
                from_1, from_2, begin_1, begin_2, size_1, size_2, BLOCK_N, BLOCK_2, LINE
            )
            s = _products_of_rows(q, k, COMPUTE)
            p = _probabilities(s, seen, top[:, None], FACTOR)
            if not LATE:
                p *= over[:, None]
            dp = _products_of_rows(dy, v, COMPUTE)
            dq = _product(p * (dp - delta[:, None]), k, dq)

        dq_ptr = _image_of(dq_ptr, sample, head, dq_stride_b, dq_stride_h)
        if LATE:
            dq *= over[:, None]
        _store(dq_ptr, query, is_query, dq_stride_t, dq * SCALE, C, BLOCK_C)


@triton.jit(do_not_specialize=["H", "T1", "T2"])
def _neighborhood_attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, top_ptr, over_ptr, delta_ptr, dy_ptr, dk_ptr, dv_ptr,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t,
    v_stride_b, v_stride_h, v_stride_t, dy_stride_b, dy_stride_h, dy_stride_t,
    dk_stride_b, dk_stride_h, dk_stride_t, dv_stride_b, dv_stride_h, dv_stride_t, H, T1, T2,
    C: tl.constexpr, SCALE: tl.constexpr, UNIT: tl.constexpr, SHIFTED: tl.constexpr,
    KERNEL_1: tl.constexpr, DILATION_1: tl.constexpr, LEFT_1: tl.constexpr,
    KERNEL_2: tl.constexpr, DILATION_2: tl.constexpr, LEFT_2: tl.constexpr,
    LINE: tl.constexpr, OFFSET: tl.constexpr,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, PRODUCT: tl.constexpr, COMPUTE: tl.constexpr,
    TILE_1: tl.constexpr, TILE_2: tl.constexpr,
    BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    FACTOR: tl.constexpr = SCALE * UNIT
    TILE: tl.constexpr = TILE_1 * TILE_2
    BLOCK_N: tl.constexpr = BLOCK_1 * BLOCK_2
    sample, head, r1, r2, first_1, first_2 = _tile_of_program(
        H, T1, T2, DILATION_1, DILATION_2, TILE_1, TILE_2, LINE
    )
    L1, L2 = tl.cdiv(T1 - r1, DILATION_1), tl.cdiv(T2 - r2, DILATION_2)
    k1, k2, is_key = _block(first_1, first_2, L1, L2, TILE, TILE_2, LINE)
    key = _tokens(k1, k2, r1, r2, T2, DILATION_1, DILATION_2, LINE, OFFSET)
    last_1, last_2 = tl.minimum(first_1 + TILE_1, L1) - 1, tl.minimum(first_2 + TILE_2, L2) - 1
    low_1, high_1 = _queries_of_tile(first_1, last_1, L1, KERNEL_1, LEFT_1, SHIFTED)
    low_2, high_2 = _queries_of_tile(first_2, last_2, L2, KERNEL_2, LEFT_2, SHIFTED)
    q_ptr = _image_of(q_ptr, sample, head, q_stride_b, q_stride_h)
    k_ptr = _image_of(k_ptr, sample, head, k_stride_b, k_stride_h)
    v_ptr = _image_of(v_ptr, sample, head, v_stride_b, v_stride_h)
    dy_ptr = _image_of(dy_ptr, sample, head, dy_stride_b, dy_stride_h)
    tokens = (sample * H + head) * T1 * T2
    k = _load(k_ptr, key, is_key, k_stride_t, C, PRODUCT, BLOCK_C)
    v = _load(v_ptr, key, is_key, v_stride_t, C, PRODUCT, BLOCK_C)

    # Keys along the rows, queries along the columns.
    begin_1, size_1 = _queries_of(k1[:, None], L1, KERNEL_1, LEFT_1, SHIFTED)
    begin_2, size_2 = _queries_of(k2[:, None], L2, KERNEL_2, LEFT_2, SHIFTED)
    dk = tl.zeros((TILE, BLOCK_C), COMPUTE)
    dv = tl.zeros((TILE, BLOCK_C), COMPUTE)
    blocks, across = _blocks(low_1, high_1, low_2, high_2, BLOCK_1, BLOCK_2, LINE)
    for block in range(blocks):
        from_1, from_2 = _first_of_block(block, across, low_1, low_2, BLOCK_1, BLOCK_2, LINE)
        p1, p2, is_query = _block(from_1, from_2, high_1, high_2, BLOCK_N, BLOCK_2, LINE)
        query = _tokens(p1, p2, r1, r2, T2, DILATION_1, DILATION_2, LINE, OFFSET)
        q = _load(q_ptr, query, is_query, q_stride_t, C, PRODUCT, BLOCK_C)
        dy = _load(dy_ptr, query, is_query, dy_stride_t, C, PRODUCT, BLOCK_C)
        top = tl.load(top_ptr + tokens + query, mask=is_query, other=0.0)
        over = tl.load(over_ptr + tokens + query, mask=is_query, other=0.0)
        seen = _is_seen(from_1, from_2, begin_1, begin_2, size_1, size_2, BLOCK_N, BLOCK_2, LINE)
        s = _products_of_rows(k, q, COMPUTE)
        p = _probabilities(s, seen, top[None, :], FACTOR) * over[None, :]
        if NEED_DV:
            dv = _product(p, dy, dv)
        if NEED_DK:
            delta = tl.load(delta_ptr + tokens + query, mask=is_query, other=0.0)
            dp = _products_of_rows(v, dy, COMPUTE)
            dk = _product(p * (dp - delta[None, :]), q, dk)

    if NEED_DK:
        dk_ptr = _image_of(dk_ptr, sample, head, dk_stride_b, dk_stride_h)
        _store(dk_ptr, key, is_key, dk_stride_t, dk * SCALE, C, BLOCK_C)
    if NEED_DV:
        dv_ptr = _image_of(dv_ptr, sample, head, dv_stride_b, dv_stride_h)
        _store(dv_ptr, key, is_key, dv_stride_t, dv, C, BLOCK_C)


def _square(n: int, planar: bool) -> tuple[int, int]:
    """n tokens along a line, or of a square, or nearly: it has the fewest neighbours."""
    n_1 = 1 << ((n.bit_length() - 1) // 2) if planar else 1
    return n_1, n // n_1


def _tile(C: int, itemsize: int) -> int:
    """How many rows of C features registers have room for, beside what they are multiplied by."""
    return min({2: 64, 4: 32, 8: 16}[itemsize], 64 if C <= 128 else 32)


def _config(tile: int, block: int, C: int, planar: bool, num_stages: int = 2) -> dict:
    """4 warps: of 64 rows each has the 16 of an instruction, and 8 would do them twice."""
    (tile_1, tile_2), (block_1, block_2) = _square(tile, planar), _square(block, planar)
    return {
        "TILE_1": tile_1, "TILE_2": tile_2, "BLOCK_1": block_1, "BLOCK_2": block_2,
        "BLOCK_C": max(16, next_power_of_2(C)), "num_warps": 4, "num_stages": num_stages,
    }  # fmt: skip


def _neighborhood_attention_fwd_config(C: int, planar: bool, itemsize: int) -> dict:
    """A tile of queries against as many keys at a time: its sides are then those of the products.

    On a line the walk is of a few blocks, which are all asked for at once; in a plane it is longer,
    and more programs at a time serve it better.
    """
    tile = _tile(C, itemsize)
    return _config(tile, tile, C, planar, num_stages=2 if planar or C > 64 else 3)


def _neighborhood_attention_near_config(C: int, planar: bool, itemsize: int) -> dict:
    """A tile of which registers hold all that is read at once: of five rows a token, not of two."""
    tile = _tile(C, itemsize) if C <= 64 else min(_tile(C, itemsize), 32)
    config = _config(tile, tile, C, planar)
    return {name: value for name, value in config.items() if name not in ("BLOCK_1", "BLOCK_2")}


def _neighborhood_attention_dq_config(C: int, planar: bool, itemsize: int) -> dict:
    """As forward; of wide heads, and of wider inputs, half as many keys: there are two products."""
    tile = _tile(C, itemsize)
    return _config(tile, tile if C <= 64 and itemsize == 2 else max(16, tile // 2), C, planar)


def _neighborhood_attention_dkv_config(C: int, planar: bool, itemsize: int) -> dict:
    """As dq, but half as many queries from 64 features on: there are two sums."""
    tile = _tile(C, itemsize)
    return _config(tile, tile if C <= 32 and itemsize == 2 else max(16, tile // 2), C, planar)


def _fwd_steps(
    lengths: tuple[int, int], kernel: tuple[int, int], config: dict
) -> tuple[int, int] | None:
    """How many queries a program has if all keys that they see are to be one block of `config`.

    None, if these are less than half of its tile.
    """
    steps = []
    for L, size, n in zip(lengths, kernel, "12", strict=True):
        tile, block = config[f"TILE_{n}"], config[f"BLOCK_{n}"]
        steps.append(tile if block >= L else max(0, min(tile, block - size + 1)))
    return _worth_it(steps, config)


def _near_steps(
    lengths: tuple[int, int], kernel: tuple[int, int], window: str, config: dict
) -> tuple[int, int] | None:
    """How many tokens a program has if all that see them, and all that they see, are to be a tile.

    None, if these are less than half of it.
    """
    steps = []
    for L, size, n in zip(lengths, kernel, "12", strict=True):
        tile, beside = config[f"TILE_{n}"], size - 1
        if window == "shifted":
            # By the end a key is seen from farther away.
            beside += size - 1 - _left(size, window)
        # Fewer than a window would not keep away from one end what is shifted at the other.
        few = tile - beside if tile - beside >= size else 0
        steps.append(tile if tile >= L else few)
    return _worth_it(steps, config)


def _worth_it(steps: list[int], config: dict) -> tuple[int, int] | None:
    step_1, step_2 = steps
    return (step_1, step_2) if 2 * step_1 * step_2 >= config["TILE_1"] * config["TILE_2"] else None


class _Windows(NamedTuple):
    """What a call's kernels have in common."""

    kernel: tuple[int, int]
    dilation: tuple[int, int]
    window: str
    scale: float
    T: tuple[int, int]

    @property
    def lengths(self) -> tuple[int, int]:
        """Of the longest sequence."""
        return cdiv(self.T[0], self.dilation[0]), cdiv(self.T[1], self.dilation[1])

    def sizes(self, q: Tensor) -> tuple[int, bool, int]:
        """What a configuration depends on."""
        return q.shape[-1], self.kernel[0] > 1, q.itemsize

    def constants(self, q: Tensor, strides: Sequence[int]) -> dict:
        compute = accumulator(q.dtype)
        # The interpreter takes the bits of bfloat16 for integers.
        product = compute if interpreting() else q.dtype
        far = max(strides[2::3]) * self.T[0] * self.T[1] >= 1 << 31
        return {
            "C": q.shape[-1], "SCALE": self.scale, "SHIFTED": self.window == "shifted",
            # In float64 the base is e.
            "UNIT": 1.0 if compute is torch.float64 else math.log2(math.e),
            "KERNEL_1": self.kernel[0], "DILATION_1": self.dilation[0],
            "LEFT_1": _left(self.kernel[0], self.window),
            "KERNEL_2": self.kernel[1], "DILATION_2": self.dilation[1],
            "LEFT_2": _left(self.kernel[1], self.window),
            "LINE": self.T[0] == 1 and self.kernel[0] == 1,
            "OFFSET": tl.int64 if far else tl.int32,
            "PRODUCT": triton_dtype(product), "COMPUTE": triton_dtype(compute),
        }  # fmt: skip

    def programs(self, images: int, step_1: int, step_2: int) -> tuple[int]:
        """A tile of a sequence each: there is one for each pair of residues."""
        (L1, L2), (d1, d2) = self.lengths, self.dilation
        return (images * d1 * cdiv(L1, step_1) * d2 * cdiv(L2, step_2),)


def _as_tokens(x: Tensor) -> Tensor:
    """View x (..., H, T₁, T₂, C) as (B, H, T₁ · T₂, C), unit stride along C; else copy it."""
    H = x.shape[-4] if x.dim() > 3 else 1
    x = x.reshape(-1, H, x.shape[-3] * x.shape[-2], x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(*tensors: Tensor | None) -> list[int]:
    """Those of images and tokens."""
    return [n for t in tensors for n in ((0, 0, 0) if t is None else t.stride()[:3])]


def _empty_like(x: Tensor) -> Tensor:
    """Allocate the shape of x, heads and tokens in its memory order.

    Where x is a transposed view of a projection, its gradient is then a view of the projection's,
    and what the next one reads of y lies as it reads it.
    """
    if x.dim() > 3:
        tokens_first = x.movedim(-4, -2)
        if tokens_first.is_contiguous():
            return torch.empty_like(tokens_first).movedim(-2, -4)
    return dense_like(x)


def neighborhood_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_1: int,
    kernel_2: int,
    dilation_1: int,
    dilation_2: int,
    window: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    y = _empty_like(q)
    top = q.new_empty(q.shape[:-1], dtype=accumulator(q.dtype))
    over = torch.empty_like(top)

    if has_work(y):
        T1, T2 = q.shape[-3:-1]
        windows = _Windows((kernel_1, kernel_2), (dilation_1, dilation_2), window, scale, (T1, T2))
        q, k, v, out = (_as_tokens(t) for t in (q, k, v, y))
        (B, H), strides = q.shape[:2], _strides(q, k, v, out)
        config = _neighborhood_attention_fwd_config(*windows.sizes(q))
        one = _fwd_steps(windows.lengths, windows.kernel, config)
        step_1, step_2 = one or (config["TILE_1"], config["TILE_2"])
        launch(
            _neighborhood_attention_fwd_kernel, windows.programs(B * H, step_1, step_2),
            q, k, v, out, top, over, *strides, H, T1, T2,
            ONE=one is not None, STEP_1=step_1, STEP_2=step_2,
            LOWEST=torch.finfo(top.dtype).min, **windows.constants(q, strides), **config,
        )  # fmt: skip
    return y, top, over


def neighborhood_attention_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    top: Tensor,
    over: Tensor,
    dy: Tensor,
    kernel_1: int,
    kernel_2: int,
    dilation_1: int,
    dilation_2: int,
    window: str,
    scale: float,
    need_dq: bool,
    need_dk: bool,
    need_dv: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dq = _empty_like(q) if need_dq else None
    dk = _empty_like(k) if need_dk else None
    dv = _empty_like(v) if need_dv else None

    if has_work(dy):
        T1, T2 = q.shape[-3:-1]
        windows = _Windows((kernel_1, kernel_2), (dilation_1, dilation_2), window, scale, (T1, T2))
        q, k, v, y, dy = (_as_tokens(t) for t in (q, k, v, y, dy))
        into_q, into_k, into_v = (None if t is None else _as_tokens(t) for t in (dq, dk, dv))
        top, over, H = top.contiguous(), over.contiguous(), q.shape[1]
        strides = _strides(q, k, v, y, dy, into_q, into_k, into_v)
        near = _neighborhood_attention_near_config(*windows.sizes(q))
        by_query = _neighborhood_attention_dq_config(*windows.sizes(q))
        by_key = _neighborhood_attention_dkv_config(*windows.sizes(q))
        constants = windows.constants(q, strides)
        images, steps = q.shape[0] * H, _near_steps(windows.lengths, windows.kernel, window, near)
        if steps is not None:
            launch(
                _neighborhood_attention_bwd_near_kernel, windows.programs(images, *steps),
                q, k, v, y, top, over, dy, into_q, into_k, into_v, *strides, H, T1, T2,
                NEED_DQ=need_dq, NEED_DK=need_dk, NEED_DV=need_dv,
                STEP_1=steps[0], STEP_2=steps[1], **constants, **near,
            )  # fmt: skip
            return dq, dk, dv

        delta = torch.empty_like(top)
        if need_dq or need_dk:
            grid = windows.programs(images, by_query["TILE_1"], by_query["TILE_2"])
            launch(
                _neighborhood_attention_bwd_dq_kernel, grid,
                q, k, v, y, top, over, dy, into_q, delta,
                *_strides(q, k, v, y, dy, into_q), H, T1, T2,
                NEED_DQ=need_dq, **constants, **by_query,
            )  # fmt: skip
        if need_dk or need_dv:
            grid = windows.programs(images, by_key["TILE_1"], by_key["TILE_2"])
            launch(
                _neighborhood_attention_bwd_dkv_kernel, grid,
                q, k, v, top, over, delta, dy, into_k, into_v,
                *_strides(q, k, v, dy, into_k, into_v), H, T1, T2,
                NEED_DK=need_dk, NEED_DV=need_dv, **constants, **by_key,
            )  # fmt: skip
    return dq, dk, dv


_neighborhood_attention = custom_vjp(
    "neighborhood_attention",
    reference=_reference,
    fwd=neighborhood_attention_fwd,
    bwd=neighborhood_attention_bwd,
    results="y",
    residuals="top over",
    grads="q k v",
    rows="q k v y top over",
    core_dims=3,
    autocast="q k v",
)


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | tuple[int, ...],
    *,
    dilation: int | tuple[int, ...] = 1,
    window: Window = "shifted",
    scale: float | None = None,
) -> Tensor:
    """Let each token attend to a window of tokens around it, along a line or in a plane.

        y_i = Σ_j p_ij v_j,  p_ij = softmax over j of scale · q_i · k_j,  j in the window of i

    Args:
        q: (..., T, C), or (..., T₁, T₂, C) for two kernel sizes, floating point, any strides: a
            transposed view of a projection is read in place. What is before, (B, H) say, are images
            of their own.
        k, v: the shape and dtype of q (under autocast all are cast as in PyTorch's attention).
        kernel_size: how many tokens a window has; in a plane two numbers.
        dilation: how far the tokens of a window are from each other; in a plane one number, or two.
        window: where the query is in it. "shifted": in the middle (of an even one after it), but
            for windows at the edges, which are moved inwards, so that every query sees kernel_size
            keys. "cut": in the middle always, and keys that are not there are left out. "causal":
            last, in both dimensions, and likewise left out.
        scale: multiplies the scores in float32; None: 1/√C. Each value is compiled once.

    Returns:
        The shape and dtype of q, dense, heads and tokens in the memory order of q.

    Raises:
        TypeError: a tensor is not of the dtype that it must be of, scale is no number.
        ValueError: shapes or devices do not fit, a size or a dilation is not positive, or shifted
            windows do not fit into T: kernel_size · dilation tokens are needed.
        NotImplementedError: C is more than 256.

    Precision: scores and sums are float32 (float64 for float64); exponentials, as they are or over
        their sum, and the gradients of scores, are rounded to the dtype of q where a product takes
        them; every output is rounded once.
    Memory: q, k, v, y and 8 bytes a token and head live until the backward pass; no scores ever do.
        The reference, which is what runs on a CPU, gathers kernel_size keys and values a token.
    Source: Hassani et al., "Neighborhood Attention Transformer", 2023; Hassani and Shi, "Dilated
        Neighborhood Attention Transformer", 2022; Dao et al., "FlashAttention", 2022.
    """
    _check(q, k, v)
    sizes = _checked_sizes("kernel_size", kernel_size)
    steps = _checked_sizes("dilation", dilation)
    if len(steps) > len(sizes):
        check.fail(OP, "dilation", "be one number, as `kernel_size` is", repr(dilation))
    if q.dim() <= len(sizes):
        contract = f"have {len(sizes)} dimensions of tokens and one of features"
        check.fail(OP, "q", contract, check.spell(q.shape))
    check.one_of(OP, "window", window, WINDOWS)
    if window == "shifted":
        lengths = q.shape[-1 - len(sizes) : -1]
        for T, size, step in zip(lengths, sizes, steps * (3 - len(steps)), strict=False):
            if size * step > T:
                contract = f"leave room for `dilation` times it in {T} tokens"
                check.fail(OP, "kernel_size", contract, f"{size} times {step}")
    if scale is not None:
        check.number(OP, "scale", scale, "be a number", True)
    return _on_grid(_neighborhood_attention, q, k, v, kernel_size, dilation, window, scale)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    check.floating(OP, "q", q)
    for name, t in {"k": k, "v": v}.items():
        check.floating(OP, name, t)
        check.dtype_inside(OP, name, t, q, "q")
        check.device(OP, name, t, q, "q")
        check.shape(OP, name, t, q.shape, "the shape of `q`")
    check.at_least_1d(OP, "q", q)
    if q.shape[-1] > WIDEST:
        contract = f"have heads of at most {WIDEST} features"
        check.fail(OP, "q", contract, q.shape[-1], NotImplementedError)


def _checked_sizes(name: str, value: int | tuple[int, ...]) -> tuple[int, ...]:
    sizes = value if isinstance(value, tuple) else (value,)
    if len(sizes) not in (1, 2) or not all(type(n) is int and n > 0 for n in sizes):
        check.fail(OP, name, "be a positive integer, or two", repr(value))
    return sizes


def _on_grid(
    op: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | tuple[int, ...],
    dilation: int | tuple[int, ...],
    window: str,
    scale: float | None,
) -> Tensor:
    """Call an op of planes; a line is a plane of height 1."""
    sizes = kernel_size if isinstance(kernel_size, tuple) else (kernel_size,)
    steps = dilation if isinstance(dilation, tuple) else (dilation,) * len(sizes)
    steps = steps if len(steps) == len(sizes) else steps * 2
    scale = float(max(q.shape[-1], 1) ** -0.5 if scale is None else scale)
    if len(sizes) == 2:
        return op(q, k, v, *sizes, *steps, window, scale)
    q, k, v = (t.unsqueeze(-3) for t in (q, k, v))
    return op(q, k, v, 1, *sizes, 1, *steps, window, scale).squeeze(-3)
