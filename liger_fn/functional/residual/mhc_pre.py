"""Manifold-constrained hyper-connections, first half: H streams make the input of a layer.

    rstd = 1 / √(mean(x²) + ε)        mix  = rstd · (x · weightᵀ), x flattened to K = H · D numbers
    pre  = σ(scale₀ · mix_pre + bias_pre) + pre_eps
    post = post_scale · σ(scale₁ · mix_post + bias_post)
    res  = sinkhorn(scale₂ · mix_res + bias_res)                  y = Σ_h pre_h · x_h

    dpre_h = dy · x_h, and with dlogits of dpre, dpost, dres      dbias  = Σ_tokens dlogits
    dz     = rstd · scale · dlogits                               dscale = Σ_tokens dlogits · mix
    dx     = pre_h · dy + dz · weight − x · rstd² · Σ(scale · dlogits · mix) / K
    dweight = Σ_tokens dzᵀ · x

The product has so few columns, M = H² + 2·H, that reading x is what it costs; the kernel that does
sums its squares too. Memory traffic in bytes per element of a 2-byte x: 4 forward, and 2 / H to
write y; 6 backward, and 4 / H to read dy. Kept are x, and M + H + 1 numbers of float32 a token:
mix, pre and rstd. Sums over tokens and over parts of x have a fixed order.

Only as it is can x be multiplied as fast as it is read: of bfloat16 it goes to the tensor cores
untouched, and what is float32 beside it, weight and dz, goes there in pieces of bfloat16, of which
it is the sum. Three have all of its bits and its range; of dx, which has 2 bytes, two of each
factor are more than can be seen. Pieces of float16 would lack the range: beside x of float16, and
of more bytes, they are of TF32, made anew for each tile.
"""

import torch
from torch import Tensor

from liger_fn.functional.activation.glu import activate
from liger_fn.functional.core import check
from liger_fn.functional.core.backend import interpreting
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.direct import launch
from liger_fn.functional.core.kernels import no_blocks, times
from liger_fn.functional.core.launch import (
    accumulator,
    as_rows,
    cdiv,
    dense_like,
    has_work,
    next_power_of_2,
    shared_memory,
    sm_count,
    tl,
    triton,
    triton_dtype,
    unit_stride,
)
from liger_fn.functional.norm.rows import strips_of, sums_of_parts
from liger_fn.functional.residual.sinkhorn import reference_sinkhorn, sinkhorn, sinkhorn_bwd

MOST_STREAMS = 16

# Columns that one program multiplies. Two thousand tokens of 16384 columns then keep a chip busy,
# and the bits of a token do not depend on how many are beside it.
_SPAN = 4096

# Tokens of which one program sums dweight, or a few more.
_LONGEST_STRIP = 2048


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    *,
    iterations: int = 20,
    eps: float = 1e-6,
    sinkhorn_eps: float = 1e-6,
    pre_eps: float = 0.0,
    post_scale: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor]:
    H, streams = x.shape[-2], x.to(accumulator(x.dtype))
    weight, bias, scale = (t.to(streams.dtype) for t in (weight, bias, scale))
    flat = streams.flatten(-2)
    normed = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        mix = torch.nn.functional.linear(normed, weight)
    sizes = [H, H, H * H]
    logits = [
        m * s + b
        for m, s, b in zip(mix.split(sizes, -1), scale.unbind(), bias.split(sizes), strict=True)
    ]
    pre = torch.sigmoid(logits[0]) + pre_eps
    post = post_scale * torch.sigmoid(logits[1])
    res = reference_sinkhorn(logits[2].unflatten(-1, (H, H)), iterations, sinkhorn_eps)
    y = (pre[..., None] * streams).sum(-2)
    return y.to(x.dtype), post, res


@triton.jit
def _in_two(t):
    """Give two numbers of TF32's 11 bits whose sum is t but for the last two of its 24 bits."""
    high = (t.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, t - high


@triton.jit
def _product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a · b of float32 numbers, of which as many bits count as PRECISION says."""
    if acc.dtype == tl.float64:
        # Of float64 not every chip has a product of tiles.
        acc += tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    elif PRECISION == "a in two":
        high, low = _in_two(a)
        acc = tl.dot(low, b, tl.dot(high, b, acc, input_precision="tf32"), input_precision="tf32")
    elif PRECISION == "b in two":
        high, low = _in_two(b)
        acc = tl.dot(a, low, tl.dot(a, high, acc, input_precision="tf32"), input_precision="tf32")
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _store_pieces(ptr, t, mask, stride, PIECES: tl.constexpr):
    """Store numbers as so many of the pointer's type, of which the sum is closest to them."""
    for piece in tl.static_range(PIECES):
        high = t.to(ptr.dtype.element_ty)
        tl.store(ptr + piece * stride, high, mask=mask)
        t -= high.to(t.dtype)


@triton.jit
def _mhc_pre_weight_pieces_kernel(
    weight_ptr, pieces_ptr, weight_stride_m, weight_stride_k, K, M,
    PIECES: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    w = tl.load(weight_ptr + m * weight_stride_m + k * weight_stride_k, mask=k < K, other=0.0)
    _store_pieces(pieces_ptr + m * K + k, w.to(COMPUTE), k < K, M.to(tl.int64) * K, PIECES)


@triton.jit(do_not_specialize=["N"])
def _mhc_pre_mix_kernel(
    x_ptr, weight_ptr, mix_part_ptr, squares_part_ptr,
    x_stride_n, weight_stride_p, weight_stride_m, weight_stride_k, N, K, M,
    SPAN: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    PRODUCT: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """x · weightᵀ and Σ x² over the columns of one part; the weight is the sum of its pieces."""
    part = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_row = x_ptr + row[:, None] * x_stride_n
    w_row = weight_ptr + m[:, None] * weight_stride_m

    mix = tl.zeros((BLOCK_N, BLOCK_M), COMPUTE)
    squares = tl.zeros((BLOCK_N, BLOCK_K), COMPUTE)
    for start in range(part * SPAN, tl.minimum(part * SPAN + SPAN, K), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_k = (k < K)[None, :]
        x = tl.load(x_row + k[None, :], mask=(row < N)[:, None] & in_k, other=0.0)
        wide = x.to(COMPUTE)
        squares += wide * wide
        # A sum of tensor cores is cut off, not rounded, at each step: long ones drift towards 0.
        # The compiler would make one of all, were it not for the question whether there are rows.
        step = tl.zeros((BLOCK_N, BLOCK_M), COMPUTE)
        for piece in tl.static_range(PIECES - 1, -1, -1):
            w_at = w_row + piece * weight_stride_p.to(tl.int64) + k[None, :] * weight_stride_k
            w = tl.load(w_at, mask=(m < M)[:, None] & in_k, other=0.0)
            step = _product(x.to(PRODUCT), tl.trans(w.to(PRODUCT)), step, PRECISION)
        mix += tl.where(N > 0, step, 0.0)

    out = (part.to(tl.int64) * N + row) * M
    tl.store(
        mix_part_ptr + out[:, None] + m[None, :], mix, mask=(row < N)[:, None] & (m < M)[None, :]
    )
    if tl.program_id(2) == 0:
        tl.store(squares_part_ptr + part.to(tl.int64) * N + row, tl.sum(squares, axis=1), row < N)


@triton.jit
def _vectors(n, N, M, FIRST: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Give where H of the M coefficients of each token are, which of them, and which there are."""
    h = tl.arange(0, BLOCK_H)[None, :]
    return n[:, None] * M + FIRST + h, FIRST + h, (n < N)[:, None] & (h < H)


@triton.jit
def _matrices(n, N, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Give where in a row of H² the elements of each token's matrix are, and which there are."""
    i, j = tl.arange(0, BLOCK_H)[None, :, None], tl.arange(0, BLOCK_H)[None, None, :]
    return i * H + j, (n < N)[:, None, None] & (i < H) & (j < H), j < H


@triton.jit
def _biases(bias_ptr, pre_m, post_m, m, H: tl.constexpr, COMPUTE: tl.constexpr):
    """Load those of pre, post and res."""
    pre = tl.load(bias_ptr + pre_m, mask=pre_m < H, other=0.0).to(COMPUTE)
    post = tl.load(bias_ptr + post_m, mask=post_m < 2 * H, other=0.0).to(COMPUTE)
    res = tl.load(bias_ptr + 2 * H + m, mask=m < H * H, other=0.0).to(COMPUTE)
    return pre, post, res


@triton.jit
def _scales(scale_ptr, COMPUTE: tl.constexpr):
    """Load those of pre, post and res."""
    pre = tl.load(scale_ptr).to(COMPUTE)
    post = tl.load(scale_ptr + 1).to(COMPUTE)
    res = tl.load(scale_ptr + 2).to(COMPUTE)
    return pre, post, res


@triton.jit(do_not_specialize=["N", "parts"])
def _mhc_pre_coefficients_fwd_kernel(
    mix_part_ptr, squares_part_ptr, bias_ptr, scale_ptr,
    mix_ptr, rstd_ptr, pre_ptr, post_ptr, res_ptr, N, K, parts,
    ITERATIONS: tl.constexpr, EPS: tl.constexpr, SINKHORN_EPS: tl.constexpr,
    PRE_EPS: tl.constexpr, POST_SCALE: tl.constexpr, COMPUTE: tl.constexpr,
    H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = H * H + 2 * H
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = n[:, None] * H + tl.arange(0, BLOCK_H)[None, :]
    pre_at, pre_m, inside = _vectors(n, N, M, 0, H, BLOCK_H)
    post_at, post_m, _ = _vectors(n, N, M, H, H, BLOCK_H)
    m, in_matrix, in_h = _matrices(n, N, H, BLOCK_H)
    res_at = n[:, None, None] * M + 2 * H + m

    squares = tl.load(squares_part_ptr + n, mask=n < N, other=0.0)
    mix_pre = tl.load(mix_part_ptr + pre_at, mask=inside, other=0.0)
    mix_post = tl.load(mix_part_ptr + post_at, mask=inside, other=0.0)
    mix_res = tl.load(mix_part_ptr + res_at, mask=in_matrix, other=0.0)
    # All of a part at once, and nothing is stored before: one after another they would be waited
    # for four times as often.
    for _ in range(1, parts):
        squares_part_ptr += N
        mix_part_ptr += N.to(tl.int64) * M
        squares += tl.load(squares_part_ptr + n, mask=n < N, other=0.0)
        mix_pre += tl.load(mix_part_ptr + pre_at, mask=inside, other=0.0)
        mix_post += tl.load(mix_part_ptr + post_at, mask=inside, other=0.0)
        mix_res += tl.load(mix_part_ptr + res_at, mask=in_matrix, other=0.0)
    bias_pre, bias_post, bias_res = _biases(bias_ptr, pre_m, post_m, m, H, COMPUTE)
    scale_pre, scale_post, scale_res = _scales(scale_ptr, COMPUTE)

    rstd = 1.0 / tl.sqrt(squares / K + EPS)
    mix_pre *= rstd[:, None]
    mix_post *= rstd[:, None]
    mix_res *= rstd[:, None, None]
    pre, _ = activate(mix_pre * scale_pre + bias_pre, "sigmoid", 1.0)
    post, _ = activate(mix_post * scale_post + bias_post, "sigmoid", 1.0)
    logits = mix_res * scale_res + bias_res
    res = sinkhorn(logits, in_matrix, in_h, ITERATIONS, SINKHORN_EPS)

    tl.store(rstd_ptr + n, rstd, mask=n < N)
    tl.store(mix_ptr + pre_at, mix_pre, mask=inside)
    tl.store(mix_ptr + post_at, mix_post, mask=inside)
    tl.store(mix_ptr + res_at, mix_res, mask=in_matrix)
    tl.store(pre_ptr + own, pre + PRE_EPS, mask=inside)
    tl.store(post_ptr + own, post * POST_SCALE, mask=inside)
    tl.store(res_ptr + n[:, None, None] * (H * H) + m, res, mask=in_matrix)


@triton.jit
def _load_streams(x_ptr, d, D, H: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_H: tl.constexpr):
    """Load some columns of all streams of a token, (BLOCK_H, BLOCK_D)."""
    h = tl.arange(0, BLOCK_H)
    inside = (h < H)[:, None] & (d < D)[None, :]
    return tl.load(x_ptr + h[:, None] * D + d[None, :], mask=inside, other=0.0).to(COMPUTE)


@triton.jit
def _mhc_pre_fwd_kernel(
    x_ptr, pre_ptr, y_ptr, x_stride_n, D,
    H: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    h = tl.arange(0, BLOCK_H)
    x = _load_streams(x_ptr + n * x_stride_n, d, D, H, COMPUTE, BLOCK_H)
    pre = tl.load(pre_ptr + n * H + h, mask=h < H, other=0.0)
    tl.store(y_ptr + n * D + d, tl.sum(times(x, pre[:, None]), axis=0), mask=d < D)


@triton.jit
def _mhc_pre_bwd_dpre_kernel(
    x_ptr, dy_ptr, dpre_ptr, x_stride_n, dy_stride_n, D,
    H: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    # Addressed once for each stream, so that each thread gets what it needs by itself.
    each = tl.zeros((BLOCK_H, 1), tl.int32)
    dots = tl.zeros((BLOCK_H, BLOCK_D), COMPUTE)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = _load_streams(x_ptr + n * x_stride_n, d, D, H, COMPUTE, BLOCK_H)
        col = each + d[None, :]
        dy = tl.load(dy_ptr + n * dy_stride_n + col, mask=col < D, other=0.0)
        dots += x * dy.to(COMPUTE)
    tl.store(dpre_ptr + n * H + h, tl.sum(dots, axis=1), mask=h < H)


@triton.jit(do_not_specialize=["N"])
def _mhc_pre_coefficients_bwd_kernel(
    mix_ptr, rstd_ptr, bias_ptr, scale_ptr, dpre_ptr, dpost_ptr, dres_ptr, scratch_ptr,
    dz_ptr, along_ptr, dbias_part_ptr, dscale_part_ptr, N, K,
    ITERATIONS: tl.constexpr, SINKHORN_EPS: tl.constexpr, POST_SCALE: tl.constexpr,
    PIECES: tl.constexpr, WIDTH: tl.constexpr, COMPUTE: tl.constexpr, H: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = H * H + 2 * H
    program = tl.program_id(0).to(tl.int64)
    n = program * BLOCK_N + tl.arange(0, BLOCK_N)
    own = n[:, None] * H + tl.arange(0, BLOCK_H)[None, :]
    pre_at, pre_m, inside = _vectors(n, N, M, 0, H, BLOCK_H)
    post_at, post_m, _ = _vectors(n, N, M, H, H, BLOCK_H)
    m, in_matrix, in_h = _matrices(n, N, H, BLOCK_H)
    square = n[:, None, None] * (H * H) + m

    rstd = tl.load(rstd_ptr + n, mask=n < N, other=0.0)
    mix_pre = tl.load(mix_ptr + pre_at, mask=inside, other=0.0)
    mix_post = tl.load(mix_ptr + post_at, mask=inside, other=0.0)
    mix_res = tl.load(mix_ptr + n[:, None, None] * M + 2 * H + m, mask=in_matrix, other=0.0)
    bias_pre, bias_post, bias_res = _biases(bias_ptr, pre_m, post_m, m, H, COMPUTE)
    scale_pre, scale_post, scale_res = _scales(scale_ptr, COMPUTE)
    dpre = tl.load(dpre_ptr + own, mask=inside, other=0.0)
    dpost = tl.load(dpost_ptr + own, mask=inside, other=0.0)
    dres = tl.load(dres_ptr + square, mask=in_matrix, other=0.0)

    _, dact = activate(mix_pre * scale_pre + bias_pre, "sigmoid", 1.0)
    dlogits_pre = times(dpre, dact)
    _, dact = activate(mix_post * scale_post + bias_post, "sigmoid", 1.0)
    dlogits_post = times(dpost * POST_SCALE, dact)
    dlogits_res = sinkhorn_bwd(
        mix_res * scale_res + bias_res, dres, in_matrix, in_h, scratch_ptr,
        N.to(tl.int64) * (H * H), square, ITERATIONS, SINKHORN_EPS,
    )  # fmt: skip
    terms_pre = tl.sum(times(dlogits_pre, mix_pre), axis=1)
    terms_post = tl.sum(times(dlogits_post, mix_post), axis=1)
    terms_res = tl.sum(tl.sum(times(dlogits_res, mix_res), axis=2), axis=1)
    along = terms_pre * scale_pre + terms_post * scale_post + terms_res * scale_res
    tl.store(along_ptr + n, along * rstd * rstd / K, mask=n < N)

    at = dz_ptr + n[:, None] * (PIECES * WIDTH)
    dz = dlogits_pre * scale_pre * rstd[:, None]
    _store_pieces(at + pre_m, dz, inside, WIDTH, PIECES)
    dz = dlogits_post * scale_post * rstd[:, None]
    _store_pieces(at + post_m, dz, inside, WIDTH, PIECES)
    at = at[:, :, None] + 2 * H + m
    dz = dlogits_res * scale_res * rstd[:, None, None]
    _store_pieces(at, dz, in_matrix, WIDTH, PIECES)
    if M < WIDTH:
        beyond = M + tl.arange(0, 8)[None, :]
        at = dz_ptr + n[:, None] * (PIECES * WIDTH) + beyond
        nothing = tl.zeros((BLOCK_N, 8), COMPUTE)
        _store_pieces(at, nothing, (n < N)[:, None] & (beyond < WIDTH), WIDTH, PIECES)

    h = tl.arange(0, BLOCK_H)
    i, j = h[:, None], h[None, :]
    dbias_part_ptr += program * M
    tl.store(dbias_part_ptr + h, tl.sum(dlogits_pre, axis=0), mask=h < H)
    tl.store(dbias_part_ptr + H + h, tl.sum(dlogits_post, axis=0), mask=h < H)
    of_res = tl.sum(dlogits_res, axis=0)
    tl.store(dbias_part_ptr + 2 * H + i * H + j, of_res, mask=(i < H) & (j < H))
    dscale_part_ptr += program * 3
    tl.store(dscale_part_ptr, tl.sum(terms_pre, axis=0))
    tl.store(dscale_part_ptr + 1, tl.sum(terms_post, axis=0))
    tl.store(dscale_part_ptr + 2, tl.sum(terms_res, axis=0))


@triton.jit(do_not_specialize=["N", "strip"])
def _mhc_pre_bwd_kernel(
    x_ptr, weight_ptr, pre_ptr, dy_ptr, dz_ptr, along_ptr, dx_ptr, dweight_part_ptr,
    x_stride_n, weight_stride_m, weight_stride_k, dy_stride_n, N, D, strip,
    WIDTH: tl.constexpr, OF_DX: tl.constexpr, OF_DWEIGHT: tl.constexpr, COMPUTE: tl.constexpr,
    H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = H * H + 2 * H
    # Neighbours take the same columns of other streams, which read the same dy.
    h = tl.program_id(0) % H
    d = tl.program_id(0) // H * BLOCK_D + tl.arange(0, BLOCK_D)
    k = h * D + d
    in_d = (d < D)[None, :]
    m = tl.arange(0, BLOCK_M)
    in_m = m < M
    program = tl.program_id(1).to(tl.int64)
    w_at = weight_ptr + m[:, None] * weight_stride_m + k[None, :] * weight_stride_k
    w = tl.load(w_at, mask=in_m[:, None] & in_d, other=0.0).to(COMPUTE)
    dweight = tl.zeros((BLOCK_M, BLOCK_D), COMPUTE)

    for step in range(0, strip, BLOCK_N):
        at = step + tl.arange(0, BLOCK_N)
        row = program * strip + at
        in_n = (row < N) & (at < strip)
        inside = in_n[:, None] & in_d
        x = tl.load(x_ptr + row[:, None] * x_stride_n + k[None, :], mask=inside, other=0.0)
        x = x.to(COMPUTE)
        dz_at = dz_ptr + row[:, None] * WIDTH + m[None, :]
        dz = tl.load(dz_at, mask=in_n[:, None] & in_m[None, :], other=0.0)
        if dx_ptr is not None:
            dy = tl.load(dy_ptr + row[:, None] * dy_stride_n + d[None, :], mask=inside, other=0.0)
            pre = tl.load(pre_ptr + row * H + h, mask=in_n, other=0.0)
            along = tl.load(along_ptr + row, mask=in_n, other=0.0)
            dx = pre[:, None] * dy.to(COMPUTE) - along[:, None] * x
            dx = _product(dz, w, dx, OF_DX)
            tl.store(dx_ptr + row[:, None] * (H * D) + k[None, :], dx, mask=inside)
        if dweight_part_ptr is not None:
            dweight = _product(tl.trans(dz), x, dweight, OF_DWEIGHT)

    if dweight_part_ptr is not None:
        out = dweight_part_ptr + (program * M + m[:, None]) * (H * D) + k[None, :]
        tl.store(out, dweight, mask=in_m[:, None] & in_d)


@triton.jit
def _in_pieces(t, PIECES: tl.constexpr, PIECE: tl.constexpr):
    """Give so many numbers of the type PIECE, of which the sum is closest to t, largest first."""
    pieces = no_blocks()
    for _ in tl.static_range(PIECES):
        high = t.to(PIECE)
        pieces += (high,)
        t -= high.to(t.dtype)
    return pieces


@triton.jit(do_not_specialize=["N", "strip"])
def _mhc_pre_bwd_pieces_kernel(
    x_ptr, weight_ptr, pre_ptr, dy_ptr, dz_ptr, along_ptr, dx_ptr, dweight_part_ptr,
    x_stride_n, weight_stride_m, weight_stride_k, dy_stride_n, N, D, strip,
    PIECES: tl.constexpr, WIDTH: tl.constexpr, OF_WEIGHT: tl.constexpr, PRODUCT: tl.constexpr,
    COMPUTE: tl.constexpr, H: tl.constexpr, STREAMS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same of x of 2 bytes, multiplied as it is; dz comes in pieces of its type."""
    M: tl.constexpr = H * H + 2 * H
    # Neighbours take the same columns of other streams, which read the same dy.
    first = tl.program_id(0) % (H // STREAMS) * STREAMS
    d = tl.program_id(0) // (H // STREAMS) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = (d < D)[None, :]
    m = tl.arange(0, BLOCK_M)
    program = tl.program_id(1).to(tl.int64)
    weight, dweight = no_blocks(), no_blocks()
    for h in tl.static_range(STREAMS):
        k = (first + h) * D + d
        w_at = weight_ptr + m[:, None] * weight_stride_m + k[None, :] * weight_stride_k
        w = tl.load(w_at, mask=(m < M)[:, None] & in_d, other=0.0).to(COMPUTE)
        weight += _in_pieces(w, OF_WEIGHT, PRODUCT)
        dweight += (tl.zeros((BLOCK_D, BLOCK_M), COMPUTE),)

    for step in tl.range(0, strip, BLOCK_N, num_stages=STAGES):
        row = program * strip + step + tl.arange(0, BLOCK_N)
        in_n = row < N
        inside = in_n[:, None] & in_d
        dz = no_blocks()
        for piece in tl.static_range(PIECES):
            dz_at = dz_ptr + row[:, None] * (PIECES * WIDTH) + piece * WIDTH + m[None, :]
            dz += (tl.load(dz_at, mask=in_n[:, None] & (m < WIDTH)[None, :], other=0.0),)
        if dx_ptr is not None:
            dy = tl.load(dy_ptr + row[:, None] * dy_stride_n + d[None, :], mask=inside, other=0.0)
            along = tl.load(along_ptr + row, mask=in_n, other=0.0)
        dweight_next = no_blocks()
        for h in tl.static_range(STREAMS):
            k = (first + h) * D + d
            x = tl.load(x_ptr + row[:, None] * x_stride_n + k[None, :], mask=inside, other=0.0)
            if dx_ptr is not None:
                pre = tl.load(pre_ptr + row * H + first + h, mask=in_n, other=0.0)
            if dweight_part_ptr is not None:
                total = dweight[h]
                for piece in tl.static_range(PIECES - 1, -1, -1):
                    total = tl.dot(tl.trans(x.to(PRODUCT)), dz[piece], total)
                dweight_next += (total,)
            if dx_ptr is not None:
                dx = pre[:, None] * dy.to(COMPUTE) - along[:, None] * x.to(COMPUTE)
                # Of the products of pieces those count that dx of 2 bytes can show.
                for piece in tl.static_range(1, OF_WEIGHT):
                    dx = tl.dot(dz[0], weight[h * OF_WEIGHT + piece], dx)
                dx = tl.dot(dz[1], weight[h * OF_WEIGHT], dx)
                dx = tl.dot(dz[0], weight[h * OF_WEIGHT], dx)
                tl.store(dx_ptr + row[:, None] * (H * D) + k[None, :], dx, mask=inside)
        if dweight_part_ptr is not None:
            dweight = dweight_next

    if dweight_part_ptr is not None:
        for h in tl.static_range(STREAMS):
            k = (first + h) * D + d
            out = dweight_part_ptr + (program * M + m[None, :]) * (H * D) + k[:, None]
            tl.store(out, dweight[h], mask=(d < D)[:, None] & (m < M)[None, :])


def _precision_of_mix(x: Tensor, weight: Tensor) -> str:
    """TF32 has all the bits of 2-byte numbers; three products of it have those of float32, and two
    where one side needs but one.
    """
    if x.dtype is torch.bfloat16:
        return "ieee"
    if x.element_size() > 2:
        return "tf32x3"
    return "tf32" if weight.element_size() == 2 else "b in two"


def _product_dtype(x: Tensor) -> torch.dtype:
    """The type that x is multiplied in: bfloat16 as it is, for of its range are all pieces of what
    is float32, and of those three have all of the bits.
    """
    # The interpreter takes the bits of bfloat16 for integers.
    if x.dtype is torch.bfloat16 and not interpreting():
        return x.dtype
    return accumulator(x.dtype)


def _pieces_of(weight: Tensor) -> int:
    """How many pieces of bfloat16 have the bits of a number of the weight's type."""
    return {torch.bfloat16: 1, torch.float16: 2}.get(weight.dtype, 3)


def _mix_config(M: int, itemsize: int, pieces: bool = False) -> dict:
    """64 tokens share what they read of the weight, and three steps of 8 KiB of x are on their way
    while one is multiplied.

    A weight in pieces is half as many bytes again, and 128 tokens share it: it comes out of the
    second-level cache, and is then about half of what comes of x.
    """
    if itemsize == 8:
        return {"BLOCK_N": 16, "BLOCK_K": 16, "BLOCK_M": 16, "num_warps": 4, "num_stages": 1}
    block_m = min(64, max(16, next_power_of_2(M)))
    if pieces:
        block_k, stages = (64, 3) if block_m <= 32 else (32, 4)
        tile = {"BLOCK_N": 128, "BLOCK_K": block_k, "BLOCK_M": block_m}
        return tile | {"num_warps": 8, "num_stages": stages}
    block_k, stages = (64, 4) if itemsize == 2 else (32, 3)
    tile = {"BLOCK_N": 64, "BLOCK_K": block_k, "BLOCK_M": block_m}
    return tile | {"num_warps": 4 if block_m <= 32 else 8, "num_stages": stages}


def _coefficients_config(H: int) -> dict:
    """One warp, and 16 elements of the matrices a thread: iterations wait for each other, not for
    memory, and with several warps for all of them, for the compiler puts rows of a matrix apart.
    """
    block_h = next_power_of_2(H)
    return {"BLOCK_N": max(1, 512 // block_h**2), "BLOCK_H": block_h, "num_warps": 1}


def streams_config(D: int, H: int) -> dict:
    """Eight columns of every stream a thread, a 16-byte load of each."""
    block_d = min(1024 if H <= 8 else 512, next_power_of_2(D))
    num_warps = max(1, block_d // 256)
    return {"BLOCK_D": block_d, "BLOCK_H": next_power_of_2(H), "num_warps": num_warps}


def _bwd_is_by_pieces(M: int, dtype: torch.dtype, shared: int) -> bool:
    """Whether the factors have room in shared memory, in pieces. Chips that have less of it take
    tiles out of registers, which pieces would not fit into.
    """
    return dtype is torch.bfloat16 and M <= 64 and shared >= 196608


def _bwd_config(M: int, H: int, itemsize: int, pieces: bool = False) -> dict:
    """Tiles whose share of dweight and whose dx have 16 numbers a thread each, so that x, dy and dz
    have room beside them.

    dz is float32, as dweight may be; of a dx of 2 bytes TF32 is four times as fine. Many
    coefficients have no room for the parts of their products: float32 is multiplied as it is.

    Of pieces, tokens and columns are 64, the least that the widest products of tiles take. Two
    streams of a program share what they read of dy and dz, all of which comes out of the
    second-level cache, and have the registers for it; two programs are on a multiprocessor.
    """
    block_m = max(16, next_power_of_2(M))
    if pieces:
        streams = 2 if block_m <= 32 and H % 2 == 0 else 1
        tile = {"STREAMS": streams, "BLOCK_N": 64, "BLOCK_D": 64, "BLOCK_M": block_m}
        return tile | {"STAGES": 3, "num_warps": 4, "per_sm": 2}
    if itemsize == 2 and block_m <= 128:
        tile = {"BLOCK_N": 32, "BLOCK_D": 8192 // max(64, block_m)}
        products = {"OF_DX": "tf32", "OF_DWEIGHT": "a in two"}
    elif itemsize <= 4 and block_m <= 32:
        tile = {"BLOCK_N": 16, "BLOCK_D": 64}
        products = {"OF_DX": "tf32x3", "OF_DWEIGHT": "tf32x3"}
    else:
        side = 4 if itemsize == 8 and block_m > 32 else 16
        tile = {"BLOCK_N": side, "BLOCK_D": side}
        products = {"OF_DX": "ieee", "OF_DWEIGHT": "ieee"}
    return tile | products | {"BLOCK_M": block_m, "num_warps": 8, "per_sm": 2}


def _weight_pieces(weight: Tensor, x: Tensor) -> Tensor:
    """Give the weight (M, K) in pieces (PIECES, M, K) of the type that x is multiplied in."""
    pieces, (M, K) = _pieces_of(weight), weight.shape
    if pieces == 1:
        return weight[None]
    out = weight.new_empty((pieces, M, K), dtype=_product_dtype(x))
    launch(
        _mhc_pre_weight_pieces_kernel, (cdiv(K, 1024), M), weight, out, *weight.stride(), K, M,
        PIECES=pieces, COMPUTE=triton_dtype(accumulator(x.dtype)), BLOCK_K=1024, num_warps=4,
    )  # fmt: skip
    return out


def mhc_pre_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    iterations: int,
    eps: float,
    sinkhorn_eps: float,
    pre_eps: float,
    post_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *tokens, H, D = x.shape
    K, M, compute = H * D, H * H + 2 * H, accumulator(x.dtype)
    y = x.new_empty((*tokens, D))
    post, pre = (x.new_empty((*tokens, H), dtype=compute) for _ in range(2))
    res = x.new_empty((*tokens, H, H), dtype=compute)
    mix, rstd = x.new_empty((*tokens, M), dtype=compute), x.new_empty(tokens, dtype=compute)

    if has_work(y):
        x, bias, scale = as_rows(x.flatten(-2)), unit_stride(bias), unit_stride(scale)
        N, options = len(x), {"COMPUTE": triton_dtype(compute)}
        by_pieces = x.dtype is torch.bfloat16
        weight = _weight_pieces(weight, x) if by_pieces else weight[None]
        config = _mix_config(M, x.element_size(), by_pieces)
        parts = cdiv(K, _SPAN)
        mix_part, squares_part = mix.new_empty((parts, N, M)), mix.new_empty((parts, N))
        launch(
            _mhc_pre_mix_kernel,
            (cdiv(N, config["BLOCK_N"]), parts, cdiv(M, config["BLOCK_M"])),
            x, weight, mix_part, squares_part, x.stride(0), *weight.stride(), N, K, M,
            SPAN=_SPAN, PIECES=len(weight), PRECISION=_precision_of_mix(x, weight),
            PRODUCT=triton_dtype(_product_dtype(x)), **options, **config,
        )  # fmt: skip
        config = _coefficients_config(H)
        launch(
            _mhc_pre_coefficients_fwd_kernel, (cdiv(N, config["BLOCK_N"]),),
            mix_part, squares_part, bias, scale, mix, rstd, pre, post, res, N, K, parts,
            ITERATIONS=iterations, EPS=eps, SINKHORN_EPS=sinkhorn_eps, PRE_EPS=pre_eps,
            POST_SCALE=post_scale, H=H, **options, **config,
        )  # fmt: skip
        config = streams_config(D, H)
        launch(
            _mhc_pre_fwd_kernel, (N, cdiv(D, config["BLOCK_D"])),
            x, pre, y, x.stride(0), D, H=H, **options, **config,
        )  # fmt: skip
    return y, post, res, mix, rstd, pre


def mhc_pre_bwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    mix: Tensor,
    rstd: Tensor,
    pre: Tensor,
    dy: Tensor,
    dpost: Tensor,
    dres: Tensor,
    iterations: int,
    eps: float,
    sinkhorn_eps: float,
    pre_eps: float,
    post_scale: float,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    need_dscale: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    dx = dense_like(x) if need_dx else None
    like = [weight if need_dweight else None, bias if need_dbias else None,
            scale if need_dscale else None]  # fmt: skip
    if not has_work(x):
        dweight, dbias, dscale = (None if t is None else dense_like(t).zero_() for t in like)
        return dx, dweight, dbias, dscale

    (H, D), M = x.shape[-2:], len(bias)
    x, dy = as_rows(x.flatten(-2)), as_rows(dy)
    bias, scale, dpost, dres = (unit_stride(t) for t in (bias, scale, dpost, dres))
    mix, rstd, pre = (unit_stride(t) for t in (mix, rstd, pre))
    N, options = len(x), {"COMPUTE": triton_dtype(mix.dtype), "H": H}

    dpre = torch.empty_like(pre)
    launch(
        _mhc_pre_bwd_dpre_kernel, (N,),
        x, dy, dpre, x.stride(0), dy.stride(0), D, **options, **streams_config(D, H),
    )  # fmt: skip
    by_pieces = _bwd_is_by_pieces(M, x.dtype, shared_memory(x.device))
    config = _bwd_config(M, H, x.element_size(), by_pieces)
    if by_pieces:
        # Rows of eights are read as such; dx needs two pieces, and dweight all that it can show.
        pieces, width = 2 if weight.element_size() == 2 else 3, 8 * cdiv(M, 8)
        dz = x.new_empty((N, pieces, width), dtype=_product_dtype(x))
        kernel = _mhc_pre_bwd_pieces_kernel
        products = {
            "PIECES": pieces, "OF_WEIGHT": min(2, _pieces_of(weight)),
            "PRODUCT": triton_dtype(dz.dtype),
        }  # fmt: skip
    else:
        pieces, width = 1, M
        dz = mix.new_empty((N, pieces, width))
        kernel, products = _mhc_pre_bwd_kernel, {}
    coefficients = _coefficients_config(H)
    programs = cdiv(N, coefficients["BLOCK_N"])
    along = torch.empty_like(rstd)
    scratch = mix.new_empty((iterations - 1, N, H, H))
    dbias_part, dscale_part = mix.new_empty((programs, M)), mix.new_empty((programs, 3))
    launch(
        _mhc_pre_coefficients_bwd_kernel, (programs,),
        mix, rstd, bias, scale, dpre, dpost, dres, scratch, dz, along, dbias_part, dscale_part,
        N, H * D, ITERATIONS=iterations, SINKHORN_EPS=sinkhorn_eps, POST_SCALE=post_scale,
        PIECES=pieces, WIDTH=width, **options, **coefficients,
    )  # fmt: skip

    dweight_part = None
    if need_dx or need_dweight:
        at_once = config.pop("per_sm") * sm_count(x.device)
        blocks = H // config.get("STREAMS", 1) * cdiv(D, config["BLOCK_D"])
        # All of a chip's programs at once, once or several times: a sum of tensor cores is cut off
        # at each step, and those of a longer strip would show it.
        turns = cdiv(N * blocks, _LONGEST_STRIP * at_once)
        strips, strip = strips_of(N, config["BLOCK_N"], max(1, turns * at_once // blocks))
        if need_dweight:
            dweight_part = mix.new_empty((strips, M * H * D))
        launch(
            kernel, (blocks, strips),
            x, weight, pre, dy, dz, along, dx, dweight_part,
            x.stride(0), *weight.stride(), dy.stride(0), N, D, strip,
            WIDTH=width, **products, **options, **config,
        )  # fmt: skip
    parts = [dweight_part, dbias_part, dscale_part]
    dweight, dbias, dscale = (
        None if t is None else sums_of_parts([p], [t])[0] for p, t in zip(parts, like, strict=True)
    )
    return dx, dweight, dbias, dscale


_mhc_pre = custom_vjp(
    "mhc_pre",
    reference=reference,
    fwd=mhc_pre_fwd,
    bwd=mhc_pre_bwd,
    results="y post res",
    residuals="mix rstd pre",
    grads="x weight bias scale",
    rows="x y post res mix rstd pre",
    core_dims=2,
)


def check_streams(op: str, x: Tensor) -> None:
    """Check the residual streams that both halves take."""
    check.floating(op, "x", x)
    if x.dim() < 2 or 0 in x.shape[-2:]:
        contract = "have shape (..., H, D) with at least one stream and one feature"
        check.fail(op, "x", contract, check.spell(x.shape))
    if x.shape[-2] > MOST_STREAMS:
        contract = f"have at most {MOST_STREAMS} streams"
        check.fail(op, "x", contract, x.shape[-2], NotImplementedError)


def mhc_pre(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    *,
    iterations: int = 20,
    eps: float = 1e-6,
    sinkhorn_eps: float = 1e-6,
    pre_eps: float = 0.0,
    post_scale: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Collapse residual streams to a layer's input, and say how its output goes back to them (mHC).

        mix  = RMSNorm(x) · weightᵀ, x flattened
        pre  = σ(scale₀ · mix_pre + bias_pre) + pre_eps       y = Σ_h pre_h · x_h
        post = post_scale · σ(scale₁ · mix_post + bias_post)
        res  = Sinkhorn(scale₂ · mix_res + bias_res)

    The layer's output goes to `mhc_post` with post and res.

    Args:
        x: (..., H, D), floating point, any strides: H streams, 16 at most.
        weight: (H² + 2·H, H · D), floating point, may be of another dtype than x, any strides: the
            rows of pre, then those of post, then those of res, row by row.
        bias: (H² + 2·H,), floating point.
        scale: (3,), floating point: of pre, post and res.
        iterations: how often columns are normalised, after the softmax of rows and, but for the
            first time, another normalisation of them.
        eps: added to the mean square.
        sinkhorn_eps: added to the softmax, and to every sum that divides.
        pre_eps: added to pre; DeepSeek-V4 has there what it has in `sinkhorn_eps`.
        post_scale: the most that post can be.

    Returns:
        y (..., D), dtype of x; post (..., H) and res (..., H, H), in float32 (float64 for float64
        x). All contiguous.

    Raises:
        TypeError: a tensor is not floating point, or an option is no number.
        ValueError: a shape or device does not fit, or there is no iteration.
        NotImplementedError: more than 16 streams.

    Precision: computed in float32 (float64 for float64 x), the product too, whatever autocast says;
        gradients are those of the iterations done, and are rounded once.
    Memory: x, the parameters and 4 · (H² + 3·H + 1) bytes a token live until the backward pass,
        which needs 4 · H² · (iterations − 1) bytes a token for a while. A weight of float32 beside
        x of bfloat16 needs one and a half times its bytes during the forward pass.
    Source: Xie et al., "mHC: Manifold-Constrained Hyper-Connections", 2025; arXiv:2512.24880.
    """
    op = "mhc_pre"
    check_streams(op, x)
    H, D = x.shape[-2:]
    M = H * H + 2 * H
    shapes = {"weight": (M, H * D), "bias": (M,), "scale": (3,)}
    because = {
        "weight": "(H² + 2·H, H · D) of `x`", "bias": "(H² + 2·H,)", "scale": "of pre, post and res"
    }  # fmt: skip
    for name, t in {"weight": weight, "bias": bias, "scale": scale}.items():
        check.floating(op, name, t)
        check.shape(op, name, t, shapes[name], because[name])
        check.device(op, name, t, x, "x")
    positive = isinstance(iterations, int) and iterations > 0
    check.number(op, "iterations", iterations, "be a positive integer", positive)
    options = {
        "eps": eps, "sinkhorn_eps": sinkhorn_eps, "pre_eps": pre_eps, "post_scale": post_scale
    }  # fmt: skip
    for name, value in options.items():
        check.number(op, name, value, "be a number", True)
    return _mhc_pre(x, weight, bias, scale, iterations, *map(float, options.values()))
