"""The kernels of the norms over the last dimension: rows centred or not, of one input or of a sum.

    s  = x + residual, or x              x̂ = (s − mean) · rstd, or s · rstd
    y  = x̂ · (offset + weight) + bias

    g  = dy · (offset + weight)
    dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)) + ds         dweight = Σ_rows dy · x̂
                                                              dbias   = Σ_rows dy

A pointer that is None leaves its term out: `residual` and `s` the sum, `mean` the centring, `ds`
the cotangent of s, `dx`, `dweight` and `dbias` a gradient that nobody wants.

Weight and bias are those of all rows, or each sample of T rows has its own, as in modulated norms.
T is None where all rows share them, which leaves out what finds the sample of a row.

A row is read once and stays in registers, as PIECES blocks of BLOCK_D columns: a power of two alone
would leave up to half of the lanes empty. The backward pass is one persistent launch, each program
walking a strip of rows with its share of dweight and dbias in registers while the next rows are on
their way, and one small launch that adds the shares in a fixed order. Where registers hold all but
the share of dbias, another launch sums that, and reads dy again. Wider rows are read several times.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.core.direct import MOST, Bound, launch
from liger_fn.functional.core.kernels import no_blocks, times
from liger_fn.functional.core.launch import (
    accumulator,
    cdiv,
    dense_like,
    has_work,
    next_power_of_2,
    per_row,
    rows_of,
    sm_count,
    tl,
    triton,
    triton_dtype,
    unit_stride,
)


@triton.jit
def load_rows(
    ptr, stride_n, row, in_n, D,
    COMPUTE: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Load whole rows as PIECES blocks; beyond D they are zero."""
    blocks = no_blocks()
    for i in tl.static_range(PIECES):
        col = i * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = in_n[:, None] & (col < D)[None, :]
        block = tl.load(ptr + row[:, None] * stride_n + col[None, :], mask=inside, other=0.0)
        blocks += (block.to(COMPUTE),)
    return blocks


@triton.jit
def load_row_features(
    ptr, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr, sample=None
):  # fmt: skip
    """Load what all rows share, or those of each sample, as PIECES blocks."""
    blocks = no_blocks()
    if ptr is not None:
        for i in tl.static_range(PIECES):
            col = i * BLOCK_D + tl.arange(0, BLOCK_D)
            blocks += (_load_row_block(ptr, col, D, BLOCK_N, sample),)
    return blocks


@triton.jit
def _load_row_block(ptr, col, D, BLOCK_N: tl.constexpr, sample=None):
    """Load a block of it, once for each row: each thread gets what it needs by itself."""
    block = None
    if ptr is not None:
        if sample is not None:
            ptr += sample[:, None] * D
        col = tl.zeros((BLOCK_N, 1), tl.int32) + col[None, :]
        block = tl.load(ptr + col, mask=col < D, other=0.0)
    return block


@triton.jit
def _of_sample(ptr, sample, D):
    """Point to what a sample has of it."""
    if ptr is not None:
        ptr += sample * D
    return ptr


# Wider rows of one number a lane are several warps' work; of each, one lane writes (triton 3.6).
_ONE_A_LANE = tl.constexpr(32)


@triton.jit
def row_dots(a, b, PIECES: tl.constexpr, UP_TO: tl.constexpr = _ONE_A_LANE):
    """Give Σ a · b of each row; UP_TO is that of `times`."""
    products = times(a[0], b[0], UP_TO)
    for i in tl.static_range(1, PIECES):
        products += a[i] * b[i]
    return tl.sum(products, axis=1)


@triton.jit
def row_sums(a, PIECES: tl.constexpr):
    """Give Σ a of each row."""
    total = a[0]
    for i in tl.static_range(1, PIECES):
        total += a[i]
    return tl.sum(total, axis=1)


@triton.jit
def row_dots_and_sums(a, b, PIECES: tl.constexpr):
    """Give Σ a · b and Σ a of each row, in one reduction: two would wait at twice the barriers."""
    products, total = times(a[0], b[0], _ONE_A_LANE), a[0]
    for i in tl.static_range(1, PIECES):
        products += a[i] * b[i]
        total += a[i]
    return tl.split(tl.sum(tl.join(products, total), axis=1))


@triton.jit
def _mean(total, D):
    """Divide by D, rounding to nearest."""
    # Triton's own division of float32 may be two units off, which a large mean would show.
    if total.dtype == tl.float32:
        mean = tl.div_rn(total, tl.cast(D, tl.float32))
    else:
        mean = total / D
    return mean


@triton.jit
def _centred(x, mean, D, BLOCK_D: tl.constexpr, PIECES: tl.constexpr):
    """Subtract the mean; beyond D keep the zeros, which add nothing to the squares."""
    blocks = no_blocks()
    for i in tl.static_range(PIECES):
        in_d = (i * BLOCK_D + tl.arange(0, BLOCK_D) < D)[None, :]
        blocks += (tl.where(in_d, x[i] - mean[:, None], 0.0),)
    return blocks


@triton.jit
def _scale(weight, OFFSET: tl.constexpr, COMPUTE: tl.constexpr):
    """Give offset + weight. To add zero is an addition too, so a norm without offset has None."""
    scale = weight.to(COMPUTE)
    if OFFSET is not None:
        scale += OFFSET
    return scale


@triton.jit
def affine(xhat, weight, bias, OFFSET: tl.constexpr, DTYPE: tl.constexpr, CAST: tl.constexpr):
    """Scale and shift by what there is of weight and bias; CAST rounds to DTYPE before."""
    if CAST:
        xhat = xhat.to(DTYPE).to(xhat.dtype)
    if weight is not None:
        xhat *= _scale(weight, OFFSET, xhat.dtype)
    if bias is not None:
        xhat += bias.to(xhat.dtype)
    return xhat


@triton.jit(do_not_specialize=["N", "T"])
def _norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, s_ptr, mean_ptr, rstd_ptr,
    x_stride_n, residual_stride_n, N, D, T,
    EPS: tl.constexpr, OFFSET: tl.constexpr, CAST: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = row < N
    x = load_rows(x_ptr, x_stride_n, row, in_n, D, COMPUTE, BLOCK_D, PIECES)
    if residual_ptr is not None:
        residual = load_rows(
            residual_ptr, residual_stride_n, row, in_n, D, COMPUTE, BLOCK_D, PIECES
        )
    sample = None
    if T is not None:
        # In 32 bits, if all rows have such numbers: a division of 64 takes several times as long.
        sample = (tl.minimum(row, N - 1).to(N.dtype) // T).to(tl.int64)
    EARLY: tl.constexpr = mean_ptr is None and bias_ptr is None
    if EARLY:
        # Asked for before the reduction, it arrives meanwhile.
        weight = load_row_features(weight_ptr, D, BLOCK_N, BLOCK_D, PIECES, sample)

    if residual_ptr is not None:
        s = no_blocks()
        for i in tl.static_range(PIECES):
            col = i * BLOCK_D + tl.arange(0, BLOCK_D)
            inside = in_n[:, None] & (col < D)[None, :]
            block = (x[i] + residual[i]).to(DTYPE)
            tl.store(s_ptr + row[:, None] * D + col[None, :], block, mask=inside)
            s += (block.to(COMPUTE),)
        x = s
    if mean_ptr is not None:
        mean = _mean(row_sums(x, PIECES), D)
        x = _centred(x, mean, D, BLOCK_D, PIECES)
        # Far from zero the mean, as rounded, leaves one.
        squares, left = row_dots_and_sums(x, x, PIECES)
        left /= D
        variance = squares / D - left * left
        tl.store(mean_ptr + row, mean + left, mask=in_n)
    else:
        variance = row_dots(x, x, PIECES) / D
    rstd = 1.0 / tl.sqrt(variance + EPS)
    tl.store(rstd_ptr + row, rstd, mask=in_n)

    for i in tl.static_range(PIECES):
        col = i * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = in_n[:, None] & (col < D)[None, :]
        xhat = x[i] * rstd[:, None]
        if mean_ptr is not None:
            xhat -= (left * rstd)[:, None]
        if EARLY:
            weight_i = weight[i] if weight_ptr is not None else None
            bias_i = None
        else:
            # Asked for now: beside a row that is held in float32 through the reductions, they would
            # take the registers of every second program.
            weight_i = _load_row_block(weight_ptr, col, D, BLOCK_N, sample)
            bias_i = _load_row_block(bias_ptr, col, D, BLOCK_N, sample)
        y = affine(xhat, weight_i, bias_i, OFFSET, DTYPE, CAST)
        tl.store(y_ptr + row[:, None] * D + col[None, :], y, mask=inside)


@triton.jit
def _load_sum(x_ptr, residual_ptr, col, D, DTYPE: tl.constexpr, COMPUTE: tl.constexpr):
    """Load a block of one row of x, or of x + residual rounded as s is."""
    x = tl.load(x_ptr + col, mask=col < D, other=0.0).to(COMPUTE)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + col, mask=col < D, other=0.0).to(COMPUTE)
        x = (x + residual).to(DTYPE).to(COMPUTE)
    return x


@triton.jit(do_not_specialize=["T"])
def _norm_fwd_wide_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, s_ptr, mean_ptr, rstd_ptr,
    x_stride_n, residual_stride_n, D, T,
    EPS: tl.constexpr, OFFSET: tl.constexpr, CAST: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride_n
    if residual_ptr is not None:
        residual_ptr += row * residual_stride_n
    if T is not None:
        weight_ptr = _of_sample(weight_ptr, row // T, D)
        bias_ptr = _of_sample(bias_ptr, row // T, D)

    mean, left = tl.zeros((1,), COMPUTE), tl.zeros((1,), COMPUTE)
    if mean_ptr is not None:
        sums = tl.zeros((BLOCK_D,), COMPUTE)
        for start in range(0, D, BLOCK_D):
            col = start + tl.arange(0, BLOCK_D)
            sums += _load_sum(x_ptr, residual_ptr, col, D, DTYPE, COMPUTE)
        mean += _mean(tl.sum(sums, axis=0), D)

    sums, squares = tl.zeros((BLOCK_D,), COMPUTE), tl.zeros((BLOCK_D,), COMPUTE)
    for start in range(0, D, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        x = _load_sum(x_ptr, residual_ptr, col, D, DTYPE, COMPUTE)
        centred = tl.where(col < D, x - mean, 0.0)
        sums += centred
        squares += centred * centred
    if mean_ptr is not None:
        # Far from zero the mean, as rounded, leaves one.
        left += tl.sum(sums, axis=0) / D
        tl.store(mean_ptr + row + tl.arange(0, 1), mean + left)
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / D - left * left + EPS)
    tl.store(rstd_ptr + row + tl.arange(0, 1), rstd)

    for start in range(0, D, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        in_d = col < D
        x = _load_sum(x_ptr, residual_ptr, col, D, DTYPE, COMPUTE)
        if residual_ptr is not None:
            tl.store(s_ptr + row * D + col, x, mask=in_d)
        weight, bias = None, None
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + col, mask=in_d, other=0.0)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + col, mask=in_d, other=0.0)
        y = affine((x - mean - left) * rstd, weight, bias, OFFSET, DTYPE, CAST)
        tl.store(y_ptr + row * D + col, y, mask=in_d)


def cover(D: int, widest: int = 32768) -> tuple[int, int]:
    """Cover D with equal blocks, powers of two: how wide, and how many.

    The widest of which at most a quarter too much is needed, so that few lanes of a tile are empty.
    """
    block_d = min(widest, next_power_of_2(D))
    while block_d > 128 and 4 * block_d * cdiv(D, block_d) > 5 * D:
        block_d //= 2
    return block_d, cdiv(D, block_d)


def rows_config(D: int, itemsize: int, widest: int) -> dict:
    """About 8 KiB of each input a program, and at most four 16-byte loads of it a thread.

    Rows of more than `widest` bytes would leave room for one program only, whose loads would wait
    for its stores; they are read once more, out of the cache: one row a program, for those of four
    would not fit there. A configuration of these has no `PIECES`.
    """
    if widest // itemsize < D:
        return {"BLOCK_N": 1, "BLOCK_D": 4096, "num_warps": 8}
    block_d, pieces = cover(D)
    width = block_d * pieces
    block_n = min(32, 1 << max(0, (8192 // itemsize // width).bit_length() - 1))
    num_warps = min(16, max(4, next_power_of_2(block_n * width * itemsize // 2048)))
    return {"BLOCK_N": block_n, "BLOCK_D": block_d, "PIECES": pieces, "num_warps": num_warps}


def _fwd_config(D: int, itemsize: int, shifted: bool) -> dict:
    """About 8 KiB a program, where several blocks cover a row: each thread of four warps has four
    16-byte loads in flight.

    Rows of one block go 4 KiB at a time, 2 KiB where they are narrowest, 16 numbers a thread: the
    compiler puts a thread's second load behind what needs the first, so that fewer loads a thread
    and more programs are 5 to 10 % faster on an H200, 1 % for rows of 4096. Those that are shifted
    have 32 numbers a thread: the mean is another reduction, which fewer threads do sooner.

    The widest row that stays in registers has 32 numbers a thread of a full program. A wide one
    that is centred or gets a bias is in blocks of 4096: no block's weight and bias are asked for
    before the last block is stored, so that 64 registers a thread are enough, and a multiprocessor
    takes two programs of 16 warps.

    Five blocks are 40 numbers a thread rather than 20, which would be loads of 8 bytes: half as
    many threads do what each does once, and one and a half times as many rows fit. On an H200 that
    gains 5 % where rows are centred, and loses 1 or 2 where wide ones are not.

    It depends on nothing but the width, so that another number of rows compiles nothing.
    """
    if 65536 // itemsize < D:
        return {"BLOCK_D": 8192, "num_warps": 16}
    exact = D & -D
    block_d, pieces = (exact, D // exact) if exact >= 512 and 7 * exact >= D else cover(D)
    if shifted and D > 8192:
        block_d = min(block_d, 4096)
        pieces = cdiv(D, block_d)
    width = block_d * pieces
    program = 8192 if pieces > 1 else 4096 if width > 128 else 2048
    block_n = min(32, 1 << max(0, (program // itemsize // width).bit_length() - 1))
    fewest = 2 if shifted and width <= 1024 else 4
    a_thread = 16 if pieces == 1 and width <= 4096 and not shifted else 32
    num_warps = min(32, max(fewest, next_power_of_2(block_n * width // (32 * a_thread))))
    if pieces == 5 and (shifted or D < 2048):
        num_warps = min(num_warps, max(1, block_n * block_d * itemsize // 512))
    return {"BLOCK_N": block_n, "BLOCK_D": block_d, "PIECES": pieces, "num_warps": num_warps}


@functools.lru_cache(MOST)
def _norm_fwd_with(
    D: int, dtype: torch.dtype, shifted: bool, eps: float, offset: float | None, cast: bool
) -> Bound:
    config = _fwd_config(D, dtype.itemsize, shifted)
    return Bound(
        _norm_fwd_kernel if "PIECES" in config else _norm_fwd_wide_kernel,
        EPS=eps, OFFSET=offset, CAST=cast, COMPUTE=triton_dtype(accumulator(dtype)), **config,
    )  # fmt: skip


def _rows_of_a_sample(N: int, D: int, weight: Tensor | None) -> int | None:
    """How many of N rows share a weight (..., D); None: all."""
    if weight is None or weight.dim() == 1 or weight.numel() == D:
        return None
    return N * D // weight.numel()


def norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float | None,
    cast: bool,
    centred: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Give y, s if there is a residual, the mean if rows are centred, and rstd.

    Weight and bias are (D,), or (..., D) with a row for each sample of equally many rows of x.
    """
    y = dense_like(x)
    s = None if residual is None else dense_like(x)
    rstd = per_row(x, accumulator(x.dtype))
    mean = torch.empty_like(rstd) if centred else None

    if has_work(y):
        N, D = rstd.numel(), x.shape[-1]
        x, x_stride_n = rows_of(x)
        residual, residual_stride_n = (None, 0) if residual is None else rows_of(residual)
        weight, bias = unit_stride(weight), unit_stride(bias)
        T = _rows_of_a_sample(N, D, weight)
        shifted = centred or bias is not None
        kernel = _norm_fwd_with(D, x.dtype, shifted, eps, offset or None, cast)
        block_n = kernel.constants.get("BLOCK_N")
        # A program of a wide row need not know N.
        grid, sizes = ((cdiv(N, block_n),), (N, D, T)) if block_n else ((N,), (D, T))
        kernel(
            grid, x, residual, weight, bias, y, s, mean, rstd,
            x_stride_n, residual_stride_n, *sizes,
        )  # fmt: skip
    return y, s, mean, rstd


@triton.jit
def _strip_of(program, N, T):
    """Give a program's sample, where the rows of that begin and end, and the number of its strip.

    The first strips of all samples come first: their shares, one after the other, are a row of the
    sums of all samples.
    """
    sample, begin, end, nth = 0, 0, N, program
    if T is not None:
        samples = N // T
        sample, nth = program % samples, program // samples
        begin, end = sample * T, (sample + 1) * T
    return sample, begin, end, nth


@triton.jit(do_not_specialize=["N", "strip", "T"])
def _norm_bwd_kernel(
    x_ptr, weight_ptr, mean_ptr, rstd_ptr, dy_ptr, ds_ptr, dx_ptr, dweight_part_ptr, dbias_part_ptr,
    x_stride_n, dy_stride_n, ds_stride_n, N, D, strip, T,
    OFFSET: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
    STAGES: tl.constexpr, HOLD_WEIGHT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample, begin, end, nth = _strip_of(program, N, T)
    if T is not None:
        weight_ptr = _of_sample(weight_ptr, sample, D)
    if HOLD_WEIGHT:
        weight = load_row_features(weight_ptr, D, BLOCK_N, BLOCK_D, PIECES)
    # What no pointer asks for, the compiler leaves out.
    dweight, dbias = no_blocks(), no_blocks()
    for _ in tl.static_range(PIECES):
        dweight += (tl.zeros((BLOCK_N, BLOCK_D), COMPUTE),)
        dbias += (tl.zeros((BLOCK_N, BLOCK_D), COMPUTE),)

    for step in tl.range(0, strip, BLOCK_N, num_stages=STAGES):
        at = step + tl.arange(0, BLOCK_N)
        row = begin + nth * strip + at
        in_n = (row < end) & (at < strip)
        x = load_rows(x_ptr, x_stride_n, row, in_n, D, COMPUTE, BLOCK_D, PIECES)
        dy = load_rows(dy_ptr, dy_stride_n, row, in_n, D, COMPUTE, BLOCK_D, PIECES)
        rstd = tl.load(rstd_ptr + row, mask=in_n, other=0.0)
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + row, mask=in_n, other=0.0)
        if not HOLD_WEIGHT:
            weight = load_row_features(weight_ptr, D, BLOCK_N, BLOCK_D, PIECES)

        xhat, g = no_blocks(), no_blocks()
        dweight_next, dbias_next = no_blocks(), no_blocks()
        for i in tl.static_range(PIECES):
            h = x[i]
            if mean_ptr is not None:
                h -= mean[:, None]
            xhat += (h * rstd[:, None],)
            dweight_next += (dweight[i] + dy[i] * xhat[i],)
            dbias_next += (dbias[i] + dy[i],)
            if weight_ptr is not None:
                g += (dy[i] * _scale(weight[i], OFFSET, COMPUTE),)
            else:
                g += (dy[i],)
        dweight, dbias = dweight_next, dbias_next

        if dx_ptr is not None:
            if mean_ptr is not None and PIECES > 1:
                dots, sums = row_dots_and_sums(g, xhat, PIECES)
                along, level = (dots / D)[:, None], (sums / D)[:, None]
            else:
                # Of one block all numbers are live at once, and do not fit twice.
                if mean_ptr is not None:
                    level = (row_sums(g, PIECES) / D)[:, None]
                along = (row_dots(g, xhat, PIECES) / D)[:, None]
            for i in tl.static_range(PIECES):
                col = i * BLOCK_D + tl.arange(0, BLOCK_D)
                inside = in_n[:, None] & (col < D)[None, :]
                dx = g[i] - xhat[i] * along
                if mean_ptr is not None:
                    dx -= level
                dx *= rstd[:, None]
                if ds_ptr is not None:
                    ds_row = ds_ptr + row[:, None] * ds_stride_n
                    dx += tl.load(ds_row + col[None, :], mask=inside, other=0.0).to(COMPUTE)
                tl.store(dx_ptr + row[:, None] * D + col[None, :], dx, mask=inside)

    for i in tl.static_range(PIECES):
        col = i * BLOCK_D + tl.arange(0, BLOCK_D)
        part = program * D + col
        if dweight_part_ptr is not None:
            tl.store(dweight_part_ptr + part, tl.sum(dweight[i], axis=0), mask=col < D)
        if dbias_part_ptr is not None:
            tl.store(dbias_part_ptr + part, tl.sum(dbias[i], axis=0), mask=col < D)


@triton.jit
def _load_xhat_g(
    x_ptr, weight_ptr, dy_ptr, mean, rstd, col, D, OFFSET: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """Load a block of one row of x̂ and of g."""
    in_d = col < D
    x = tl.load(x_ptr + col, mask=in_d, other=0.0).to(COMPUTE)
    g = tl.load(dy_ptr + col, mask=in_d, other=0.0).to(COMPUTE)
    if weight_ptr is not None:
        g *= _scale(tl.load(weight_ptr + col, mask=in_d, other=0.0), OFFSET, COMPUTE)
    return (x - mean) * rstd, g


@triton.jit(do_not_specialize=["T"])
def _norm_bwd_wide_dx_kernel(
    x_ptr, weight_ptr, mean_ptr, rstd_ptr, dy_ptr, ds_ptr, dx_ptr,
    x_stride_n, dy_stride_n, ds_stride_n, D, T,
    OFFSET: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride_n
    dy_ptr += row * dy_stride_n
    if T is not None:
        weight_ptr = _of_sample(weight_ptr, row // T, D)
    rstd = tl.load(rstd_ptr + row)
    mean = tl.zeros((1,), COMPUTE)
    if mean_ptr is not None:
        mean += tl.load(mean_ptr + row)

    dots, sums = tl.zeros((BLOCK_D,), COMPUTE), tl.zeros((BLOCK_D,), COMPUTE)
    for start in range(0, D, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        xhat, g = _load_xhat_g(x_ptr, weight_ptr, dy_ptr, mean, rstd, col, D, OFFSET, COMPUTE)
        dots += g * xhat
        sums += g
    along, level = tl.sum(dots, axis=0) / D, tl.sum(sums, axis=0) / D

    for start in range(0, D, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        xhat, g = _load_xhat_g(x_ptr, weight_ptr, dy_ptr, mean, rstd, col, D, OFFSET, COMPUTE)
        dx = g - xhat * along
        if mean_ptr is not None:
            dx -= level
        dx *= rstd
        if ds_ptr is not None:
            dx += tl.load(ds_ptr + row * ds_stride_n + col, mask=col < D, other=0.0).to(COMPUTE)
        tl.store(dx_ptr + row * D + col, dx, mask=col < D)


@triton.jit(do_not_specialize=["N", "strip", "T"])
def _norm_bwd_wide_dweight_kernel(
    x_ptr, mean_ptr, rstd_ptr, dy_ptr, dweight_part_ptr, dbias_part_ptr,
    x_stride_n, dy_stride_n, N, D, strip, T,
    COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(D, BLOCK_D)
    program = (tl.program_id(0) // blocks).to(tl.int64)
    _, begin, end, nth = _strip_of(program, N, T)
    col = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = col < D
    dweight, dbias = (tl.zeros((BLOCK_N, BLOCK_D), COMPUTE), tl.zeros((BLOCK_N, BLOCK_D), COMPUTE))

    for step in tl.range(0, strip, BLOCK_N, num_stages=STAGES):
        at = step + tl.arange(0, BLOCK_N)
        row = begin + nth * strip + at
        in_n = (row < end) & (at < strip)
        inside = in_n[:, None] & in_d[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride_n + col[None, :], mask=inside, other=0.0)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride_n + col[None, :], mask=inside, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=in_n, other=0.0)[:, None]

        x, dy = x.to(COMPUTE), dy.to(COMPUTE)
        if mean_ptr is not None:
            x -= tl.load(mean_ptr + row, mask=in_n, other=0.0)[:, None]
        dweight += dy * x * rstd
        dbias += dy

    if dweight_part_ptr is not None:
        tl.store(dweight_part_ptr + program * D + col, tl.sum(dweight, axis=0), mask=in_d)
    if dbias_part_ptr is not None:
        tl.store(dbias_part_ptr + program * D + col, tl.sum(dbias, axis=0), mask=in_d)


@triton.jit
def add_parts(part_ptr, out_ptr, P, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    col = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_P, BLOCK_D), part_ptr.dtype.element_ty)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < P)[:, None] & (col < D)[None, :]
        part = part_ptr + p[:, None].to(tl.int64) * D + col[None, :]
        total += tl.load(part, mask=inside, other=0.0)

    out = tl.sum(total, axis=0)
    if out_ptr.dtype.element_ty != tl.float64:
        # By way of float32: Triton's interpreter cannot round float64 to bfloat16.
        out = out.to(tl.float32)
    tl.store(out_ptr + col, out, mask=col < D)


@triton.jit(do_not_specialize=["P"])
def _add_parts_kernel(
    part_ptr, out_ptr, more_part_ptr, more_out_ptr, P, D,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        add_parts(part_ptr, out_ptr, P, D, BLOCK_P, BLOCK_D)
    elif more_part_ptr is not None:
        add_parts(more_part_ptr, more_out_ptr, P, D, BLOCK_P, BLOCK_D)


def add_parts_config(D: int) -> dict:
    """Few columns a program, so that there are many of them: each has all its loads in flight.

    That many columns are those of many samples, of whose sums there are few parts each.
    """
    block_d = 16 if D <= 2048 else 32 if D <= 65536 else 128
    return {"BLOCK_D": block_d, "BLOCK_P": 4096 // block_d, "num_warps": 8}


@functools.lru_cache(MOST)
def _add_parts_with(D: int) -> Bound:
    return Bound(_add_parts_kernel, **add_parts_config(D))


def sums_of_parts(
    parts: Sequence[Tensor | None], like: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Add each of `parts` (P, D) in a fixed order and round it once, to the dtype of its like."""
    sums = [None if p is None else dense_like(t) for p, t in zip(parts, like, strict=True)]
    given = [pair for pair in zip(parts, sums, strict=True) if pair[0] is not None]
    if given:
        (part, out), (more_part, more_out) = given[0], given[1] if given[1:] else (None, None)
        P, D = part.shape
        add = _add_parts_with(D)
        grid = cdiv(D, add.constants["BLOCK_D"]), len(given)
        add(grid, part, out, more_part, more_out, P, D)
    return sums


# Of the launch that sums dweight or dbias alone.
_APART = {"BLOCK_N": 8, "BLOCK_D": 256, "STAGES": 2, "num_warps": 4}


def _dbias_is_apart(D: int, centred: bool) -> bool:
    """Whether x̂, g and the share of dweight leave no registers for that of dbias, which is then
    summed by a launch of its own: that reads dy again, a third of what was read and written.
    """
    return centred and D > 12288


def _bwd_config(D: int, itemsize: int, centred: bool, modulated: bool = False) -> dict:
    """16 to 24 numbers a thread: x̂, g and the share of dweight are live at once, four bytes each.

    Half of a multiprocessor's threads, or fewer, have registers for that: `per_sm` programs. While
    one adds up its rows, the next rows of all of them are on their way, two steps ahead where they
    take two bytes an element. A row of 1152 has a program of its own and 1280 lanes: of 2048 nearly
    half would be empty, and instructions take longer than the memory. Beyond 8192 columns a row
    takes all registers, in blocks of which a thread has few numbers at a time, and the weight is
    read anew for each row. A modulated norm would need a few registers more, and reads such rows
    several times.
    """
    if 32768 // itemsize < D or (modulated and D > 8192):
        return {"BLOCK_D": 4096, "num_warps": 8, "per_sm": 1}
    if _dbias_is_apart(D, centred):
        return _bwd_tile(1, 16384, 1, 1, 32, 1)
    if D > 8192:
        block_d, pieces = cover(D, 4096)
        return _bwd_tile(
            1, block_d, pieces, 1, min(32, next_power_of_2(block_d * pieces // 512)), 1
        )
    stages = 3 if itemsize == 2 else 2
    if D <= 256:
        # Of one column the sum would be a product, which the compiler subtracts without rounding
        # it: of g − mean(g) that leaves what g was rounded by.
        block_d = max(2, next_power_of_2(D))
        return _bwd_tile(min(32, 1024 // block_d), block_d, 1, stages, 2, 4)
    block_d, pieces = cover(D, 8192)
    if D <= 1024 or (D <= 2048 and pieces == 1):
        block_d = next_power_of_2(D)
        return _bwd_tile(4096 // block_d, block_d, 1, stages, 8, 2)
    width = block_d * pieces
    if width == 4096:
        return _bwd_tile(2, block_d, pieces, stages, 16, 1)
    warps = next_power_of_2(max(2, width // 768))
    return _bwd_tile(1, block_d, pieces, stages, warps, max(1, 8 // warps))


def _bwd_tile(n: int, block_d: int, pieces: int, stages: int, warps: int, per_sm: int) -> dict:
    tile = {"BLOCK_N": n, "BLOCK_D": block_d, "PIECES": pieces}
    held = {"STAGES": stages, "HOLD_WEIGHT": stages > 1}
    return tile | held | {"num_warps": warps, "per_sm": per_sm}


def strips_of(N: int, block_n: int, programs: int) -> tuple[int, int]:
    """Divide N rows among at most so many programs: how many there are, and how long a strip is."""
    strip = block_n * cdiv(N, block_n * programs)
    return cdiv(N, strip), strip


@functools.lru_cache(MOST)
def _norm_bwd_with(
    D: int, dtype: torch.dtype, centred: bool, modulated: bool, most: int, offset: float | None
) -> tuple[Bound, int, int]:
    """Give the kernel, of a wide row the one of dx, its rows a step, no more than `most`, and its
    programs on a chip's multiprocessor.
    """
    config = _bwd_config(D, dtype.itemsize, centred, modulated)
    per_sm = config.pop("per_sm")
    held = "PIECES" in config
    if held:
        config["BLOCK_N"] = min(config["BLOCK_N"], most)
    kernel = Bound(
        _norm_bwd_kernel if held else _norm_bwd_wide_dx_kernel,
        OFFSET=offset, COMPUTE=triton_dtype(accumulator(dtype)), **config,
    )  # fmt: skip
    return kernel, config.get("BLOCK_N", 8), per_sm


def _strips_of_samples(N: int, T: int | None, block_n: int, at_once: int) -> tuple[int, int]:
    """Divide N rows among programs that run at once; no strip has rows of two samples, T rows each.

    Where samples do not fill the chip, shorter strips may, though all of them do not run at once.
    """
    if T is None:
        return strips_of(N, block_n, at_once)
    samples = N // T
    ways = [strips_of(T, block_n, max(1, turns * at_once // samples)) for turns in (1, 2, 3)]
    strips, strip = min(ways, key=lambda way: cdiv(samples * way[0], at_once) * way[1])
    return samples * strips, strip


def norm_bwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dy: Tensor,
    ds: Tensor | None,
    offset: float | None,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Give dx, dweight and dbias, each if it is needed; x is what was normalised."""
    dx = dense_like(x) if need_dx else None
    like = [weight if need_dweight else None, bias if need_dbias else None]
    if not has_work(x):
        dweight, dbias = (None if t is None else dense_like(t).zero_() for t in like)
        return dx, dweight, dbias

    N, D = rstd.numel(), x.shape[-1]
    x, x_stride_n = rows_of(x)
    dy, dy_stride_n = rows_of(dy)
    ds, ds_stride_n = (None, 0) if ds is None else rows_of(ds)
    weight, mean, rstd = unit_stride(weight), unit_stride(mean), unit_stride(rstd)
    T = _rows_of_a_sample(N, D, weight)
    modulated = T is not None or (bias is not None and offset is not None)
    most = 32 if T is None else next_power_of_2(T)
    kernel, block_n, per_sm = _norm_bwd_with(
        D, x.dtype, mean is not None, modulated, most, offset or None
    )
    strides, held = (x_stride_n, dy_stride_n, ds_stride_n), "PIECES" in kernel.constants
    apart = (not held, not held or _dbias_is_apart(D, mean is not None))
    at_once = per_sm * sm_count(x.device)
    programs, strip = _strips_of_samples(N, T, block_n, at_once)
    with_dx, sums = _new_parts(like, [not a for a in apart], programs, N, D, T, rstd.dtype)

    if not held and need_dx:
        kernel((N,), x, weight, mean, rstd, dy, ds, dx, *strides, D, T)
    if held and any(t is not None for t in (dx, *with_dx)):
        kernel((programs,), x, weight, mean, rstd, dy, ds, dx, *with_dx, *strides, N, D, strip, T)
    if not sums:
        with_dx = sums_of_parts(with_dx, like)
    if not any(a and t is not None for a, t in zip(apart, like, strict=True)):
        dweight, dbias = with_dx
        return dx, dweight, dbias

    # Long strips of few columns: in a short one most of the time is the wait for the first rows.
    columns = cdiv(D, _APART["BLOCK_D"])
    at_once = max(1, 8 * sm_count(x.device) // columns)
    programs, strip = _strips_of_samples(N, T, _APART["BLOCK_N"], at_once)
    alone, sums = _new_parts(like, apart, programs, N, D, T, rstd.dtype)
    launch(
        _norm_bwd_wide_dweight_kernel, (columns * programs,),
        x, mean, rstd, dy, *alone, x_stride_n, dy_stride_n, N, D, strip, T,
        COMPUTE=kernel.constants["COMPUTE"], **_APART,
    )  # fmt: skip
    if not sums:
        alone = sums_of_parts(alone, like)
    dweight, dbias = (t if u is None else u for t, u in zip(with_dx, alone, strict=True))
    return dx, dweight, dbias


def _new_parts(
    like: Sequence[Tensor | None], which: Sequence[bool], programs: int,
    N: int, D: int, T: int | None, compute: torch.dtype,
) -> tuple[list[Tensor | None], bool]:  # fmt: skip
    """Memory for the shares of programs of some gradients, and whether these are the sums already.

    A program that has all rows of its sample has the sum. Triton's interpreter cannot round that of
    float64 to bfloat16.
    """
    samples = 1 if T is None else N // T
    sums = samples == programs > 1 and compute == torch.float32
    wanted = [t if w else None for t, w in zip(like, which, strict=True)]
    if sums:
        return [None if t is None else dense_like(t) for t in wanted], True
    shape = programs // samples, samples * D
    return [None if t is None else t.new_empty(*shape, dtype=compute) for t in wanted], False


def check_norm(op: str, x: Tensor, eps: float, **features: Tensor | None) -> None:
    """Check the arguments that all norms share; `features` are None or have one value a column."""
    check.floating(op, "x", x)
    check.at_least_1d(op, "x", x)
    for name, t in features.items():
        if t is not None:
            check.floating(op, name, t)
            check.shape(op, name, t, x.shape[-1:], "the last size of `x`")
            check.device(op, name, t, x, "x")
    check.number(op, "eps", eps, "be a number", True)
