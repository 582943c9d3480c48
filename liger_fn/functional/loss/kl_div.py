"""Kullback-Leibler divergence of a target from log probabilities. Kernels: divergence.py.

    loss    = Σ_v p_v · (log p_v − x_v)
    dx_v    = −dloss · p_v
    dp_v    = dloss · (log p_v + 1 − x_v)             dlog p_v = dloss · p_v · (log p_v + 1 − x_v)

with x the log probabilities and p the target. Memory traffic in bytes per element of 2-byte inputs:
4 forward (read both), 4 backward (read the target, write the gradient).
"""

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.loss import divergence

REDUCTIONS = ("none", "row", "batchmean", "sum", "mean")


def reference(
    input: Tensor, target: Tensor, *, reduction: str = "mean", log_target: bool = False
) -> Tensor:
    loss = _reference(input, target, log_target, reduction == "none")
    return _reduced(loss, input, reduction)


def _reference(input: Tensor, target: Tensor, log_target: bool, per_element: bool) -> Tensor:
    terms = divergence.reference_terms(input, target, _kind(log_target), 0.0)
    if per_element:
        return terms.to(torch.promote_types(input.dtype, target.dtype))
    return terms.sum(-1)


def _kind(log_target: bool) -> str:
    return "kl_log" if log_target else "kl"


def _reduced(loss: Tensor, input: Tensor, reduction: str) -> Tensor:
    if reduction in ("none", "row"):
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    return total / (input.shape[0] if reduction == "batchmean" else input.numel())


def kl_div_fwd(input: Tensor, target: Tensor, log_target: bool, per_element: bool) -> tuple[Tensor]:
    return divergence.divergence_fwd(input, target, None, _kind(log_target), 0.0, 0, per_element)


def kl_div_bwd(
    input: Tensor,
    target: Tensor,
    dloss: Tensor,
    log_target: bool,
    per_element: bool,
    need_dinput: bool,
    need_dtarget: bool,
) -> tuple[Tensor | None, Tensor | None]:
    return divergence.divergence_bwd(
        input, target, None, dloss, _kind(log_target), 0.0, 0, need_dinput, need_dtarget,
        per_element,
    )  # fmt: skip


_kl_div = custom_vjp(
    "kl_div",
    reference=_reference,
    fwd=kl_div_fwd,
    bwd=kl_div_bwd,
    results="loss",
    grads="input target",
    rows="input target loss",
)


def kl_div(
    input: Tensor, target: Tensor, *, reduction: str = "mean", log_target: bool = False
) -> Tensor:
    """Compute the Kullback-Leibler divergence of a target from log probabilities.

        loss = Σ_v p_v · (log p_v − input_v)

    Args:
        input: (..., V), log probabilities, floating point, any strides. They are left as they are.
        target: (..., V), probabilities p, or log p; floating point, any strides. A probability of 0
            adds nothing to the loss, whatever the input is (torch gives NaN where that is −∞).
        reduction: "none": a term per element; "row": a divergence per row, (...); "sum";
            "batchmean": the sum over the first size of input; "mean": the sum over the number of
            elements, torch's default, which is no divergence.
        log_target: target holds log p.

    Returns:
        float32 (float64 if an input is): a scalar, or (...) for "row"; for "none" (..., V) of the
        inputs' common dtype.

    Raises:
        TypeError: input or target is not a floating-point tensor.
        ValueError: target does not have the shape of input, or lies on another device; input has no
            class, or is a vector and reduction "batchmean"; the reduction is unknown.

    Precision: float32 throughout (float64 if an input is); every gradient is rounded once.
    Memory: input and target live until the backward pass, which allocates the gradients that are
        wanted.
    Source: Kullback and Leibler, "On Information and Sufficiency", 1951.
    """
    divergence.check_pair("kl_div", input, target)
    check.one_of("kl_div", "reduction", reduction, REDUCTIONS)
    if reduction == "batchmean" and input.dim() < 2:
        check.fail("kl_div", "input", "have a batch dimension for 'batchmean'", "a vector")
    loss = _kl_div(input, target, log_target, reduction == "none")
    return _reduced(loss, input, reduction)
