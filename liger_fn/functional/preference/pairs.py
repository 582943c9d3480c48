"""What losses of (chosen, rejected) pairs share: their checks, their sums, and what they report."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from liger_fn.functional.core import check

Metrics = dict[str, Tensor]
REDUCTIONS = ("none", "mean", "sum")


def check_per_sequence(op: str, named: Mapping[str, Any]) -> None:
    """Check that all are floating point and of shape (B,), that of the first."""
    first_name, first = next(iter(named.items()))
    for name, logps in named.items():
        check.floating(op, name, logps)
        if logps.dim() != 1:
            check.fail(op, name, "have shape (B,), one per sequence", check.spell(logps.shape))
        check.shape(op, name, logps, first.shape, f"that of `{first_name}`")


def check_smoothing(op: str, label_smoothing: float, below: float = 1.0) -> None:
    check.number(op, "label_smoothing", label_smoothing, "be a number", True)
    if not 0 <= label_smoothing < below:
        check.fail(op, "label_smoothing", f"be in [0, {below})", label_smoothing)


def check_positive(op: str, name: str, value: float) -> None:
    check.number(op, name, value, "be positive", value is not None and value > 0)


def smoothed_sigmoid(margin: Tensor, label_smoothing: float) -> Tensor:
    """−(1 − ε) · log σ(margin) − ε · log σ(−margin)."""
    loss = -F.logsigmoid(margin)
    if label_smoothing:
        loss = loss * (1.0 - label_smoothing) - F.logsigmoid(-margin) * label_smoothing
    return loss


def reduced(loss: Tensor, reduction: str) -> Tensor:
    """The mean over no pairs is 0, as every other empty batch's."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / max(1, loss.shape[0])


def reward_metrics(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Metrics:
    """The trainers' metrics of rewards."""
    chosen, rejected = chosen_rewards.detach(), rejected_rewards.detach()
    return {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype).mean(),
        "rewards/margins": (chosen - rejected).mean(),
    }


def logp_metrics(chosen_logps: Tensor, rejected_logps: Tensor) -> Metrics:
    return {
        "logps/chosen": chosen_logps.detach().mean(),
        "logps/rejected": rejected_logps.detach().mean(),
    }


def with_nll(
    op: str, loss: Tensor, nll: Tensor | None, weight: float, metrics: Metrics
) -> tuple[Tensor, Metrics]:
    """Add the weighted likelihood term, if there is one."""
    if nll is None:
        return loss, metrics
    check.floating(op, "nll", nll)
    check.shape(op, "nll", nll, (), "a scalar")
    return loss + weight * nll, metrics | {"nll_loss": nll.detach()}


def is_scalar(x: Any) -> bool:
    return isinstance(x, (int, float)) or (isinstance(x, torch.Tensor) and x.dim() == 0)
