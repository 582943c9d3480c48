"""What is known of each row of a head's logits, without the logits, where no gradient is wanted.

    z = softcap · tanh(scale · (x · weightᵀ + bias) / softcap)         logp, lse, H, top1 of z

A tile of logits stays in the registers that sum it. Of each of its rows the highest z is written,
and Σ exp(z − highest), and for the entropy Σ exp(z − highest) · (z − highest): 8 to 16 bytes for
256 logits. A second kernel puts these together in a fixed order. Rows that do not count are not
multiplied. Logits are rounded to the dtype of x as those in memory are: with gradients and without
the same numbers come out, and the ratio of two policies that are one is 1.
"""

import torch
from torch import Tensor

from liger_fn.functional.core.direct import by_triton, launch
from liger_fn.functional.core.kernels import exp_of, no_blocks
from liger_fn.functional.core.launch import (
    cdiv,
    sm_count,
    tl,
    triton,
    unit_stride,
)
from liger_fn.functional.linear_loss.products import (
    Counted,
    descriptor,
    dtype_of_products,
    halves,
    rows_of_chunk,
    tile_of,
    tile_of_logits,
    tiles_config,
)
from liger_fn.functional.loss.cross_entropy import scaled_and_capped

# Rows at a time: of 128256 classes the numbers of their tiles then take 66 to 131 MB.
_ROWS = 16384


# Triton's own conversions there and back are taken one by one, in the unit that makes exponentials,
# and take as long as these.
_ROUND_TWO_BF16 = tl.constexpr("""{
    .reg .b32 pair;
    cvt.rn.bf16x2.f32 pair, $3, $2;
    shl.b32 $0, pair, 16;
    and.b32 $1, pair, 0xffff0000;
}""")
_ROUND_TWO_FP16 = tl.constexpr("""{
    .reg .b32 pair;
    .reg .b16 left, right;
    cvt.rn.f16x2.f32 pair, $3, $2;
    mov.b32 {left, right}, pair;
    cvt.f32.f16 $0, left;
    cvt.f32.f16 $1, right;
}""")


@triton.jit
def _rounded(z, DTYPE: tl.constexpr, OF_PRODUCTS: tl.constexpr):
    """Round to DTYPE, and stay in float32; products are in float32 where it is interpreted."""
    if OF_PRODUCTS.is_fp32():
        z = z.to(DTYPE).to(tl.float32)
    else:
        TWO: tl.constexpr = _ROUND_TWO_BF16 if DTYPE.is_bf16() else _ROUND_TWO_FP16
        z = tl.inline_asm_elementwise(TWO, "=f,=f,f,f", [z], tl.float32, True, 2)
    return z


@triton.jit(do_not_specialize=["first", "N", "V", "columns"])
def _targets_kernel(
    y_ptr, count_ptr, held_ptr, first, N, V, columns,
    BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write which quarters of a tile have the target of any of its rows, a bit each."""
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = at < rows_of_chunk(count_ptr, first, N)
    t = tl.load(y_ptr + first + at, mask=live, other=-1).to(tl.int64)
    quarter = tl.where(live & (t >= 0) & (t < V), t // WIDTH, -1).to(tl.int32)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    held = tl.zeros((BLOCK_C,), tl.int32)
    for q in tl.static_range(4):
        held |= tl.max((quarter[:, None] == 4 * c[None, :] + q).to(tl.int32), axis=0) << q
    tl.store(held_ptr + tl.program_id(0) * columns + c, held, mask=c < columns)


@triton.jit(do_not_specialize=["first", "N", "V"])
def _statistics_kernel(
    x_desc, weight_desc, bias_ptr, y_ptr, count_ptr, held_ptr,
    z_t_ptr, top_ptr, total_ptr, moment_ptr, best_ptr, first, N, V, H,
    CAP: tl.constexpr, SCALE: tl.constexpr, LOWEST: tl.constexpr,
    DTYPE: tl.constexpr, PROGRAMS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    counted = rows_of_chunk(count_ptr, first, N)
    rows, columns = tl.cdiv(counted, BLOCK_M), tl.cdiv(V, BLOCK_N)
    for i in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=True):
        row, column = tile_of(i, rows, columns, GROUP)
        n, v = row * BLOCK_M, column * BLOCK_N
        held = tl.load(held_ptr + row * columns + column)
        z = tile_of_logits(x_desc, weight_desc, first, n, v, H, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K)

        at = n + tl.arange(0, BLOCK_M)
        live = at < counted
        WIDTH: tl.constexpr = BLOCK_N // 4
        left, right = halves(z)
        raw, zs = halves(left) + halves(right), no_blocks()
        # A quarter of the tile at a time: what is made of it has few registers.
        for q in tl.static_range(4):
            z, start = raw[q], v + q * WIDTH
            col = start + tl.arange(0, WIDTH)
            if bias_ptr is not None:
                z += tl.load(bias_ptr + col, mask=col < V, other=0.0).to(tl.float32)[None, :]
            z = scaled_and_capped(_rounded(z, x_desc.dtype, DTYPE), SCALE, CAP)
            if start + WIDTH > V:
                z = tl.where((col < V)[None, :], z, float("-inf"))
            # Few quarters have the target of any of their rows.
            if (held >> q) & 1:
                t = tl.load(y_ptr + first + at, mask=live, other=-1).to(tl.int64)
                z_t = tl.sum(tl.where(col[None, :] == t[:, None], z, 0.0), axis=1)
                here = live & (t >= start) & (t < tl.minimum(start + WIDTH, V))
                tl.store(z_t_ptr + at, z_t, mask=here)
            zs += (z,)

        # Not below the lowest number: classes that are all forbidden then sum to 0.
        peaks = tl.maximum(tl.maximum(zs[0], zs[1]), tl.maximum(zs[2], zs[3]))
        top = tl.maximum(tl.max(peaks, axis=1), LOWEST)
        # One instruction takes z to the exponent of 2. What the rounded highest leaves is put right
        # in the sum. From 2³⁰ on, where that might be a power too high, numbers are 64 apart: exp
        # of a difference is 0 or 1, and the rate is that which leaves nothing.
        rate = tl.where(tl.abs(top) < 1073741824.0, 1.4426950408889634, 1.0)
        highest = top * rate
        totals = tl.zeros((BLOCK_M, WIDTH), tl.float32)
        moments = tl.zeros((BLOCK_M, WIDTH), tl.float32)
        for q in tl.static_range(4):
            power = tl.fma(zs[q], rate[:, None], -highest[:, None])
            e = tl.exp2(power)
            totals += e
            if moment_ptr is not None:
                # Where e is 0, the power may be −∞.
                moments += e * tl.maximum(power, -1e4)
        left_over = tl.fma(-top, rate, highest)
        correction = tl.exp2(left_over)
        total = tl.sum(totals, axis=1)
        out = column.to(tl.int64) * N + at
        tl.store(top_ptr + out, top, mask=live)
        tl.store(total_ptr + out, total * correction, mask=live)
        if moment_ptr is not None:
            moment = (tl.sum(moments, axis=1) + left_over * total) * correction / rate
            tl.store(moment_ptr + out, moment, mask=live)
        if best_ptr is not None:
            best = tl.zeros((BLOCK_M,), tl.int32)
            peak = tl.full((BLOCK_M,), LOWEST, tl.float32)
            for q in tl.static_range(4):
                here = tl.max(zs[q], axis=1)
                best = tl.where(here > peak, v + q * WIDTH + tl.argmax(zs[q], axis=1), best)
                peak = tl.maximum(peak, here)
            tl.store(best_ptr + out, best, mask=live)


@triton.jit(do_not_specialize=["first", "N", "V", "columns"])
def _combine_kernel(
    y_ptr, places_ptr, count_ptr, z_t_ptr, top_ptr, total_ptr, moment_ptr, best_ptr,
    logp_ptr, lse_ptr, entropy_ptr, top1_ptr, highest_ptr, log_sum_ptr, first, N, V, columns,
    LOWEST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    counted = rows_of_chunk(count_ptr, first, N)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = n < counted
    columns = tl.where(tl.program_id(0) * BLOCK_N < counted, columns, 0)

    tops = tl.full((BLOCK_C, BLOCK_N), LOWEST, tl.float32)
    for start in range(0, columns, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        at = c[:, None].to(tl.int64) * N + n[None, :]
        inside = (c < columns)[:, None] & live[None, :]
        tops = tl.maximum(tops, tl.load(top_ptr + at, mask=inside, other=LOWEST))
    highest = tl.where(live, tl.max(tops, axis=0), 0.0)

    totals = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    moments = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    firsts = tl.full((BLOCK_C, BLOCK_N), 2147483647, tl.int32)
    for start in range(0, columns, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        at = c[:, None].to(tl.int64) * N + n[None, :]
        inside = (c < columns)[:, None] & live[None, :]
        top = tl.load(top_ptr + at, mask=inside, other=LOWEST)
        total = tl.load(total_ptr + at, mask=inside, other=0.0)
        rise = top - highest[None, :]
        shrink = exp_of(rise)
        totals += shrink * total
        if moment_ptr is not None:
            moment = tl.load(moment_ptr + at, mask=inside, other=0.0)
            moments += shrink * moment + tl.where(shrink > 0.0, shrink * rise, 0.0) * total
        if best_ptr is not None:
            best = tl.load(best_ptr + at, mask=inside, other=2147483647)
            firsts = tl.minimum(firsts, tl.where(top == highest[None, :], best, 2147483647))

    total = tl.where(live, tl.sum(totals, axis=0), 1.0)
    log_sum = tl.log(total)
    t = tl.load(y_ptr + first + n, mask=live, other=-1).to(tl.int64)
    known = (t >= 0) & (t < V)
    z_t = tl.load(z_t_ptr + n, mask=live & known, other=0.0)
    logp = tl.where(known, (z_t - highest) - log_sum, float("nan"))
    place = tl.load(places_ptr + first + n, mask=n < N, other=0)
    tl.store(logp_ptr + place, tl.where(live, logp, 0.0), mask=n < N)
    tl.store(lse_ptr + place, highest + log_sum, mask=n < N)
    tl.store(highest_ptr + place, highest, mask=n < N)
    tl.store(log_sum_ptr + place, log_sum, mask=n < N)
    if moment_ptr is not None:
        entropy = tl.where(live, log_sum - tl.sum(moments, axis=0) / total, 0.0)
        tl.store(entropy_ptr + place, entropy, mask=n < N)
    if best_ptr is not None:
        token = tl.where(live, tl.min(firsts, axis=0), -1)
        tl.store(top1_ptr + place, token.to(tl.float32), mask=n < N)


def statistics(
    weight: Tensor,
    bias: Tensor | None,
    head: Counted,
    softcap: float | None,
    logit_scale: float,
    rows: tuple[Tensor | None, ...],
) -> None:
    """Write `rows`: those of loss/logprobs.py's new_rows, each (N,)."""
    config, programs = tiles_config(), sm_count(head.x.device)
    m, n, k = (config[f"BLOCK_{a}"] for a in "MNK")
    (V, H), N, columns = weight.shape, len(head.x), cdiv(weight.shape[0], n)
    x, y, (entropy, top1) = head.x, unit_stride(head.y), rows[2:4]
    most = min(N, _ROWS)
    make = head.x.new_empty
    z_t = make(most, dtype=torch.float32)
    top, total = (make((columns, most), dtype=torch.float32) for _ in range(2))
    moment = None if entropy is None else torch.empty_like(top)
    best = None if top1 is None else torch.empty_like(top, dtype=torch.int32)
    each = (z_t, top, total, moment, best)
    held = make((cdiv(most, m), columns), dtype=torch.int32)
    lowest = torch.finfo(torch.float32).min
    for first in range(0, N, most):
        size = min(most, N - first)
        launch(
            _targets_kernel, (cdiv(size, m), cdiv(columns, 256)),
            y, head.count, held, first, size, V, columns,
            BLOCK_M=m, WIDTH=n // 4, BLOCK_C=256, num_warps=8,
        )  # fmt: skip
        # Triton's own launch, for it makes the chip's descriptors.
        by_triton(
            _statistics_kernel, (min(programs, cdiv(size, m) * columns),),
            descriptor(x, m, k), descriptor(weight, n, k), unit_stride(bias), y, head.count, held,
            *each, first, size, V, H, softcap, logit_scale, lowest,
            dtype_of_products(x), programs, **config,
        )  # fmt: skip
        launch(
            _combine_kernel, (cdiv(size, 32),),
            y, head.places, head.count, *each, *rows, first, size, V, columns,
            LOWEST=lowest, BLOCK_C=64, BLOCK_N=32, num_warps=4,
        )  # fmt: skip
