"""Log-probabilities of tokens under a linear head, C rows of logits at a time.

    logits = x · weightᵀ + bias         logp, lse, H, top1 = logprobs(logits, y)

    g  = Σ cotangent · ∂/∂logits        dweight = gᵀ · x
    dx = g · weight                     dbias   = Σ_rows g

Every row has upstream gradients of its own, which are known only in the backward pass. The logits
are kept for it if the buffer holds them all; if not, it makes them again. The kernel of
loss/logprobs.py writes g over them. 2·N·H·V operations forward, 4·N·H·V backward, or 6 of logits
made again. Kept beside these are x, weight, y and 8 bytes a row, 12 with the entropy. Without
gradients, where the products of products.py can be had, no logits are in memory at all.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.launch import accumulator, has_work
from liger_fn.functional.core.rules import dtype_inside
from liger_fn.functional.linear_loss.chunks import (
    Limits,
    among_all,
    check_head,
    check_memory,
    dtypes_as_given,
    first_valid,
    logits_again,
    logits_to_keep,
    new_kept,
    pull_back,
    rows_of_head,
)
from liger_fn.functional.linear_loss.products import Counted
from liger_fn.functional.linear_loss.statistics import statistics
from liger_fn.functional.loss.logprobs import (
    LogProbs,
    asked_for,
    check_classes,
    check_options,
    launch_bwd,
    launch_fwd,
    new_rows,
    reference_rows,
    tempered,
)


def reference(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    chunk_size: int | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    lse: bool = False,
    entropy: bool = False,
    top1: bool = False,
    max_valid: int | None = None,
    memory_budget: int | None = None,
    accum_dtype: torch.dtype | None = None,
) -> Tensor | LogProbs:
    scale, cap = tempered(logit_scale, softcap, temperature)
    logits = F.linear(x, weight, bias)
    rows = reference_rows(logits, y, cap, scale, ignore_index, entropy, top1)
    return asked_for(rows, lse, entropy, top1)


def reference_of_rows(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    chunk_size: int | None,
    memory_budget: int | None,
    wide: bool,
    keep: bool,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    with_entropy: bool,
    with_top1: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    logits = F.linear(x, weight, bias)
    return reference_rows(logits, y, softcap, logit_scale, ignore_index, with_entropy, with_top1)


def _flat(*ts: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.reshape(-1) for t in ts)


def _of_chunk(ts: tuple[Tensor | None, ...], rows: slice) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t[rows] for t in ts)


def fused_linear_logprobs_fwd(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    chunk_size: int | None,
    memory_budget: int | None,
    wide: bool,
    keep: bool,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    with_entropy: bool,
    with_top1: bool,
    need_dweight: bool,
    need_dx: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, ...]:
    of_all = new_rows(x, y.shape, with_entropy, with_top1)
    kept = new_kept(x, y.shape, weight, keep and (need_dweight or need_dx or need_dbias))

    if has_work(of_all[0]):
        x, y = x.reshape(y.numel(), x.shape[-1]), y.reshape(-1)
        head = rows_of_head(weight, x, y, ignore_index, kept)
        flat, limits = _flat(*of_all), Limits(chunk_size, memory_budget)
        if isinstance(head, Counted) and not (need_dweight or need_dx or need_dbias):
            statistics(weight, bias, head, softcap, logit_scale, flat)
            return *of_all, kept
        ordered = head.new_numbers(*flat)
        with dtypes_as_given(x.device):
            for rows, logits in logits_to_keep(weight, bias, head, limits, kept):
                launch_fwd(
                    logits, head.y[rows], softcap, logit_scale, ignore_index,
                    _of_chunk(ordered, rows), logits.stride(0),
                )  # fmt: skip
        head.put_back(ordered, flat)
    return *of_all, kept


def fused_linear_logprobs_bwd(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    chunk_size: int | None,
    entropy: Tensor | None,
    highest: Tensor,
    log_sum: Tensor,
    kept: Tensor,
    dlogp: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    dtop1: Tensor | None,
    memory_budget: int | None,
    wide: bool,
    keep: bool,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    with_entropy: bool,
    with_top1: bool,
    need_dweight: bool,
    need_dx: bool,
    need_dbias: bool,
    donated: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    # The sum over no rows is 0; other sums are written before they are read.
    make = x.new_empty if has_work(y) else x.new_zeros
    held = log_sum.dtype if wide else x.dtype
    dweight = make(weight.shape, dtype=held) if need_dweight else None
    dx = make(x.shape) if need_dx else None
    dbias = make(weight.shape[:1], dtype=log_sum.dtype) if need_dbias else None

    if has_work(y):
        x, y = x.reshape(y.numel(), x.shape[-1]), y.reshape(-1)
        head = rows_of_head(weight, x, y, ignore_index, kept)
        each_dx = None if dx is None else dx.view(x.shape)
        of_rows, cotangents = (
            tuple(None if t is None else head.in_order(t) for t in _flat(*numbers))
            for numbers in ((highest, log_sum, entropy), (dlogp, dlse, dentropy))
        )
        limits = Limits(chunk_size, memory_budget)
        with dtypes_as_given(x.device):
            for rows, logits, g in logits_again(weight, bias, head, limits, dweight, kept, donated):
                launch_bwd(
                    logits, head.y[rows], softcap, logit_scale, ignore_index,
                    _of_chunk(of_rows, rows), _of_chunk(cotangents, rows), g, g.stride(0),
                )  # fmt: skip
                pull_back(g, weight, head, rows, dweight, each_dx, dbias)
    return (
        None if dweight is None else dweight.to(x.dtype),
        dx,
        None if dbias is None else dbias.to(x.dtype),
    )


_fused_linear_logprobs = custom_vjp(
    "fused_linear_logprobs",
    reference=reference_of_rows,
    fwd=fused_linear_logprobs_fwd,
    bwd=fused_linear_logprobs_bwd,
    results="logp lse entropy top1",
    residuals="highest log_sum kept",
    grads="weight x bias",
    unused=True,
    rows="x y logp lse entropy top1 highest log_sum kept",
    autocast="weight x bias",
)


def fused_linear_logprobs(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    chunk_size: int | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    lse: bool = False,
    entropy: bool = False,
    top1: bool = False,
    max_valid: int | None = None,
    memory_budget: int | None = None,
    accum_dtype: torch.dtype | None = None,
) -> Tensor | LogProbs:
    """Compute the log-probability of each target under a linear head without holding its logits.

        logp = logprobs(x · weightᵀ + bias, y)

    Any loss that is a function of log-probabilities follows, `functional.preference` has those of
    the trainers: losses of log-probabilities need no kernels of their own.

    Args:
        weight: (V, H), floating point: the head, as torch.nn.Linear holds it.
        x: (..., H), the dtype of weight (under autocast all are cast as F.linear casts them).
        y: (...), any integer dtype: the targets. A target outside [0, V) that is not ignore_index
            makes its logp and the gradients NaN.
        chunk_size: rows of logits held at once; None: what `memory_budget` allows. Results agree
            for every size up to rounding.
        bias: (V,), the dtype of weight; None: no bias.
        temperature, logit_scale, softcap, ignore_index, lse, entropy, top1: as in `logprobs`; all
            apply after the bias.
        max_valid, memory_budget: as in `fused_linear_cross_entropy`: at most so many rows are not
            ignored, if the host knows (more of them make all but top1 NaN), and bytes of logits
            held at once. Logits that fit are kept for the backward pass, which is then a third
            shorter.
        accum_dtype: the dtype in which chunks add up; None: as in `fused_linear_cross_entropy`.

    Returns:
        logp (...), in float32 (float64 for float64 x), or LogProbs(logp, lse, entropy, top1) if
        more is asked for. All but top1 can be differentiated, with any upstream gradients.

    Raises:
        TypeError: weight, x or bias is not floating point, their dtypes differ, y is not of an
            integer dtype, an option is no number.
        ValueError: a shape or device does not fit, an option is out of its range.
        NotImplementedError: top1 of more than 2^24 classes.

    Precision: logits and their gradients are rounded to the dtype of x, as F.linear rounds them,
        whether or not a gradient is wanted; all else is float32 (float64 for float64 x), and the
        sums over chunks of rows are held as those of `fused_linear_cross_entropy`.
    Memory: one buffer of chunk_size · V logits while a pass runs; on Hopper, where no gradient is
        wanted, V / 64 numbers a row instead, of at most 16384 rows at once, and x once more.
        weight, x, y and 8 bytes a row (12 with the entropy) live until the backward pass, and the
        logits if the budget holds all of them; else it makes them again. Kept logits give their
        memory to their gradient, unless the graph is kept too or a compiler decides what is. The
        reference, which is what runs on a CPU, holds all logits.
    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024.
    """
    op = "fused_linear_logprobs"
    check_head(op, weight, x, y, bias, chunk_size)
    check_options(op, temperature, logit_scale, softcap, ignore_index)
    check_classes(op, "weight", weight.shape[0], x.dtype, top1)
    inside = dtype_inside(x)
    accumulators = (inside, accumulator(inside))
    check_memory(op, max_valid, memory_budget, accum_dtype, accumulators, inside)

    whole, few = y.shape, max_valid is not None and max_valid < y.numel()
    if few:
        x, y, places, sound = first_valid(x, y, ignore_index, max_valid)
    # A compiler that leaves the number of rows open gets what is right for all.
    limits, N = Limits(chunk_size, memory_budget), y.numel()
    wide = not limits.two_chunks(N, weight)
    if accum_dtype is not None:
        wide = accum_dtype is not inside
    scale, cap = tempered(logit_scale, softcap, temperature)
    rows: Any = _fused_linear_logprobs(
        weight, x, y, bias, chunk_size, memory_budget, wide, limits.one_chunk(N, weight),
        cap, scale, ignore_index, bool(entropy), bool(top1),
    )  # fmt: skip
    if few:
        *numbers, token = rows
        numbers = [
            None if t is None else among_all(t * sound.to(t.dtype), places, whole) for t in numbers
        ]
        rows = *numbers, None if token is None else among_all(token, places, whole, -1.0)
    return asked_for(rows, lse, entropy, top1)
