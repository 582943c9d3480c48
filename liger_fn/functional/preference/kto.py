"""Kahneman-Tversky optimisation: answers that are good or bad by themselves, without pairs.

z = β · (log π(y|x) − log π_ref(y|x))          z₀ = β · kl

kto                 λ_D · (1 − σ(z − z₀)) for good answers, λ_U · (1 − σ(z₀ − z)) for bad ones
apo_zero_unpaired   the same with z₀ = 0
"""

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.preference.pairs import (
    REDUCTIONS,
    Metrics,
    check_per_sequence,
    check_positive,
    reduced,
)

LOSSES = ("kto", "apo_zero_unpaired")


def kto_kl(kl_logps: Tensor, ref_kl_logps: Tensor) -> Tensor:
    """Estimate how far the policy is from the reference, from answers to other prompts.

        kl = max(0, mean(log π(y'|x) − log π_ref(y'|x)))

    Args:
        kl_logps, ref_kl_logps: (B,), floating point: mismatched pairs of prompt x and answer y'
            under the policy and under the reference, summed over tokens.

    Returns:
        A scalar, a constant: no gradient passes.

    Raises:
        TypeError: logps are not floating point.
        ValueError: a shape does not fit.

    Precision: that of logps.
    Memory: nothing lives until the backward pass.
    Source: Ethayarajh et al., "KTO", 2024, Section 4.2.
    """
    check_per_sequence("kto_kl", {"kl_logps": kl_logps, "ref_kl_logps": ref_kl_logps})
    return (kl_logps - ref_kl_logps).detach().mean().clamp(min=0.0)


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    kl: Tensor | float = 0.0,
    *,
    beta: float = 0.1,
    loss_type: str = "kto",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: str = "mean",
) -> tuple[Tensor, Metrics]:
    """Compute the loss of Kahneman-Tversky optimisation.

        loss = λ_D · (1 − σ(β · (ρ − kl))) for good answers, λ_U · (1 − σ(β · (kl − ρ))) for bad

    with ρ = log π(y|x) − log π_ref(y|x).

    Args:
        logps, ref_logps: (B,), floating point: sums over the tokens of each answer.
        labels: (B,), boolean: which answers are good.
        kl: a scalar, as `kto_kl` gives it, or (B,), one for each answer; a constant.
        beta: β.
        loss_type: "kto" or "apo_zero_unpaired", which is without kl.
        desirable_weight, undesirable_weight: λ_D and λ_U.
        reduction: "none": a loss per answer; "sum"; "mean".

    Returns:
        The loss, a scalar or (B,), and detached scalars by the names that TRL logs: kl,
        rewards/chosen, rewards/rejected, rewards/margins, logps/chosen, logps/rejected. The mean
        over no answers is NaN.

    Raises:
        TypeError: logps are not floating point, labels are not boolean, an option is no number.
        ValueError: a shape does not fit, an option is out of its range.

    Precision: that of logps.
    Memory: a few tensors of B numbers.
    Source: Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", 2024,
        Eq. 7; D'Oosterlinck et al., "Anchored Preference Optimization", 2024.
    """
    op = "kto_loss"
    check_per_sequence(op, {"logps": logps, "ref_logps": ref_logps})
    check.tensor(op, "labels", labels)
    if labels.dtype is not torch.bool:
        check.fail(op, "labels", "be boolean", labels.dtype, TypeError)
    check.shape(op, "labels", labels, logps.shape, "that of `logps`")
    if isinstance(kl, Tensor) and kl.dim():
        check.shape(op, "kl", kl, logps.shape, "that of `logps`, or be a scalar")
    check_positive(op, "beta", beta)
    check.one_of(op, "loss_type", loss_type, LOSSES)
    check.one_of(op, "reduction", reduction, REDUCTIONS)

    log_ratios = logps - ref_logps
    kl = kl.detach().to(logps.dtype) if isinstance(kl, Tensor) else logps.new_full((), kl)
    anchor = kl if loss_type == "kto" else torch.zeros_like(kl)
    shortfall = torch.where(labels, anchor - log_ratios, log_ratios - anchor)
    weight = torch.full_like(logps, desirable_weight).masked_fill(~labels, undesirable_weight)
    # 1 − σ(z) = σ(−z), without cancellation.
    loss = weight * torch.sigmoid(beta * shortfall)

    rewards, detached = beta * log_ratios.detach(), logps.detach()
    metrics = {
        "kl": kl.mean(),
        "rewards/chosen": _mean_where(labels, rewards),
        "rewards/rejected": _mean_where(~labels, rewards),
        "logps/chosen": _mean_where(labels, detached),
        "logps/rejected": _mean_where(~labels, detached),
    }
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return reduced(loss, reduction), metrics


def _mean_where(counts: Tensor, x: Tensor) -> Tensor:
    return torch.where(counts, x, 0.0).sum() / counts.sum()
