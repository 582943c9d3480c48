"""Odds ratio preference optimisation: a likelihood term and the odds of chosen over rejected.

log odds(y) = log π̄(y) − log(1 − π̄(y))            log π̄: the average over tokens
z    = log odds(chosen) − log odds(rejected)
loss = nll − β · log σ(z)
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from liger_fn.functional.core import check
from liger_fn.functional.preference.pairs import (
    REDUCTIONS,
    Metrics,
    check_per_sequence,
    check_positive,
    logp_metrics,
    reduced,
    reward_metrics,
    with_nll,
)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − e^x) for x ≤ 0; each form where it is exact, and no gradient from where it is not."""
    threshold = -math.log(2.0)
    near = torch.log(-torch.expm1(x.clamp(min=threshold)))
    far = torch.log1p(-torch.exp(x.clamp(max=threshold)))
    return torch.where(x < threshold, far, near)


def orpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    nll: Tensor | None = None,
    *,
    beta: float = 0.1,
    reduction: str = "mean",
) -> tuple[Tensor, Metrics]:
    """Compute the loss of odds ratio preference optimisation.

        loss = nll − β · mean over pairs of log σ(log odds(chosen) − log odds(rejected))

    with log odds(y) = logp − log(1 − e^logp). There is no reference.

    Args:
        chosen_logps, rejected_logps: (B,), floating point: averages over the tokens of each
            sequence, below 0.
        nll: a scalar, the likelihood term: `nll_loss` of the chosen sequences, prompts included in
            the paper and in TRL; None: without it.
        beta: β, the paper's λ.
        reduction: "none": the odds term per pair, plus nll; "sum"; "mean".

    Returns:
        The loss, a scalar or (B,), and detached scalars by the names that TRL logs: rewards/chosen,
        rewards/rejected, rewards/accuracies, rewards/margins, logps/chosen, logps/rejected,
        log_odds_ratio, log_odds_chosen and, with nll, nll_loss.

    Raises:
        TypeError: logps or nll are not floating point, beta is no number.
        ValueError: a shape does not fit, an option is out of its range.

    Precision: that of logps; log(1 − e^logp) is exact to rounding for probabilities near 0 and 1.
    Memory: a few tensors of B numbers.
    Source: Hong et al., "ORPO: Monolithic Preference Optimization without Reference Model", 2024.
    """
    op = "orpo_loss"
    check_per_sequence(op, {"chosen_logps": chosen_logps, "rejected_logps": rejected_logps})
    check_positive(op, "beta", beta)
    check.one_of(op, "reduction", reduction, REDUCTIONS)

    log_odds = (chosen_logps - rejected_logps) - (
        _log1mexp(chosen_logps) - _log1mexp(rejected_logps)
    )
    ratio = F.logsigmoid(log_odds)
    metrics = reward_metrics(beta * chosen_logps, beta * rejected_logps)
    metrics |= logp_metrics(chosen_logps, rejected_logps)
    metrics |= {
        "log_odds_ratio": ratio.detach().mean(),
        "log_odds_chosen": log_odds.detach().mean(),
    }
    return with_nll(op, reduced(-beta * ratio, reduction), nll, 1.0, metrics)
