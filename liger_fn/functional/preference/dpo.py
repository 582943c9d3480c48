"""Direct preference optimisation and its kin, of log-probabilities of pairs.

    c̃ = log π(chosen) − log π_ref(chosen)        r̃ = log π(rejected) − log π_ref(rejected)
    Δ = f'(e^c̃) − f'(e^r̃), which is c̃ − r̃ for the reverse KL divergence

    sigmoid       −log σ(βΔ)                                     Rafailov 2023
    cdpo          −(1−ε)·log σ(βΔ) − ε·log σ(−βΔ)                Mitchell 2023
    hinge         max(0, 1 − βΔ)                                 Zhao 2023 (SLiC)
    ipo           (c/|c| − r/|r| − 1/2β)²                        Azar 2023, Eq. 17
    robust        (−(1−ε)·log σ(βΔ) + ε·log σ(−βΔ)) / (1 − 2ε)   Chowdhury 2024
    exo_pair      KL(softmax(βΔ, 0) ‖ (1−ε, ε))                  Ji 2024, Eq. 16
    nca_pair      −log σ(βc̃) − ½·log σ(−βc̃) − ½·log σ(−βr̃)       Chen 2024
    bco_pair      −log σ(βc̃) − log σ(−βr̃)                        Jung 2024
    sppo_hard     (c̃ − 1/2β)² + (r̃ + 1/2β)²                      Wu 2024, Eq. 4.7
    aot           cdpo of sort(c − r) − sort(c_ref − r_ref)      Melnyk 2024
    aot_unpaired  cdpo of sort(c̃) − sort(r̃)                      Melnyk 2024
    apo_zero      1 − σ(βc̃) + σ(βr̃)                              D'Oosterlinck 2024, Eq. 7
    apo_down      σ(βc̃) + 1 − σ(β(c̃ − r̃))                        D'Oosterlinck 2024, Eq. 8
    discopop      (1−m)·(−log σ(βΔ)) + m·e^(−βΔ), m = σ(βΔ/τ)    Lu 2024, Eq. 5
    sigmoid_norm  −log σ(β(c/|c| − r/|r|))                       Lambert 2024 (Tülu 3)
    sft           the mean negative log-probability of the chosen tokens

where c/|c| is the score of the chosen sequence by its number of tokens.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from liger_fn.functional.core import check
from liger_fn.functional.preference.pairs import (
    REDUCTIONS,
    Metrics,
    check_per_sequence,
    check_positive,
    check_smoothing,
    is_scalar,
    logp_metrics,
    reduced,
    reward_metrics,
    smoothed_sigmoid,
)


class _Pairs(NamedTuple):
    """One batch of pairs, in the words of the formulas above."""

    c: Tensor
    r: Tensor
    ref_c: Tensor
    ref_r: Tensor
    chosen_scores: Tensor
    rejected_scores: Tensor
    chosen_lengths: Tensor | float | None
    rejected_lengths: Tensor | float | None
    nll: Tensor | None
    beta: float
    epsilon: float
    tau: float

    @property
    def chosen_ratios(self) -> Tensor:
        return self.c - self.ref_c

    @property
    def rejected_ratios(self) -> Tensor:
        return self.r - self.ref_r

    @property
    def margin(self) -> Tensor:
        return self.beta * (self.chosen_scores - self.rejected_scores)

    @property
    def margin_by_token(self) -> Tensor:
        """c/|c| − r/|r|."""
        return self.chosen_scores / _at_least_one(
            self.chosen_lengths
        ) - self.rejected_scores / _at_least_one(self.rejected_lengths)


def _at_least_one(length: Tensor | float) -> Tensor | float:
    return length.clamp(min=1) if isinstance(length, Tensor) else max(1, length)


def _sigmoid(p: _Pairs) -> Tensor:
    return -F.logsigmoid(p.margin)


def _cdpo(p: _Pairs) -> Tensor:
    return smoothed_sigmoid(p.margin, p.epsilon)


def _hinge(p: _Pairs) -> Tensor:
    return torch.relu(1.0 - p.margin)


def _ipo(p: _Pairs) -> Tensor:
    return (p.margin_by_token - 1.0 / (2.0 * p.beta)).square()


def _robust(p: _Pairs) -> Tensor:
    clean, flipped = -F.logsigmoid(p.margin), -F.logsigmoid(-p.margin)
    return ((1.0 - p.epsilon) * clean - p.epsilon * flipped) / (1.0 - 2.0 * p.epsilon)


def _exo_pair(p: _Pairs) -> Tensor:
    log_q_chosen, log_q_rejected = F.logsigmoid(p.margin), F.logsigmoid(-p.margin)
    log_p_chosen, log_p_rejected = math.log1p(-p.epsilon), math.log(p.epsilon)
    return torch.sigmoid(p.margin) * (log_q_chosen - log_p_chosen) + torch.sigmoid(-p.margin) * (
        log_q_rejected - log_p_rejected
    )


def _nca_pair(p: _Pairs) -> Tensor:
    chosen, rejected = p.beta * p.chosen_ratios, p.beta * p.rejected_ratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _bco_pair(p: _Pairs) -> Tensor:
    return -F.logsigmoid(p.beta * p.chosen_ratios) - F.logsigmoid(-p.beta * p.rejected_ratios)


def _sppo_hard(p: _Pairs) -> Tensor:
    half = 0.5 / p.beta
    return (p.chosen_ratios - half).square() + (p.rejected_ratios + half).square()


def _aot(p: _Pairs) -> Tensor:
    delta = (p.c - p.r).sort().values - (p.ref_c - p.ref_r).sort().values
    return smoothed_sigmoid(p.beta * delta, p.epsilon)


def _aot_unpaired(p: _Pairs) -> Tensor:
    delta = p.chosen_ratios.sort().values - p.rejected_ratios.sort().values
    return smoothed_sigmoid(p.beta * delta, p.epsilon)


def _apo_zero(p: _Pairs) -> Tensor:
    # 1 − σ(z) = σ(−z), without cancellation.
    return torch.sigmoid(-p.beta * p.chosen_ratios) + torch.sigmoid(p.beta * p.rejected_ratios)


def _apo_down(p: _Pairs) -> Tensor:
    difference = p.chosen_ratios - p.rejected_ratios
    return torch.sigmoid(p.beta * p.chosen_ratios) + torch.sigmoid(-p.beta * difference)


def _discopop(p: _Pairs) -> Tensor:
    mixing = torch.sigmoid(p.margin / p.tau)
    return -F.logsigmoid(p.margin) * (1.0 - mixing) + torch.exp(-p.margin) * mixing


def _sigmoid_norm(p: _Pairs) -> Tensor:
    return -F.logsigmoid(p.beta * p.margin_by_token)


def _sft(p: _Pairs) -> Tensor:
    return p.nll.expand_as(p.c)


LOSSES: dict[str, Callable[[_Pairs], Tensor]] = {
    "sigmoid": _sigmoid,
    "cdpo": _cdpo,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid_norm,
    "sft": _sft,
}
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_BY_TOKEN = ("ipo", "sigmoid_norm")
_SMOOTHED = ("cdpo", "robust", "exo_pair", "aot", "aot_unpaired")


def _scores(log_ratios: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(t) of the divergence that holds the policy to the reference, with t = e^log_ratios."""
    if divergence == "forward_kl":
        return 1.0 - torch.exp(-log_ratios)
    if divergence == "js_divergence":
        return math.log(2.0) + F.logsigmoid(log_ratios)
    if divergence == "alpha_divergence" and abs(alpha - 1.0) >= 1e-6:
        # e^80 is the last power that float32 and bfloat16 hold with a margin; float16 ends at e^11.
        most = 11.0 if log_ratios.dtype is torch.float16 else 80.0
        return torch.expm1(((alpha - 1.0) * log_ratios).clamp(max=most)) / (alpha - 1.0)
    return log_ratios


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    chosen_lengths: Tensor | float | None = None,
    rejected_lengths: Tensor | float | None = None,
    nll: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Metrics]:
    """Compute a loss of direct preference optimisation, or a weighted sum of several.

        loss = mean over pairs of −log σ(β · [(c − c_ref) − (r − r_ref)])           for "sigmoid"

    with c and r the log-probabilities of chosen and rejected sequences; the other formulas stand at
    the head of this function's file.

    Args:
        chosen_logps, rejected_logps: (B,), floating point: sums over the tokens of each sequence.
        ref_chosen_logps, ref_rejected_logps: (B,), the same under the reference; constants usually.
        beta: β, how closely the policy is held to the reference; ipo's τ.
        loss_type: "sigmoid", "cdpo", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair",
            "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm",
            "sft", or several of them. aot and aot_unpaired compare the pairs of the whole batch.
        loss_weights: one weight for each of several losses; None: 1 each.
        label_smoothing: ε, the probability that a label is wrong, of cdpo, robust (below ½),
            exo_pair (above 0), aot and aot_unpaired. If none of these is wanted it must be 0.
        f_divergence_type: "reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence": what
            holds the policy to the reference.
        f_alpha_divergence_coef: α of the alpha divergence.
        discopop_tau: τ of discopop.
        chosen_lengths, rejected_lengths: (B,) or a number: the tokens of each sequence. ipo and
            sigmoid_norm divide by them; give 1 if logps are averages already.
        nll: a scalar, what "sft" is: `nll_loss` of the chosen tokens.
        weights: (B,), factors of each pair's loss, as `wpo_weights` gives them.
        reduction: "none": a loss per pair; "sum"; "mean".

    Returns:
        The loss, a scalar or (B,), and detached scalars by the names that TRL logs: rewards/chosen,
        rewards/rejected, rewards/accuracies, rewards/margins, logps/chosen, logps/rejected.

    Raises:
        TypeError: logps are not floating point, an option is no number.
        ValueError: a shape does not fit, an option is out of its range, or a loss needs what is not
            given.

    Precision: that of logps.
    Memory: a few tensors of B numbers.
    Source: Rafailov et al., "Direct Preference Optimization", 2023; Wang et al., "Beyond Reverse
        KL", 2023 (divergences); others at the head of the file.
    """
    op = "dpo_loss"
    logps = {
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
    }
    check_per_sequence(op, logps if weights is None else logps | {"weights": weights})
    check_positive(op, "beta", beta)
    check_positive(op, "discopop_tau", discopop_tau)
    check_smoothing(op, label_smoothing)
    check.one_of(op, "f_divergence_type", f_divergence_type, DIVERGENCES)
    check.one_of(op, "reduction", reduction, REDUCTIONS)
    types = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
    for each in types:
        _check_type(op, each, label_smoothing, chosen_lengths, rejected_lengths, nll)
    if label_smoothing and not set(types) & set(_SMOOTHED):
        check.fail(op, "label_smoothing", f"be 0 for {', '.join(types)}", label_smoothing)
    factors = (1.0,) * len(types) if loss_weights is None else tuple(loss_weights)
    if not types or len(factors) != len(types):
        check.fail(op, "loss_weights", f"have one weight for each of {len(types)}", len(factors))

    chosen_ratios, rejected_ratios = (
        chosen_logps - ref_chosen_logps,
        rejected_logps - ref_rejected_logps,
    )
    pairs = _Pairs(
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        _scores(chosen_ratios, f_divergence_type, f_alpha_divergence_coef),
        _scores(rejected_ratios, f_divergence_type, f_alpha_divergence_coef),
        chosen_lengths,
        rejected_lengths,
        nll,
        beta,
        label_smoothing,
        discopop_tau,
    )
    loss = torch.zeros_like(chosen_logps)
    for each, factor in zip(types, factors, strict=True):
        loss = loss + factor * LOSSES[each](pairs)
    loss = loss if weights is None else loss * weights
    metrics = reward_metrics(beta * chosen_ratios, beta * rejected_ratios)
    return reduced(loss, reduction), metrics | logp_metrics(chosen_logps, rejected_logps)


def _check_type(
    op: str,
    loss_type: str,
    label_smoothing: float,
    chosen_lengths: Tensor | float | None,
    rejected_lengths: Tensor | float | None,
    nll: Tensor | None,
) -> None:
    """Check one loss, and that it gets what it needs."""
    check.one_of(op, "loss_type", loss_type, tuple(LOSSES))
    if loss_type == "robust":
        check_smoothing(op, label_smoothing, 0.5)
    if loss_type == "exo_pair" and not label_smoothing:
        check.fail(op, "label_smoothing", "be above 0 for exo_pair", label_smoothing)
    for name, lengths in (
        ("chosen_lengths", chosen_lengths),
        ("rejected_lengths", rejected_lengths),
    ):
        if loss_type in _BY_TOKEN and lengths is None:
            check.fail(op, name, f"be the number of tokens for {loss_type}", None)
    if loss_type == "sft" and not is_scalar(nll):
        check.fail(op, "nll", "be a scalar for sft", None if nll is None else tuple(nll.shape))
