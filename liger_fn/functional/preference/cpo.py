"""Losses of pairs without a reference: CPO, SimPO, AlphaPO, TPO.

m = c − r, or (1 − e^(−αc))/α − (1 − e^(−αr))/α for AlphaPO

sigmoid   −(1−ε)·log σ(βm) − ε·log σ(−βm)                    Xu 2024 (CPO)
simpo     the same of βm − γ, on averages                     Meng 2024 (SimPO)
hinge     max(0, 1 − βm)                                      Zhao 2023 (SLiC)
ipo       (m − 1/2β)², on averages                            Azar 2023
"""

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.preference.pairs import (
    REDUCTIONS,
    Metrics,
    check_per_sequence,
    check_positive,
    check_smoothing,
    logp_metrics,
    reduced,
    reward_metrics,
    smoothed_sigmoid,
    with_nll,
)

LOSSES = ("sigmoid", "hinge", "ipo", "simpo")


def _reward(logps: Tensor, alpha: float) -> Tensor:
    return logps if alpha == 0 else -torch.expm1(-alpha * logps) / alpha


def cpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    nll: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
    alpha: float = 0.0,
    cpo_alpha: float = 1.0,
    reduction: str = "mean",
) -> tuple[Tensor, Metrics]:
    """Compute the loss of contrastive preference optimisation, or of one of its kin.

        loss = mean over pairs of −log σ(β · (c − r)) + cpo_alpha · nll             for "sigmoid"

    The other formulas stand at the head of this function's file. There is no reference.

    Args:
        chosen_logps, rejected_logps: (B,), floating point: sums over the tokens of each sequence
            for sigmoid and hinge, averages for simpo and ipo.
        nll: a scalar, the likelihood term: `nll_loss` of the chosen sequences (of the gold answers
            in TPO); None: without it.
        beta: β.
        loss_type: "sigmoid", "hinge", "ipo" or "simpo" (TPO's tpo-l).
        label_smoothing: ε of sigmoid and simpo, the probability that a label is wrong.
        simpo_gamma: γ, the margin that simpo asks for.
        alpha: α of AlphaPO; 0: rewards are log-probabilities.
        cpo_alpha: the weight of nll.
        reduction: "none": a loss per pair, plus the weighted nll; "sum"; "mean".

    Returns:
        The loss, a scalar or (B,), and detached scalars by the names that TRL logs: rewards/chosen,
        rewards/rejected, rewards/accuracies, rewards/margins, logps/chosen, logps/rejected and,
        with nll, nll_loss.

    Raises:
        TypeError: logps or nll are not floating point, an option is no number.
        ValueError: a shape does not fit, an option is out of its range.

    Precision: that of logps.
    Memory: a few tensors of B numbers.
    Source: Xu et al., "Contrastive Preference Optimization", 2024; Meng et al., "SimPO", 2024;
        Gupta et al., "AlphaPO", 2025; Saeidi et al., "Triple Preference Optimization", 2024.
    """
    return _pair_loss(
        "cpo_loss", chosen_logps, rejected_logps, nll, beta, loss_type, label_smoothing,
        simpo_gamma, alpha, cpo_alpha, reduction,
    )  # fmt: skip


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    nll: Tensor | None = None,
    *,
    beta: float = 0.1,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    alpha: float = 0.0,
    nll_weight: float = 1.0,
    reduction: str = "mean",
) -> tuple[Tensor, Metrics]:
    """Compute the loss of simple preference optimisation.

        loss = mean over pairs of −log σ(β · (c̄ − r̄) − γ) + nll_weight · nll

    with c̄ and r̄ the average log-probabilities of chosen and rejected tokens.

    Args:
        chosen_logps, rejected_logps: (B,), floating point: averages over tokens, as
            `sequence_logps(..., average=True)` gives them.
        nll: a scalar, a likelihood term; None, as in the paper: without it.
        beta: β.
        gamma: γ, the margin asked for; not divided by β.
        label_smoothing: the probability that a label is wrong.
        alpha: α of AlphaPO's reward (1 − e^(−αc̄))/α; 0: c̄ itself.
        nll_weight: the weight of nll.
        reduction: "none": a loss per pair, plus the weighted nll; "sum"; "mean".

    Returns:
        As `cpo_loss`.

    Raises:
        TypeError: logps or nll are not floating point, an option is no number.
        ValueError: a shape does not fit, an option is out of its range.

    Precision: that of logps.
    Memory: a few tensors of B numbers.
    Source: Meng et al., "SimPO: Simple Preference Optimization with a Reference-Free Reward", 2024.
    """
    return _pair_loss(
        "simpo_loss", chosen_logps, rejected_logps, nll, beta, "simpo", label_smoothing,
        gamma, alpha, nll_weight, reduction,
    )  # fmt: skip


def _pair_loss(
    op: str,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    nll: Tensor | None,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    gamma: float,
    alpha: float,
    nll_weight: float,
    reduction: str,
) -> tuple[Tensor, Metrics]:
    check_per_sequence(op, {"chosen_logps": chosen_logps, "rejected_logps": rejected_logps})
    check_positive(op, "beta", beta)
    check.one_of(op, "loss_type", loss_type, LOSSES)
    check_smoothing(op, label_smoothing)
    if label_smoothing and loss_type not in ("sigmoid", "simpo"):
        check.fail(op, "label_smoothing", f"be 0 for {loss_type}", label_smoothing)
    check.one_of(op, "reduction", reduction, REDUCTIONS)

    chosen_rewards = _reward(chosen_logps, alpha)
    rejected_rewards = _reward(rejected_logps, alpha)
    margin = beta * (chosen_rewards - rejected_rewards)
    if loss_type == "simpo":
        loss = smoothed_sigmoid(margin - gamma, label_smoothing)
    elif loss_type == "hinge":
        loss = torch.relu(1.0 - margin)
    elif loss_type == "ipo":
        loss = (chosen_rewards - rejected_rewards - 1.0 / (2.0 * beta)).square()
    else:
        loss = smoothed_sigmoid(margin, label_smoothing)

    metrics = reward_metrics(beta * chosen_rewards, beta * rejected_rewards)
    metrics |= logp_metrics(chosen_logps, rejected_logps)
    return with_nll(op, reduced(loss, reduction), nll, nll_weight, metrics)
