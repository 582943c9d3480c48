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
from liger_fn.functional.core.kernels import exp_of
from liger_fn.functional.core.launch import cdiv, sm_count, tl, triton, unit_stride
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


@triton.jit(do_not_specialize=["first", "N", "V"])
def _statistics_kernel(
    x_desc, weight_desc, bias_ptr, y_ptr, count_ptr,
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
        z = tile_of_logits(x_desc, weight_desc, first, n, v, H, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K)

        at = n + tl.arange(0, BLOCK_M)
        live = at < counted
        t = tl.load(y_ptr + first + at, mask=live, other=-1).to(tl.int64)
        left, right = halves(z)
        zs = halves(left) + halves(right)
        WIDTH: tl.constexpr = BLOCK_N // 4
        top = tl.full((BLOCK_M,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        moment = tl.zeros((BLOCK_M,), tl.float32)
        best = tl.zeros((BLOCK_M,), tl.int32)
        # A quarter of the tile at a time: what is made of it has few registers.
        for q in tl.static_range(4):
            z = zs[q]
            col = v + q * WIDTH + tl.arange(0, WIDTH)
            if bias_ptr is not None:
                z += tl.load(bias_ptr + col, mask=col < V, other=0.0).to(tl.float32)[None, :]
            z = z.to(x_desc.dtype).to(tl.float32)
            z = tl.where((col < V)[None, :], scaled_and_capped(z, SCALE, CAP), float("-inf"))
            here = (t >= v + q * WIDTH) & (t < tl.minimum(v + q * WIDTH + WIDTH, V))
            # Few tiles hold the target of any of their rows.
            if tl.max(here.to(tl.int32), axis=0) > 0:
                z_t = tl.sum(tl.where(col[None, :] == t[:, None], z, 0.0), axis=1)
                tl.store(z_t_ptr + at, z_t, mask=here)
            peak = tl.max(z, axis=1)
            if best_ptr is not None:
                best = tl.where(peak > top, v + q * WIDTH + tl.argmax(z, axis=1), best)
            # Not below the lowest number: classes that are all forbidden then sum to 0.
            higher = tl.maximum(top, peak)
            rise = top - higher
            shrink = exp_of(rise)
            d = z - higher[:, None]
            e = exp_of(d)
            if moment_ptr is not None:
                # Where e is 0, d may be −∞.
                moment = shrink * moment + tl.where(shrink > 0.0, shrink * rise, 0.0) * total
                moment += tl.sum(e * tl.maximum(d, -1e4), axis=1)
            total = shrink * total + tl.sum(e, axis=1)
            top = higher
        out = column.to(tl.int64) * N + at
        tl.store(top_ptr + out, top, mask=live)
        tl.store(total_ptr + out, total, mask=live)
        if moment_ptr is not None:
            tl.store(moment_ptr + out, moment, mask=live)
        if best_ptr is not None:
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
    lowest = torch.finfo(torch.float32).min
    for first in range(0, N, most):
        size = min(most, N - first)
        # Triton's own launch, for it makes the chip's descriptors.
        by_triton(
            _statistics_kernel, (min(programs, cdiv(size, m) * columns),),
            descriptor(x, m, k), descriptor(weight, n, k), unit_stride(bias), y, head.count,
            *each, first, size, V, H, softcap, logit_scale, lowest,
            dtype_of_products(x), programs, **config,
        )  # fmt: skip
        launch(
            _combine_kernel, (cdiv(size, 32),),
            y, head.places, head.count, *each, *rows, first, size, V, columns,
            LOWEST=lowest, BLOCK_C=64, BLOCK_N=32, num_warps=4,
        )  # fmt: skip
