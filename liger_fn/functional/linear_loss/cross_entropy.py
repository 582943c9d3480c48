"""Cross entropy of a linear head, some rows of logits at a time.

    logits = x · weightᵀ + bias         loss = Σ_rows w_row · cross_entropy(logits, y)

    g  = dloss/dlogits                  dweight = gᵀ · x
    dx = g · weight                     dbias   = Σ_rows g

`logits` and `g` share one buffer, in the dtype of x; the kernel of loss/cross_entropy.py writes g
over the logits. All else is matrix products: 2·N·H·V operations for the loss, 4·N·H·V for the
gradients. Where those of products.py can be had, N is the number of rows that count, and a loss
without gradients needs no logits in memory at all.

A weighted sum has one upstream number, so its gradients are made in the forward pass, for an
upstream of 1 (`unit_dx`, `unit_dweight`, `unit_dbias`; only those wanted), and the backward pass
multiplies them by the true one. A mean is the sum with weights of one over the count, so its
upstream number is 1 as a rule: the backward pass then has nothing to do.

Losses by row have an upstream number each. Forward keeps `lse`, 4 bytes a row, and the logits
themselves if they fit in the buffer; if not, backward makes them again, another 2·N·H·V operations.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.direct import launch
from liger_fn.functional.core.launch import (
    accumulator,
    cdiv,
    has_work,
    sm_count,
    tl,
    triton,
    unit_stride,
)
from liger_fn.functional.core.rules import dtype_inside
from liger_fn.functional.linear_loss.chunks import (
    Limits,
    among_all,
    check_head,
    check_memory,
    dtypes_as_given,
    first_valid,
    logits_again,
    logits_of,
    logits_to_keep,
    new_kept,
    pull_back,
    rows_of_head,
    width_of,
)
from liger_fn.functional.linear_loss.products import Counted
from liger_fn.functional.linear_loss.statistics import statistics
from liger_fn.functional.loss.cross_entropy import (
    check_options,
    launch_rows,
    reduced,
    reference_rows,
    weight_of,
)
from liger_fn.functional.loss.logprobs import new_rows


def reference(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    chunk_size: int | None = None,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    num_items: Tensor | float | None = None,
    max_valid: int | None = None,
    memory_budget: int | None = None,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    options: dict[str, Any] = {
        "class_weight": class_weight,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "logit_scale": logit_scale,
    }
    loss = reference_rows(F.linear(x, weight, bias), y, **options)
    if reduction == "mean" and num_items is not None:
        return loss.sum() / num_items
    return reduced(loss, y, class_weight, ignore_index, reduction)


def reference_of_rows(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    chunk_size: int | None,
    memory_budget: int | None,
    wide: bool,
    keep: bool,
    **options: Any,
) -> Tensor:
    return reference_rows(F.linear(x, weight, bias), y, **options)


def reference_of_sum(row_weight: Tensor | None, **arguments: Any) -> Tensor:
    loss = reference_of_rows(keep=False, **arguments)
    return loss.sum() if row_weight is None else (loss * row_weight.to(loss.dtype)).sum()


# The entries of g are probabilities: in a large vocabulary they lie where float16 has few bits left
# or none. 256 times as large they do not, and cannot overflow unless class weight, logit scale and
# z-loss together take an entry to 255.
def unit_of(dtype: torch.dtype) -> float:
    """What gradients of inputs of `dtype` are held as multiples of."""
    return 256.0 if dtype is torch.float16 else 1.0


def narrowest(dtype: torch.dtype) -> torch.dtype:
    """The narrowest dtype that holds gradients of inputs of `dtype` whatever multiplies them."""
    return torch.float32 if dtype is torch.float16 else dtype


def fused_linear_cross_entropy_fwd(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    chunk_size: int | None,
    memory_budget: int | None,
    wide: bool,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    need_dweight: bool,
    need_dx: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    V, acc = weight.shape[0], accumulator(x.dtype)
    held = acc if wide else narrowest(x.dtype)
    # The sum over no rows is 0; other sums are written before they are read.
    make = x.new_empty if has_work(y) else x.new_zeros
    unit_dweight = make(weight.shape, dtype=held) if need_dweight else None
    unit_dx = make(x.shape, dtype=narrowest(x.dtype)) if need_dx else None
    unit_dbias = make((V,), dtype=acc) if need_dbias else None
    if not has_work(y):
        return x.new_zeros((), dtype=acc), unit_dweight, unit_dx, unit_dbias

    loss = sum_over_chunks(
        weight, x, y, bias, class_weight, row_weight, Limits(chunk_size, memory_budget),
        (ignore_index, label_smoothing, z_loss, softcap, logit_scale),
        unit_dweight, unit_dx, unit_dbias,
    )  # fmt: skip
    return loss, unit_dweight, unit_dx, unit_dbias


def sum_over_chunks(
    weight: Tensor, x: Tensor, y: Tensor, bias: Tensor | None,
    class_weight: Tensor | None, row_weight: Tensor | None, limits: Limits, options: tuple,
    dweight: Tensor | None, dx: Tensor | None, dbias: Tensor | None, onto: bool = False,
) -> Tensor:  # fmt: skip
    """Give the loss, and write the gradients that are given; with `onto`, add to dweight."""
    (V, H), N = weight.shape, y.numel()
    chunks = limits.plan(N, weight, dweight)
    head = rows_of_head(weight, x.reshape(N, H), y.reshape(-1), options[0], dweight=dweight)
    row_weight = None if row_weight is None else row_weight.reshape(-1)
    needed = any(t is not None for t in (dweight, dx, dbias))
    plain = class_weight is None and options[1] == 0.0
    if isinstance(head, Counted) and plain and not needed:
        each, _ = _without_logits(weight, bias, head, *options[2:])
        if row_weight is not None:
            each = torch.where(y.reshape(-1).long() == options[0], 0.0, each * row_weight)
        return each.sum()

    row_weight = None if row_weight is None else head.in_order(row_weight)
    dx = None if dx is None else dx.view(N, H)
    loss, lse = x.new_empty((2, N), dtype=accumulator(x.dtype))
    buffer = x.new_empty((chunks.rows, width_of(V)))
    with dtypes_as_given(x.device):
        for rows, logits in logits_of(weight, bias, head, chunks.slices(N), buffer):
            launch_rows(
                logits, head.y[rows], class_weight, lse[rows], *options,
                loss=loss[rows], dloss=None if row_weight is None else row_weight[rows],
                dlogits=logits if needed else None,
                unit=unit_of(x.dtype), width=buffer.shape[1],
            )  # fmt: skip
            pull_back(logits, weight, head, rows, dweight, dx, dbias, onto)
    return loss.sum()


def _without_logits(
    weight: Tensor, bias: Tensor | None, head: Counted,
    z_loss: float, softcap: float | None, logit_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Give loss and lse of each row, (N,), where the rows are, of losses without class weights."""
    rows = new_rows(head.x, head.y.shape, with_entropy=False, with_top1=False)
    statistics(weight, bias, head, softcap, logit_scale, rows)
    logp, lse, *_ = rows
    loss = 0.0 - logp
    # Not 0 times a square that is out of range.
    return loss if z_loss == 0.0 else loss + z_loss * lse.square(), lse


@triton.jit
def _times_scalar_kernel(
    unit_ptr, scalar_ptr, out_ptr, n, strip,
    UNIT: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    scalar = tl.load(scalar_ptr) / UNIT
    first = tl.program_id(0).to(tl.int64) * strip
    strip = tl.where(scalar == 1.0, 0, strip) if IN_PLACE else strip
    for start in range(0, strip, BLOCK):
        i = first + start + tl.arange(0, BLOCK)
        unit = tl.load(unit_ptr + i, mask=i < n, other=0.0)
        tl.store(out_ptr + i, unit * scalar, mask=i < n)


def times_scalar(unit: Tensor, scalar: Tensor, dtype: torch.dtype, donated: bool) -> Tensor:
    """Multiply the gradients of a unit upstream by the true one, which stays on the device.

    Memory that is given away takes the product: then a factor of 1 costs nothing.
    """
    in_place = donated and unit.dtype is dtype and unit.is_contiguous()
    out = unit if in_place else unit.new_empty(unit.shape, dtype=dtype)
    if has_work(out):
        n, factor, block = out.numel(), unit_of(dtype), 4096
        programs = min(cdiv(n, block), 16 * sm_count(out.device))
        strip = cdiv(cdiv(n, programs), block) * block
        launch(
            _times_scalar_kernel, (cdiv(n, strip),),
            unit_stride(unit), scalar, out, n, strip,
            UNIT=factor, IN_PLACE=in_place, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return out


def fused_linear_cross_entropy_bwd(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    unit_dweight: Tensor | None,
    unit_dx: Tensor | None,
    unit_dbias: Tensor | None,
    dloss: Tensor,
    chunk_size: int | None,
    memory_budget: int | None,
    wide: bool,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    need_dweight: bool,
    need_dx: bool,
    need_dbias: bool,
    donated: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (
        times_scalar(unit_dweight, dloss, x.dtype, donated) if need_dweight else None,
        times_scalar(unit_dx, dloss, x.dtype, donated) if need_dx else None,
        times_scalar(unit_dbias, dloss, x.dtype, donated) if need_dbias else None,
    )


_of_sum = custom_vjp(
    "fused_linear_cross_entropy",
    reference=reference_of_sum,
    fwd=fused_linear_cross_entropy_fwd,
    bwd=fused_linear_cross_entropy_bwd,
    results="loss",
    residuals="unit_dweight unit_dx unit_dbias",
    grads="weight x bias",
    rows="x y row_weight unit_dx",
    sums="unit_dweight unit_dbias",
    autocast="weight x bias",
)


def fused_linear_cross_entropy_rows_fwd(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    chunk_size: int | None,
    memory_budget: int | None,
    wide: bool,
    keep: bool,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    need_dweight: bool,
    need_dx: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    H, N = x.shape[-1], y.numel()
    loss = x.new_empty(y.shape, dtype=accumulator(x.dtype))
    lse = torch.empty_like(loss)
    kept = new_kept(x, y.shape, weight, keep and (need_dweight or need_dx or need_dbias))

    if has_work(loss):
        head = rows_of_head(weight, x.reshape(N, H), y.reshape(-1), ignore_index, kept)
        needed = need_dweight or need_dx or need_dbias
        plain = class_weight is None and label_smoothing == 0.0
        if isinstance(head, Counted) and plain and not needed:
            each = _without_logits(weight, bias, head, z_loss, softcap, logit_scale)
            return each[0].view(loss.shape), each[1].view(loss.shape), kept
        each_loss, each_lse = head.new_numbers(loss.view(-1), lse.view(-1))
        limits = Limits(chunk_size, memory_budget)
        with dtypes_as_given(x.device):
            for rows, logits in logits_to_keep(weight, bias, head, limits, kept):
                launch_rows(
                    logits, head.y[rows], class_weight, each_lse[rows],
                    ignore_index, label_smoothing, z_loss, softcap, logit_scale,
                    loss=each_loss[rows], width=logits.stride(0),
                )  # fmt: skip
        head.put_back((each_loss, each_lse), (loss.view(-1), lse.view(-1)))
    return loss, lse, kept


def fused_linear_cross_entropy_rows_bwd(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    lse: Tensor,
    kept: Tensor,
    dloss: Tensor,
    chunk_size: int | None,
    memory_budget: int | None,
    wide: bool,
    keep: bool,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    need_dweight: bool,
    need_dx: bool,
    need_dbias: bool,
    donated: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    (V, H), N = weight.shape, y.numel()
    held = lse.dtype if wide else x.dtype
    make = x.new_empty if has_work(y) else x.new_zeros
    dweight = make(weight.shape, dtype=held) if need_dweight else None
    dx = make(x.shape) if need_dx else None
    dbias = make((V,), dtype=lse.dtype) if need_dbias else None

    if has_work(y):
        head = rows_of_head(weight, x.reshape(N, H), y.reshape(-1), ignore_index, kept)
        lse, dloss = head.in_order(lse.reshape(-1)), head.in_order(dloss.reshape(-1))
        each_dx = None if dx is None else dx.view(N, H)
        limits = Limits(chunk_size, memory_budget)
        with dtypes_as_given(x.device):
            for rows, logits, g in logits_again(weight, bias, head, limits, dweight, kept, donated):
                launch_rows(
                    logits, head.y[rows], class_weight, lse[rows],
                    ignore_index, label_smoothing, z_loss, softcap, logit_scale,
                    dloss=dloss[rows], dlogits=g, width=g.stride(0),
                )  # fmt: skip
                pull_back(g, weight, head, rows, dweight, each_dx, dbias)
    return (
        None if dweight is None else dweight.to(x.dtype),
        dx,
        None if dbias is None else dbias.to(x.dtype),
    )


_of_rows = custom_vjp(
    "fused_linear_cross_entropy_rows",
    reference=reference_of_rows,
    fwd=fused_linear_cross_entropy_rows_fwd,
    bwd=fused_linear_cross_entropy_rows_bwd,
    results="loss",
    residuals="lse kept",
    grads="weight x bias",
    rows="x y loss lse kept",
    autocast="weight x bias",
)


def items_of(
    num_items: Tensor | float | None,
    x: Tensor,
    y: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """What a mean divides by, on the device of x."""
    dtype = accumulator(x.dtype)
    if num_items is None:
        return weight_of(y, class_weight, ignore_index, dtype)
    if isinstance(num_items, Tensor):
        return num_items.detach().to(x.device, dtype)
    return torch.full((), num_items, device=x.device, dtype=dtype)


def check_items(op: str, num_items: Tensor | float | None, reduction: str) -> None:
    """Check what a mean divides by."""
    if num_items is None:
        return
    if reduction != "mean":
        check.fail(op, "num_items", 'be None unless `reduction` is "mean"', num_items)
    if isinstance(num_items, Tensor):
        check.shape(op, "num_items", num_items, (), "one number")
    else:
        check.number(op, "num_items", num_items, "be positive", num_items > 0)


def fused_linear_cross_entropy(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    chunk_size: int | None = None,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    num_items: Tensor | float | None = None,
    max_valid: int | None = None,
    memory_budget: int | None = None,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute the cross entropy of a linear head without holding its logits.

        loss = cross_entropy(x · weightᵀ + bias, y)

    Args:
        weight: (V, H), floating point: the head, as torch.nn.Linear holds it.
        x: (..., H), the dtype of weight (under autocast all are cast as F.linear casts them).
        y: (...), any integer dtype: the targets. A target outside [0, V) that is not ignore_index
            makes the loss and the gradients NaN.
        chunk_size: rows of logits held at once; None: what `memory_budget` allows. Results agree
            for every size up to rounding.
        bias: (V,), the dtype of weight; None: no bias.
        class_weight, ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale: as in
            `cross_entropy`; softcap and scale apply after the bias.
        num_items: what "mean" divides by, a number or a scalar tensor on any device, for those who
            average over more than this call; None: the (weighted) count of targets that count.
        max_valid: at most so many targets are not ignore_index, if the host knows; more of them
            make the loss NaN. Rows that do not count then take neither time nor memory. None: they
            take memory; and time, unless x has 16 bits and the chip is a Hopper, whose products
            ask the device how many rows count (but for logits that are kept for "none").
        memory_budget: bytes of logits held at once; None: 1.25 GiB; for a gradient of weight in 16
            bits the 4·V·H bytes of sums in float32 in addition, where only these leave no more than
            two chunks.
        accum_dtype: the dtype in which chunks add up, and in which the gradient of the weight of a
            mean or sum waits for the upstream one.
            None: the dtype of x (float32 for float16) for one chunk, or two of which the larger has
            56 % of the rows or more, or was chosen by `chunk_size`; float32 for others.

    Returns:
        float32 (float64 for float64 x): a scalar, or (...) for reduction "none".

    Raises:
        TypeError: weight, x, bias or class_weight is not floating point, their dtypes differ, y is
            not of an integer dtype, an option is no number.
        ValueError: a shape or device does not fit, an option is out of its range.

    Precision: logits and their gradients are rounded to the dtype of x, as F.linear rounds them;
        losses never are. Gradients are rounded as those of PyTorch's products where one chunk holds
        all rows; the sum of two, by default, errs 1.2 times as much (1.22 of halves); in float32 as
        little as one chunk. An upstream gradient of "mean" or "sum" that is no power of two rounds
        once more. float64 throughout for float64 inputs.
    Memory: above inputs and gradients, the logits of one chunk while a pass runs, and for sums in
        float32 another 4·V·H bytes (for those of two chunks in 16 bits 128 MiB, before Hopper). On
        Hopper also x once more (of halves a chunk's dx, too) and 17 MiB; but without gradients no
        logits, and V / 128 numbers a row instead, of at most 16384 rows at once.
        Until the backward pass live weight, x, y and, for "mean" and "sum", the wanted gradients;
        for "none" the logits if the budget holds all of them, else 4 bytes a row, and the backward
        pass makes them again. The reference, which is what runs on a CPU, holds all logits.
    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024; Hsu et al.,
        "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024 (gradients made forward).
    """
    op = "fused_linear_cross_entropy"
    check_head(op, weight, x, y, bias, chunk_size)
    check_options(
        op, x, "x", weight.shape[0], class_weight, ignore_index, reduction,
        label_smoothing, z_loss, softcap, logit_scale,
    )  # fmt: skip

    inside = dtype_inside(x)
    # Losses by row have their upstream numbers from the start: no gradient is held for another.
    narrow = inside if reduction == "none" else narrowest(inside)
    accumulators = (narrow, accumulator(inside))
    check_memory(op, max_valid, memory_budget, accum_dtype, accumulators, inside)
    check_items(op, num_items, reduction)

    whole, few = y.shape, max_valid is not None and max_valid < y.numel()
    if few:
        x, y, places, sound = first_valid(x, y, ignore_index, max_valid)
    # What the backward pass gets depends on these, so a compiler that leaves the number of rows
    # open gets what is right for all.
    limits = Limits(chunk_size, memory_budget)
    keep, wide = limits.one_chunk(y.numel(), weight), not limits.two_chunks(y.numel(), weight)
    if accum_dtype is not None:
        wide = accum_dtype is not narrow
    chunks = (chunk_size, memory_budget, wide)
    options = (ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    if reduction == "none":
        loss = _of_rows(weight, x, y, bias, class_weight, *chunks, keep, *options)
        if few:
            loss = among_all(loss * sound.to(loss.dtype), places, whole)
        return loss

    row_weight = items = None
    if reduction == "mean":
        items = items_of(num_items, x, y, class_weight, ignore_index)
        # In float16 the gradients of a mean would lose their low bits.
        if inside is not torch.float16:
            row_weight = items.reciprocal().expand(y.shape)
    loss = _of_sum(weight, x, y, bias, class_weight, row_weight, *chunks, *options)
    if items is not None and row_weight is None:
        loss = loss / items
    return loss * sound.to(loss.dtype) if few else loss
