"""Neighbourhood attention: each token attends to a window around it, along a line or in a plane.

    s_ij = scale · q_i · k_j, j in the window of i        top_i = max_j s_ij
    p_ij = exp(s_ij − top_i) / total_i                    total_i = Σ_j exp(s_ij − top_i)
    y_i  = Σ_j p_ij v_j

    ds_ij = p_ij (dy_i · v_j − delta_i)                   delta_i = dy_i · y_i
    dq_i  = scale Σ_j ds_ij k_j                           dk_j = scale Σ_i ds_ij q_i
    dv_j  = Σ_i p_ij dy_i

With dilation d the tokens of one residue modulo d are a sequence of their own, of which windows are
contiguous. A tile of its queries sees a rectangle of its keys, and a tile of its keys is seen by a
rectangle of its queries: programs walk along that rectangle alone, a block at a time, so that work
grows with T · window, and no score is ever in memory. In one dimension the rectangle is one row.
All sums have a fixed order.

Memory traffic in bytes per element of a 2-byte q, where caches hold what windows share: 8 forward
(read q, k, v, write y), 22 backward (dq reads q, k, v, y, dy and writes dq; dk and dv read q, k, v,
dy and write both; some of that from the caches). Kept are q, k, v, y, top and total: of one
sum, top + log total, large scores would take the digits.

PyTorch's flex_attention takes such windows as a mask of blocks. Of it there is no forward mode, no
vmap, no second derivative and, on a CPU, no gradient.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.core.backend import interpreting
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.direct import launch
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
def _tile_of_program(
    T1, T2, DILATION_1: tl.constexpr, DILATION_2: tl.constexpr,
    TILE_1: tl.constexpr, TILE_2: tl.constexpr,
):  # fmt: skip
    """Give a program's image, the residues of its tokens, and the first of them in its sequence."""
    program = tl.program_id(0)
    tiles_1 = tl.cdiv(tl.cdiv(T1, DILATION_1), TILE_1)
    tiles_2 = tl.cdiv(tl.cdiv(T2, DILATION_2), TILE_2)
    first_2 = program % tiles_2 * TILE_2
    program //= tiles_2
    first_1 = program % tiles_1 * TILE_1
    program //= tiles_1
    r2 = program % DILATION_2
    program //= DILATION_2
    return (program // DILATION_1).to(tl.int64), program % DILATION_1, r2, first_1, first_2


@triton.jit
def _tokens(p1, p2, r1, r2, T2, DILATION_1: tl.constexpr, DILATION_2: tl.constexpr):
    """Give which tokens those at p1 and p2 of their sequences are."""
    return (p1 * DILATION_1 + r1).to(tl.int64) * T2 + p2 * DILATION_2 + r2


@triton.jit
def _keys_of(p, L, KERNEL: tl.constexpr, LEFT: tl.constexpr, SHIFTED: tl.constexpr):
    """Give the first key in the window of query p of L, and the one after the last."""
    begin, end = tl.maximum(p - LEFT, 0), tl.minimum(p - LEFT + KERNEL, L)
    if SHIFTED:
        begin = tl.minimum(begin, L - KERNEL)
        end = begin + KERNEL
    return begin, end


@triton.jit
def _queries_of(k, L, KERNEL: tl.constexpr, LEFT: tl.constexpr, SHIFTED: tl.constexpr):
    """Give the first query in whose window key k of L is, and the one after the last."""
    begin, end = tl.maximum(k - KERNEL + 1 + LEFT, 0), tl.minimum(k + LEFT + 1, L)
    if SHIFTED:
        begin = tl.where(k < KERNEL, 0, begin)
        end = tl.where(k >= L - KERNEL, L, end)
    return begin, end


@triton.jit
def _keys_of_tile(
    first, L, TILE: tl.constexpr, KERNEL: tl.constexpr, LEFT: tl.constexpr, SHIFTED: tl.constexpr
):
    """Give the first key that a tile of queries sees, and how many it is from there to the last."""
    begin, _ = _keys_of(first, L, KERNEL, LEFT, SHIFTED)
    _, end = _keys_of(tl.minimum(first + TILE, L) - 1, L, KERNEL, LEFT, SHIFTED)
    return begin, tl.maximum(end - begin, 0)


@triton.jit
def _queries_of_tile(
    first, L, TILE: tl.constexpr, KERNEL: tl.constexpr, LEFT: tl.constexpr, SHIFTED: tl.constexpr
):
    """Give the first query that sees a tile of keys, and how many it is from there to the last."""
    begin, _ = _queries_of(first, L, KERNEL, LEFT, SHIFTED)
    _, end = _queries_of(tl.minimum(first + TILE, L) - 1, L, KERNEL, LEFT, SHIFTED)
    return begin, tl.maximum(end - begin, 0)


@triton.jit
def _image_of(x_ptr, image, H, stride_b, stride_h):
    return x_ptr + image // H * stride_b + image % H * stride_h


@triton.jit
def _load(
    x_ptr, token, inside, stride_t,
    C: tl.constexpr, DTYPE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Load the rows of tokens."""
    c = tl.arange(0, BLOCK_C)[None, :]
    mask = inside[:, None] & (c < C)
    return tl.load(x_ptr + token[:, None] * stride_t + c, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _store(x_ptr, token, inside, stride_t, x, C: tl.constexpr, BLOCK_C: tl.constexpr):
    c = tl.arange(0, BLOCK_C)[None, :]
    tl.store(x_ptr + token[:, None] * stride_t + c, x, mask=inside[:, None] & (c < C))


@triton.jit(do_not_specialize=["H", "T1", "T2"])
def _neighborhood_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, top_ptr, total_ptr,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t,
    v_stride_b, v_stride_h, v_stride_t, y_stride_b, y_stride_h, y_stride_t, H, T1, T2,
    C: tl.constexpr, SCALE: tl.constexpr, SHIFTED: tl.constexpr,
    KERNEL_1: tl.constexpr, DILATION_1: tl.constexpr, LEFT_1: tl.constexpr,
    KERNEL_2: tl.constexpr, DILATION_2: tl.constexpr, LEFT_2: tl.constexpr,
    LOWEST: tl.constexpr, PRODUCT: tl.constexpr, COMPUTE: tl.constexpr,
    TILE_1: tl.constexpr, TILE_2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = TILE_1 * TILE_2
    image, r1, r2, first_1, first_2 = _tile_of_program(
        T1, T2, DILATION_1, DILATION_2, TILE_1, TILE_2
    )
    L1, L2 = tl.cdiv(T1 - r1, DILATION_1), tl.cdiv(T2 - r2, DILATION_2)
    m = tl.arange(0, TILE)
    p1, p2 = first_1 + m // TILE_2, first_2 + m % TILE_2
    query = _tokens(p1, p2, r1, r2, T2, DILATION_1, DILATION_2)
    is_query = (p1 < L1) & (p2 < L2)
    begin_1, end_1 = _keys_of(p1[:, None], L1, KERNEL_1, LEFT_1, SHIFTED)
    begin_2, end_2 = _keys_of(p2[:, None], L2, KERNEL_2, LEFT_2, SHIFTED)
    low_1, height = _keys_of_tile(first_1, L1, TILE_1, KERNEL_1, LEFT_1, SHIFTED)
    low_2, width = _keys_of_tile(first_2, L2, TILE_2, KERNEL_2, LEFT_2, SHIFTED)
    k_ptr = _image_of(k_ptr, image, H, k_stride_b, k_stride_h)
    v_ptr = _image_of(v_ptr, image, H, v_stride_b, v_stride_h)
    q_ptr = _image_of(q_ptr, image, H, q_stride_b, q_stride_h)
    q = _load(q_ptr, query, is_query, q_stride_t, C, PRODUCT, BLOCK_C)

    top = tl.full((TILE,), LOWEST, COMPUTE)
    total = tl.zeros((TILE,), COMPUTE)
    acc = tl.zeros((TILE, BLOCK_C), COMPUTE)
    for start in range(0, height * width, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        is_key = n < height * width
        k1, k2 = low_1 + n // width, low_2 + n % width
        key = _tokens(k1, k2, r1, r2, T2, DILATION_1, DILATION_2)
        seen = is_key[None, :] & (k1[None, :] >= begin_1) & (k1[None, :] < end_1)
        seen &= (k2[None, :] >= begin_2) & (k2[None, :] < end_2)
        k = _load(k_ptr, key, is_key, k_stride_t, C, PRODUCT, BLOCK_C)
        s = _product(q, tl.trans(k), tl.zeros((TILE, BLOCK_N), COMPUTE)) * SCALE
        s = tl.where(seen, s, float("-inf"))

        # Not below the lowest number: the sum over a block of −∞ is then 0.
        higher = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp(s - higher[:, None])
        fade = tl.exp(top - higher)
        total = total * fade + tl.sum(p, axis=1)
        v = _load(v_ptr, key, is_key, v_stride_t, C, PRODUCT, BLOCK_C)
        acc = _product(p, v, acc * fade[:, None])
        top = higher

    y_ptr = _image_of(y_ptr, image, H, y_stride_b, y_stride_h)
    _store(y_ptr, query, is_query, y_stride_t, acc / total[:, None], C, BLOCK_C)
    tl.store(top_ptr + image * T1 * T2 + query, top, mask=is_query)
    tl.store(total_ptr + image * T1 * T2 + query, total, mask=is_query)


@triton.jit(do_not_specialize=["H", "T1", "T2"])
def _neighborhood_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, top_ptr, total_ptr, dy_ptr, dq_ptr, delta_ptr,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t,
    v_stride_b, v_stride_h, v_stride_t, y_stride_b, y_stride_h, y_stride_t,
    dy_stride_b, dy_stride_h, dy_stride_t, dq_stride_b, dq_stride_h, dq_stride_t, H, T1, T2,
    C: tl.constexpr, SCALE: tl.constexpr, SHIFTED: tl.constexpr,
    KERNEL_1: tl.constexpr, DILATION_1: tl.constexpr, LEFT_1: tl.constexpr,
    KERNEL_2: tl.constexpr, DILATION_2: tl.constexpr, LEFT_2: tl.constexpr,
    NEED_DQ: tl.constexpr, PRODUCT: tl.constexpr, COMPUTE: tl.constexpr,
    TILE_1: tl.constexpr, TILE_2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write delta, and dq where it is wanted."""
    TILE: tl.constexpr = TILE_1 * TILE_2
    image, r1, r2, first_1, first_2 = _tile_of_program(
        T1, T2, DILATION_1, DILATION_2, TILE_1, TILE_2
    )
    L1, L2 = tl.cdiv(T1 - r1, DILATION_1), tl.cdiv(T2 - r2, DILATION_2)
    m = tl.arange(0, TILE)
    p1, p2 = first_1 + m // TILE_2, first_2 + m % TILE_2
    query = _tokens(p1, p2, r1, r2, T2, DILATION_1, DILATION_2)
    is_query = (p1 < L1) & (p2 < L2)
    dy_ptr = _image_of(dy_ptr, image, H, dy_stride_b, dy_stride_h)
    y_ptr = _image_of(y_ptr, image, H, y_stride_b, y_stride_h)
    dy = _load(dy_ptr, query, is_query, dy_stride_t, C, PRODUCT, BLOCK_C)
    y = _load(y_ptr, query, is_query, y_stride_t, C, COMPUTE, BLOCK_C)

    delta = tl.sum(dy.to(COMPUTE) * y, axis=1)
    tl.store(delta_ptr + image * T1 * T2 + query, delta, mask=is_query)

    if NEED_DQ:
        begin_1, end_1 = _keys_of(p1[:, None], L1, KERNEL_1, LEFT_1, SHIFTED)
        begin_2, end_2 = _keys_of(p2[:, None], L2, KERNEL_2, LEFT_2, SHIFTED)
        low_1, height = _keys_of_tile(first_1, L1, TILE_1, KERNEL_1, LEFT_1, SHIFTED)
        low_2, width = _keys_of_tile(first_2, L2, TILE_2, KERNEL_2, LEFT_2, SHIFTED)
        k_ptr = _image_of(k_ptr, image, H, k_stride_b, k_stride_h)
        v_ptr = _image_of(v_ptr, image, H, v_stride_b, v_stride_h)
        q_ptr = _image_of(q_ptr, image, H, q_stride_b, q_stride_h)
        q = _load(q_ptr, query, is_query, q_stride_t, C, PRODUCT, BLOCK_C)
        top = tl.load(top_ptr + image * T1 * T2 + query, mask=is_query, other=0.0)
        over = 1.0 / tl.load(total_ptr + image * T1 * T2 + query, mask=is_query, other=1.0)

        dq = tl.zeros((TILE, BLOCK_C), COMPUTE)
        for start in range(0, height * width, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            is_key = n < height * width
            k1, k2 = low_1 + n // width, low_2 + n % width
            key = _tokens(k1, k2, r1, r2, T2, DILATION_1, DILATION_2)
            seen = is_key[None, :] & (k1[None, :] >= begin_1) & (k1[None, :] < end_1)
            seen &= (k2[None, :] >= begin_2) & (k2[None, :] < end_2)
            k = _load(k_ptr, key, is_key, k_stride_t, C, PRODUCT, BLOCK_C)
            v = _load(v_ptr, key, is_key, v_stride_t, C, PRODUCT, BLOCK_C)
            nothing = tl.zeros((TILE, BLOCK_N), COMPUTE)
            s = _product(q, tl.trans(k), nothing) * SCALE
            p = tl.where(seen, tl.exp(s - top[:, None]) * over[:, None], 0.0)
            ds = p * (_product(dy, tl.trans(v), nothing) - delta[:, None])
            dq = _product(ds, k, dq)

        dq_ptr = _image_of(dq_ptr, image, H, dq_stride_b, dq_stride_h)
        _store(dq_ptr, query, is_query, dq_stride_t, dq * SCALE, C, BLOCK_C)


@triton.jit(do_not_specialize=["H", "T1", "T2"])
def _neighborhood_attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, top_ptr, total_ptr, delta_ptr, dy_ptr, dk_ptr, dv_ptr,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t,
    v_stride_b, v_stride_h, v_stride_t, dy_stride_b, dy_stride_h, dy_stride_t,
    dk_stride_b, dk_stride_h, dk_stride_t, dv_stride_b, dv_stride_h, dv_stride_t, H, T1, T2,
    C: tl.constexpr, SCALE: tl.constexpr, SHIFTED: tl.constexpr,
    KERNEL_1: tl.constexpr, DILATION_1: tl.constexpr, LEFT_1: tl.constexpr,
    KERNEL_2: tl.constexpr, DILATION_2: tl.constexpr, LEFT_2: tl.constexpr,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, PRODUCT: tl.constexpr, COMPUTE: tl.constexpr,
    TILE_1: tl.constexpr, TILE_2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = TILE_1 * TILE_2
    image, r1, r2, first_1, first_2 = _tile_of_program(
        T1, T2, DILATION_1, DILATION_2, TILE_1, TILE_2
    )
    L1, L2 = tl.cdiv(T1 - r1, DILATION_1), tl.cdiv(T2 - r2, DILATION_2)
    m = tl.arange(0, TILE)
    k1, k2 = first_1 + m // TILE_2, first_2 + m % TILE_2
    key = _tokens(k1, k2, r1, r2, T2, DILATION_1, DILATION_2)
    is_key = (k1 < L1) & (k2 < L2)
    low_1, height = _queries_of_tile(first_1, L1, TILE_1, KERNEL_1, LEFT_1, SHIFTED)
    low_2, width = _queries_of_tile(first_2, L2, TILE_2, KERNEL_2, LEFT_2, SHIFTED)
    q_ptr = _image_of(q_ptr, image, H, q_stride_b, q_stride_h)
    k_ptr = _image_of(k_ptr, image, H, k_stride_b, k_stride_h)
    v_ptr = _image_of(v_ptr, image, H, v_stride_b, v_stride_h)
    dy_ptr = _image_of(dy_ptr, image, H, dy_stride_b, dy_stride_h)
    top_ptr += image * T1 * T2
    total_ptr += image * T1 * T2
    delta_ptr += image * T1 * T2
    k = _load(k_ptr, key, is_key, k_stride_t, C, PRODUCT, BLOCK_C)
    v = _load(v_ptr, key, is_key, v_stride_t, C, PRODUCT, BLOCK_C)

    dk = tl.zeros((TILE, BLOCK_C), COMPUTE)
    dv = tl.zeros((TILE, BLOCK_C), COMPUTE)
    for start in range(0, height * width, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        is_query = n < height * width
        p1, p2 = low_1 + n // width, low_2 + n % width
        query = _tokens(p1, p2, r1, r2, T2, DILATION_1, DILATION_2)
        begin_1, end_1 = _keys_of(p1[None, :], L1, KERNEL_1, LEFT_1, SHIFTED)
        begin_2, end_2 = _keys_of(p2[None, :], L2, KERNEL_2, LEFT_2, SHIFTED)
        # Keys along the rows, queries along the columns.
        seen = is_query[None, :] & (k1[:, None] >= begin_1) & (k1[:, None] < end_1)
        seen &= (k2[:, None] >= begin_2) & (k2[:, None] < end_2)
        q = _load(q_ptr, query, is_query, q_stride_t, C, PRODUCT, BLOCK_C)
        dy = _load(dy_ptr, query, is_query, dy_stride_t, C, PRODUCT, BLOCK_C)
        top = tl.load(top_ptr + query, mask=is_query, other=0.0)
        over = 1.0 / tl.load(total_ptr + query, mask=is_query, other=1.0)
        nothing = tl.zeros((TILE, BLOCK_N), COMPUTE)
        s = _product(k, tl.trans(q), nothing) * SCALE
        p = tl.where(seen, tl.exp(s - top[None, :]) * over[None, :], 0.0)
        if NEED_DV:
            dv = _product(p, dy, dv)
        if NEED_DK:
            delta = tl.load(delta_ptr + query, mask=is_query, other=0.0)
            ds = p * (_product(v, tl.trans(dy), nothing) - delta[None, :])
            dk = _product(ds, q, dk)

    if NEED_DK:
        dk_ptr = _image_of(dk_ptr, image, H, dk_stride_b, dk_stride_h)
        _store(dk_ptr, key, is_key, dk_stride_t, dk * SCALE, C, BLOCK_C)
    if NEED_DV:
        dv_ptr = _image_of(dv_ptr, image, H, dv_stride_b, dv_stride_h)
        _store(dv_ptr, key, is_key, dv_stride_t, dv, C, BLOCK_C)


def _neighborhood_attention_fwd_config(C: int, planar: bool, itemsize: int) -> dict:
    """64 tokens against 64 at a time of 2-byte inputs; of wider ones, and of wide heads, fewer.

    In a plane a tile is square, or nearly: it then sees the fewest keys for its size. Heads of 128
    features leave registers to half as many keys.
    """
    block_c = max(16, next_power_of_2(C))
    tile = {2: 64, 4: 32, 8: 16}[itemsize]
    if block_c > 128:
        tile = min(tile, 32)
    tile_1 = 1 << ((tile.bit_length() - 1) // 2) if planar else 1
    block_n = tile // 2 if block_c == 128 and itemsize == 2 else tile
    return {
        "TILE_1": tile_1, "TILE_2": tile // tile_1, "BLOCK_N": block_n, "BLOCK_C": block_c,
        "num_warps": 4, "num_stages": 2,
    }  # fmt: skip


def _neighborhood_attention_bwd_config(C: int, planar: bool, itemsize: int) -> dict:
    """A tile as forward, against half as many at a time: two gradients and two products are in
    registers, and of heads of 128 features in those of twice as many threads.
    """
    config = _neighborhood_attention_fwd_config(C, planar, itemsize)
    block_n = max(16, config["TILE_1"] * config["TILE_2"] // 2)
    return config | {"BLOCK_N": block_n, "num_warps": 8 if config["BLOCK_C"] == 128 else 4}


def _constants(
    q: Tensor,
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    window: str,
    scale: float,
    config: Callable[[int, bool, int], dict],
) -> dict:
    """What all kernels have in common; tiles are as `config` has them."""
    compute = accumulator(q.dtype)
    # The interpreter takes the bits of bfloat16 for integers.
    product = compute if interpreting() else q.dtype
    return {
        "C": q.shape[-1], "SCALE": scale, "SHIFTED": window == "shifted",
        "KERNEL_1": kernel[0], "DILATION_1": dilation[0], "LEFT_1": _left(kernel[0], window),
        "KERNEL_2": kernel[1], "DILATION_2": dilation[1], "LEFT_2": _left(kernel[1], window),
        "PRODUCT": triton_dtype(product), "COMPUTE": triton_dtype(compute),
        **config(q.shape[-1], kernel[0] > 1, q.itemsize),
    }  # fmt: skip


def _programs(images: int, T1: int, T2: int, constants: dict) -> tuple[int]:
    """A tile of a sequence each: there is one for each pair of residues."""
    programs = images
    for T, n in ((T1, "1"), (T2, "2")):
        dilation, tile = constants[f"DILATION_{n}"], constants[f"TILE_{n}"]
        programs *= dilation * cdiv(cdiv(T, dilation), tile)
    return (programs,)


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
    total = torch.empty_like(top)

    if has_work(y):
        T1, T2 = q.shape[-3:-1]
        q, k, v, out = (_as_tokens(t) for t in (q, k, v, y))
        (B, H), kernel, dilation = q.shape[:2], (kernel_1, kernel_2), (dilation_1, dilation_2)
        config = _neighborhood_attention_fwd_config
        constants = _constants(q, kernel, dilation, window, scale, config)
        launch(
            _neighborhood_attention_fwd_kernel, _programs(B * H, T1, T2, constants),
            q, k, v, out, top, total, *_strides(q, k, v, out), H, T1, T2,
            LOWEST=torch.finfo(top.dtype).min, **constants,
        )  # fmt: skip
    return y, top, total


def neighborhood_attention_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    top: Tensor,
    total: Tensor,
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
        q, k, v, y, dy = (_as_tokens(t) for t in (q, k, v, y, dy))
        into_q, into_k, into_v = (None if t is None else _as_tokens(t) for t in (dq, dk, dv))
        top, total = top.contiguous(), total.contiguous()
        delta = torch.empty_like(top)
        (B, H), kernel, dilation = q.shape[:2], (kernel_1, kernel_2), (dilation_1, dilation_2)
        config = _neighborhood_attention_bwd_config
        constants = _constants(q, kernel, dilation, window, scale, config)
        grid = _programs(B * H, T1, T2, constants)
        launch(
            _neighborhood_attention_bwd_dq_kernel, grid,
            q, k, v, y, top, total, dy, into_q, delta,
            *_strides(q, k, v, y, dy, into_q), H, T1, T2,
            NEED_DQ=need_dq, **constants,
        )  # fmt: skip
        if need_dk or need_dv:
            launch(
                _neighborhood_attention_bwd_dkv_kernel, grid,
                q, k, v, top, total, delta, dy, into_k, into_v,
                *_strides(q, k, v, dy, into_k, into_v), H, T1, T2,
                NEED_DK=need_dk, NEED_DV=need_dv, **constants,
            )  # fmt: skip
    return dq, dk, dv


_neighborhood_attention = custom_vjp(
    "neighborhood_attention",
    reference=_reference,
    fwd=neighborhood_attention_fwd,
    bwd=neighborhood_attention_bwd,
    results="y",
    residuals="top total",
    grads="q k v",
    rows="q k v y top total",
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

    Precision: scores and sums are float32 (float64 for float64); probabilities, and the gradients
        of scores, are rounded to the dtype of q where a product takes them; every output is rounded
        once.
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
