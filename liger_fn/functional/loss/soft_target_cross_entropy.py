"""Cross entropy of logits and target probabilities, in one pass over both each way.

    z    = logit_scale · x                top = max_v z_v
    lse  = top + log Σ_v exp(z_v − top)   p   = exp(z − lse)
    q    = (1 − ε) · target + ε/V         mass = Σ_v q_v
    loss = Σ_v q_v · (lse − z_v)

    dx_v      = dloss · logit_scale · (mass · p_v − q_v)
    dtarget_v = dloss · (1 − ε) · (lse − z_v)

with x the logits and ε the label smoothing. A target of 0 adds nothing, even if its logit is −∞.
Memory traffic in bytes per element of two 2-byte inputs: 4 forward (read both), 6 backward (read
both, write the gradient); the two parts of `lse`, apart because their sum loses digits where the
logits are far from 0, and `mass`, 12 bytes a row, are kept.
"""

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.direct import launch
from liger_fn.functional.core.kernels import columns_of, exp_of
from liger_fn.functional.core.launch import (
    cdiv,
    dense_like,
    has_work,
    next_power_of_2,
    tl,
    triton,
    triton_dtype,
    unit_stride,
)
from liger_fn.functional.loss import divergence
from liger_fn.functional.loss.cross_entropy import REDUCTIONS


def reference(
    logits: Tensor,
    target: Tensor,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
) -> Tensor:
    loss = _reference(logits, target, label_smoothing, logit_scale)
    return divergence.reduced(loss, None, 0, reduction)


def _reference(
    logits: Tensor, target: Tensor, label_smoothing: float, logit_scale: float
) -> Tensor:
    compute = divergence.compute_dtype(logits, target)
    z = logits.to(compute) * logit_scale
    q = (1 - label_smoothing) * target.to(compute) + label_smoothing / logits.shape[-1]
    below = z.logsumexp(-1, keepdim=True) - z
    return (q * below.masked_fill((q == 0) & below.isinf(), 0.0)).sum(-1)


@triton.jit
def _smoothed(target, V, SMOOTHING: tl.constexpr):
    if SMOOTHING != 0.0:
        target = (1.0 - SMOOTHING) * target + tl.full((), SMOOTHING, target.dtype) / V
    return target


@triton.jit
def _soft_target_cross_entropy_fwd_kernel(
    logits_ptr, target_ptr, loss_ptr, top_ptr, log_sum_ptr, mass_ptr,
    logits_stride_b, logits_stride_t, target_stride_b, target_stride_t, T, V,
    SMOOTHING: tl.constexpr, SCALE: tl.constexpr, LOWEST: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += (row // T) * logits_stride_b + (row % T) * logits_stride_t
    target_ptr += (row // T) * target_stride_b + (row % T) * target_stride_t

    # Eight neighbours, which one thread loads, share a maximum and sums relative to it: an element
    # costs one exponential and few instructions more, no thread waits for another before the end of
    # the row, and what all logits have in common costs no digits.
    top = tl.full((BLOCK_V // 8,), LOWEST, COMPUTE)
    sums = tl.zeros((BLOCK_V // 8,), COMPUTE)
    masses = tl.zeros((BLOCK_V // 8,), COMPUTE)
    below = tl.zeros((BLOCK_V // 8,), COMPUTE)
    for start in range(0, V, BLOCK_V):
        col = start + columns_of(BLOCK_V)
        x = tl.load(logits_ptr + col, mask=col < V, other=float("-inf")).to(COMPUTE)
        q = tl.load(target_ptr + col, mask=col < V, other=0.0).to(COMPUTE)
        z = x * SCALE
        if SCALE <= 0.0:
            z = tl.where(col < V, z, float("-inf"))
        if SMOOTHING != 0.0 or target_ptr.dtype.element_ty == COMPUTE:
            # Triton 3.6 cannot compile the sum of a load that nothing has been done to.
            q = tl.where(col < V, _smoothed(q, V, SMOOTHING), 0.0)

        higher = tl.maximum(top, tl.max(z, axis=1))
        rise = higher - top
        below += tl.where(masses == 0.0, 0.0, masses * rise)
        d = z - higher[:, None]
        sums = sums * exp_of(rise, -1.0) + tl.sum(exp_of(d), axis=1)
        below -= tl.sum(tl.where(q == 0.0, 0.0, q * d), axis=1)
        masses += tl.sum(q, axis=1)
        top = higher

    highest = tl.max(top, axis=0)
    log_sum = tl.log(tl.sum(sums * exp_of(top - highest), axis=0))
    below += tl.where(masses == 0.0, 0.0, masses * ((highest - top) + log_sum))
    tl.store(loss_ptr + row, tl.sum(below, axis=0))
    tl.store(top_ptr + row, highest)
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(mass_ptr + row, tl.sum(masses, axis=0))


@triton.jit
def _soft_target_cross_entropy_bwd_kernel(
    logits_ptr, target_ptr, top_ptr, log_sum_ptr, mass_ptr, dloss_ptr, dlogits_ptr, dtarget_ptr,
    logits_stride_b, logits_stride_t, target_stride_b, target_stride_t, dloss_stride_n,
    T, V, slab,
    SMOOTHING: tl.constexpr, SCALE: tl.constexpr,
    NEED_DLOGITS: tl.constexpr, NEED_DTARGET: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += (row // T) * logits_stride_b + (row % T) * logits_stride_t
    target_ptr += (row // T) * target_stride_b + (row % T) * target_stride_t
    top, log_sum = tl.load(top_ptr + row), tl.load(log_sum_ptr + row)
    mass = tl.load(mass_ptr + row)
    dloss = tl.load(dloss_ptr + row * dloss_stride_n).to(COMPUTE)
    first = tl.program_id(1) * slab
    last = tl.minimum(first + slab, V)

    for start in range(first, last, BLOCK_V):
        col = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits_ptr + col, mask=col < last, other=0.0).to(COMPUTE)
        target = tl.load(target_ptr + col, mask=col < last, other=0.0).to(COMPUTE)
        z = x * SCALE
        q = _smoothed(target, V, SMOOTHING)

        if NEED_DLOGITS:
            dlogits = dloss * SCALE * (mass * exp_of((z - top) - log_sum) - q)
            tl.store(dlogits_ptr + row * V + col, dlogits, mask=col < last)
        if NEED_DTARGET:
            impossible = (q == 0.0) & (z == float("-inf"))
            below = tl.where(impossible, 0.0, (top - z) + log_sum)
            dtarget = dloss * (1.0 - SMOOTHING) * below
            tl.store(dtarget_ptr + row * V + col, dtarget, mask=col < last)


def _soft_target_cross_entropy_config(V: int) -> dict:
    """16 elements of each input a thread: four 16-byte loads are in flight."""
    block_v = max(8, min(next_power_of_2(V), 2048))
    return {"BLOCK_V": block_v, "num_warps": max(1, block_v // 512)}


_SLAB = 16384


def soft_target_cross_entropy_fwd(
    logits: Tensor, target: Tensor, label_smoothing: float, logit_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    compute = divergence.compute_dtype(logits, target)
    loss = logits.new_empty(logits.shape[:-1], dtype=compute)
    top, log_sum, mass = (torch.empty_like(loss) for _ in range(3))

    if has_work(loss):
        logits, target = divergence.batches(logits), divergence.batches(target)
        B, T, V = logits.shape
        launch(
            _soft_target_cross_entropy_fwd_kernel, (B * T,),
            logits, target, loss, top, log_sum, mass,
            logits.stride(0), logits.stride(1), target.stride(0), target.stride(1), T, V,
            SMOOTHING=label_smoothing, SCALE=logit_scale, LOWEST=torch.finfo(compute).min,
            COMPUTE=triton_dtype(compute), **_soft_target_cross_entropy_config(V),
        )  # fmt: skip
    return loss, top, log_sum, mass


def soft_target_cross_entropy_bwd(
    logits: Tensor,
    target: Tensor,
    top: Tensor,
    log_sum: Tensor,
    mass: Tensor,
    dloss: Tensor,
    label_smoothing: float,
    logit_scale: float,
    need_dlogits: bool,
    need_dtarget: bool,
) -> tuple[Tensor | None, Tensor | None]:
    dlogits = dense_like(logits) if need_dlogits else None
    dtarget = dense_like(target) if need_dtarget else None

    if has_work(logits) and (need_dlogits or need_dtarget):
        logits, target = divergence.batches(logits), divergence.batches(target)
        dloss = dloss.reshape(-1)
        B, T, V = logits.shape
        launch(
            _soft_target_cross_entropy_bwd_kernel, (B * T, cdiv(V, _SLAB)),
            logits, target, *(unit_stride(t) for t in (top, log_sum, mass)), dloss,
            dlogits, dtarget,
            logits.stride(0), logits.stride(1), target.stride(0), target.stride(1),
            dloss.stride(0), T, V, _SLAB,
            SMOOTHING=label_smoothing, SCALE=logit_scale,
            NEED_DLOGITS=need_dlogits, NEED_DTARGET=need_dtarget,
            COMPUTE=triton_dtype(mass.dtype), **_soft_target_cross_entropy_config(V),
        )  # fmt: skip
    return dlogits, dtarget


_soft_target_cross_entropy = custom_vjp(
    "soft_target_cross_entropy",
    reference=_reference,
    fwd=soft_target_cross_entropy_fwd,
    bwd=soft_target_cross_entropy_bwd,
    results="loss",
    residuals="top log_sum mass",
    grads="logits target",
    rows="logits target loss top log_sum mass",
)


def soft_target_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
) -> Tensor:
    """Compute the cross entropy of logits and target probabilities.

        z    = logit_scale · logits        q = (1 − ε) · target + ε / V
        loss = Σ_v q_v · (lse − z_v)

    with lse = log Σ_v exp z_v and ε the label smoothing. It is what torch.nn.functional's
    cross_entropy computes of targets that are probabilities, the classes in the last dimension.

    Args:
        logits: (..., V), floating point, any strides. They are left as they are.
        target: (..., V), probabilities, floating point, any strides; a row need not sum to 1. A
            target of 0 adds nothing, even where its logit is −∞ (torch gives NaN).
        reduction: "none": a loss per row; "sum"; "mean": over the rows, 0 if there is none.
        label_smoothing: ε above, between 0 and 1, as in torch.
        logit_scale: multiplies the logits; one over the temperature of a distillation.

    Returns:
        float32 (float64 if an input is): a scalar, or (...) for "none".

    Raises:
        TypeError: logits or target is not floating point, an option is no number.
        ValueError: target does not have the shape of logits, or lies on another device; there is no
            class; an option is out of its range.

    Precision: float32 throughout (float64 if an input is); every gradient is rounded once.
    Memory: logits, target and 12 bytes a row live until the backward pass, which allocates the
        gradients that are wanted.
    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016;
        Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.
    """
    op = "soft_target_cross_entropy"
    divergence.check_pair(op, logits, target, "logits")
    check.one_of(op, "reduction", reduction, REDUCTIONS)
    check.number(op, "logit_scale", logit_scale, "be a number", True)
    check.number(op, "label_smoothing", label_smoothing, "be a number", True)
    if not 0 <= label_smoothing <= 1:
        check.fail(op, "label_smoothing", "be between 0 and 1", label_smoothing)
    loss = _soft_target_cross_entropy(logits, target, label_smoothing, logit_scale)
    return divergence.reduced(loss, None, 0, reduction)
