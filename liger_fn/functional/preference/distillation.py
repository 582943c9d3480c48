"""Distillation: a student's distribution of each token is drawn to a teacher's.

    p student, q teacher, m = (1 − β)·p + β·q

    jsd          β·KL(q ‖ m) + (1 − β)·KL(p ‖ m), and at the ends of β what the two lines below say
    forward_kl   KL(q ‖ p) = Σ q·(log q − log p), the jsd of β = 0
    reverse_kl   KL(p ‖ q) = Σ p·(log p − log q), the jsd of β = 1
    tvd          ½·Σ |p − q|

Distributions are given as log-probabilities over the vocabulary, or over K tokens of it, say the
teacher's likeliest; then what is left of both is one token more ("tail"), or is left out and the K
are scaled to a distribution ("renormalized").
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.preference.pairs import REDUCTIONS

SUPPORTS = ("full", "tail", "renormalized")


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q). Where p is 0 the term is 0, whatever q is."""
    impossible = log_p == -math.inf
    log_p, log_q = log_p.masked_fill(impossible, 0.0), log_q.masked_fill(impossible, 0.0)
    return (log_p.exp() * (log_p - log_q)).masked_fill(impossible, 0.0).sum(-1)


def _jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    if beta == 0:
        return _kl(log_q, log_p)
    if beta == 1:
        return _kl(log_p, log_q)
    # The logarithm of no probability at all has no derivative.
    neither = (log_p == -math.inf) & (log_q == -math.inf)
    log_m = torch.logaddexp(
        log_p.masked_fill(neither, 0.0) + math.log1p(-beta),
        log_q.masked_fill(neither, 0.0) + math.log(beta),
    )
    return beta * _kl(log_q, log_m) + (1.0 - beta) * _kl(log_p, log_m)


def _tvd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "jsd": _jsd,
    "forward_kl": lambda log_p, log_q, beta: _kl(log_q, log_p),
    "reverse_kl": lambda log_p, log_q, beta: _kl(log_p, log_q),
    "tvd": _tvd,
}


def _supported(log_p: Tensor, support: str) -> Tensor:
    """Make a distribution of the log-probabilities of some tokens."""
    if support == "full":
        return log_p
    total = log_p.logsumexp(-1, keepdim=True)
    if support == "renormalized":
        return log_p - total
    # Rounding may bring the sum to 1 or beyond, and then nothing is left.
    rest = torch.log(-torch.expm1(total.clamp(max=-1e-7)))
    return torch.cat([log_p, rest], -1)


def distillation_loss(
    student_logps: Tensor,
    teacher_logps: Tensor,
    mask: Tensor | None = None,
    *,
    divergence: str = "jsd",
    beta: float = 0.5,
    support: str = "full",
    num_items: Tensor | float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute a divergence of a student's distributions of tokens from a teacher's.

        loss = mean over tokens of β·KL(q ‖ m) + (1 − β)·KL(p ‖ m),  m = (1 − β)·p + β·q  for "jsd"

    with p the student's and q the teacher's; the others stand at the head of this function's file.

    Args:
        student_logps, teacher_logps: (..., V), floating point: log_softmax of logits, divided by a
            temperature perhaps; or (..., K), of the same K tokens. −inf is a probability of 0.
        mask: (...), the positions that count; None: all.
        divergence: "jsd", "forward_kl", "reverse_kl" or "tvd".
        beta: β of jsd, from 0 (forward KL) to 1 (reverse KL).
        support: "full": logps are of the whole vocabulary; of K tokens alone "tail": the rest is
            one token more; "renormalized": the rest is left out.
        num_items: what the sum is divided by for "mean"; None: the positions that count.
        reduction: "none": a loss per position, 0 where none counts; "sum"; "mean".

    Returns:
        A scalar, or (...), the dtype of student_logps.

    Raises:
        TypeError: logps are not floating point, an option is no number.
        ValueError: a shape does not fit, an option is unknown or out of its range.

    Precision: that of logps.
    Memory: a few tensors of the size of logps.
    Source: Agarwal et al., "On-Policy Distillation of Language Models", 2023, Eq. 1; Wen et al.,
        "f-Divergence Minimization for Sequence-Level Knowledge Distillation", 2023 (tvd).
    """
    op = "distillation_loss"
    for name, logps in (("student_logps", student_logps), ("teacher_logps", teacher_logps)):
        check.floating(op, name, logps)
        check.at_least_1d(op, name, logps)
    check.shape(op, "teacher_logps", teacher_logps, student_logps.shape, "that of `student_logps`")
    check.one_of(op, "divergence", divergence, tuple(DIVERGENCES))
    check.number(op, "beta", beta, "be between 0 and 1", beta is not None and 0 <= beta <= 1)
    check.one_of(op, "support", support, SUPPORTS)
    check.one_of(op, "reduction", reduction, REDUCTIONS)
    positions = student_logps.shape[:-1]
    if mask is None:
        counts = torch.ones(positions, dtype=torch.bool, device=student_logps.device)
    else:
        check.tensor(op, "mask", mask)
        check.shape(op, "mask", mask, positions, "that of `student_logps` without its last size")
        counts = mask != 0

    # What stands where nothing counts may be NaN, whose gradient no later mask would stop.
    log_p, log_q = (
        _supported(logps.masked_fill(~counts[..., None], -1.0), support)
        for logps in (student_logps, teacher_logps)
    )
    loss = DIVERGENCES[divergence](log_p, log_q, beta).masked_fill(~counts, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if num_items is None:
        num_items = counts.sum()
    if isinstance(num_items, Tensor):
        return loss.sum() / num_items.clamp(min=1)
    return loss.sum() / max(1.0, num_items)
