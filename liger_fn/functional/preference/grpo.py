"""Group relative policy optimisation and its kin, of log-probabilities of tokens.

    ℓ_t = logp_t − old_t                 the log-ratio of a token
    ρ   = e^ℓ, at sequence level e^(mean of ℓ over the answer): (B, T) or (B, 1)

    grpo, bnpo, dr_grpo, dapo, luspo   −min(min(ρ, δ)·A, clip(ρ, 1−ε_low, 1+ε_high)·A)
    cispo                              −stop(min(ρ, ε_high))·A·logp
    sapo                               −4/τ·σ(τ·(ρ − 1))·A,   τ by the sign of A
    vespo                              −stop(φ(w))·A·logp,    φ(w) = e^λ·w^k·e^(−λw), w = e^(Σ ℓ)
    gmpo                               −exp(mean of clipped ℓ)·A

Then, per token: · off-policy mask · entropy mask · importance ratio, + β·KL(π ‖ reference), which
is e^(ref − logp) − (ref − logp) − 1, times ρ where its bias is corrected. Then over tokens:

    sequence_mean   mean over answers of the mean over tokens      grpo, sapo; gmpo has one term
    token_mean      Σ / num_items, or / the number of tokens       bnpo, dapo, cispo, vespo
    constant        Σ / (B · max_completion_length)                dr_grpo
    sequence_sum    mean over answers of the sum over tokens       luspo
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.preference.pairs import Metrics, check_positive
from liger_fn.functional.preference.sequence import counted, number_of_tokens
from liger_fn.functional.preference.weighting import (
    by_token,
    high_entropy_mask,
    off_policy_mask,
)

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
NORMALIZATIONS = {
    "grpo": "sequence_mean",
    "bnpo": "token_mean",
    "dr_grpo": "constant",
    "dapo": "token_mean",
    "luspo": "sequence_sum",
    "cispo": "token_mean",
    "sapo": "sequence_mean",
    "vespo": "token_mean",
    "gmpo": "sequence_mean",
}
LOSSES = tuple(NORMALIZATIONS)
WAYS_TO_NORMALIZE = tuple(dict.fromkeys(NORMALIZATIONS.values()))
LEVELS = ("token", "sequence")


class _Batch(NamedTuple):
    """Answers and what is known of them: (B, T), but advantages may be (B, 1)."""

    logps: Tensor
    old_logps: Tensor
    advantages: Tensor
    counts: Tensor
    tokens: Tensor

    @property
    def log_ratio(self) -> Tensor:
        return self.logps - self.old_logps

    def answer_mean(self, x: Tensor) -> Tensor:
        """The mean over each answer's tokens, (B, 1); x is 0 where no token counts."""
        return x.sum(-1, keepdim=True) / self.tokens[:, None]


def clipped_policy_loss(
    ratio: Tensor, advantages: Tensor, low: float, high: float, delta: float | None = None
) -> Tensor:
    """−min(ρ·A, clip(ρ, 1 − low, 1 + high)·A), with ρ bounded by delta beforehand."""
    clipped = ratio.clamp(1.0 - low, 1.0 + high)
    ratio = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def gamma_weights(
    log_ratio: Tensor,
    advantages: Tensor,
    importance_sampling_ratio: Tensor | None,
    k_pos: float,
    lambda_pos: float,
    k_neg: float,
    lambda_neg: float,
) -> Tensor:
    """φ(w) of VESPO, a constant: (B, 1), or (B, T) for advantages by token."""
    lowest = math.log(1e-8)
    log_w = log_ratio.detach().clamp(-20.0, 20.0).sum(-1, keepdim=True)
    if importance_sampling_ratio is not None:
        log_is = importance_sampling_ratio.detach().log().clamp(lowest, 20.0)
        log_w = log_w + log_is.sum(-1, keepdim=True)
    log_w = log_w.clamp(lowest, 20.0)
    negative = advantages < 0
    k = torch.full_like(advantages, k_pos).masked_fill(negative, k_neg)
    rate = torch.full_like(advantages, lambda_pos).masked_fill(negative, lambda_neg).clamp(min=1e-4)
    phi = torch.exp(rate + k * log_w - rate * log_w.exp())
    return phi.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _geometric_mean_weight(b: _Batch, counts: Tensor, low: float, high: float) -> Tensor:
    """exp of the mean of log-ratios over tokens, clipped where that lowers the objective."""
    clamped = b.log_ratio.clamp(-low, high)
    clipped = torch.where(
        b.advantages > 0,
        torch.minimum(b.log_ratio, clamped),
        torch.maximum(b.log_ratio, clamped),
    )
    tokens = number_of_tokens(counts, clipped.dtype)
    return torch.exp(clipped.masked_fill(~counts, 0.0).sum(-1) / tokens)[:, None]


def grpo_loss(
    logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = True,
    importance_sampling_ratio: Tensor | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    sampling_logps: Tensor | None = None,
    off_policy_mask_threshold: float | None = None,
    entropies: Tensor | None = None,
    top_entropy_quantile: float = 1.0,
    entropy_coef: float = 0.0,
    normalization: str | None = None,
    num_items: Tensor | float | None = None,
    max_completion_length: int | None = None,
) -> tuple[Tensor, Metrics]:
    """Compute the loss of group relative policy optimisation, or of one of its kin.

        loss = −1/N · Σ_tokens [min(ρ·A, clip(ρ, 1 − ε, 1 + ε_high)·A) − β·KL]      for "dapo"

    with ρ = π/π_old; the other formulas stand at the head of this function's file.

    Args:
        logps: (B, T), floating point: log-probabilities of the answers' tokens under the policy.
        advantages: (B,), or (B, T) for one per token (as in PPO).
        mask: (B, T), the tokens that count: 0 for padding, and for what tools wrote.
        old_logps: (B, T), under the policy that wrote the answers; None: logps, as constants.
        ref_logps: (B, T), under the reference; needed if beta is not 0.
        beta: β, the weight of the KL divergence from the reference.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo" or "gmpo".
        importance_sampling_level: "token", or "sequence" as in GSPO (which is grpo with that).
        epsilon, epsilon_high: the range of ρ, [1 − epsilon, 1 + epsilon_high]; None: epsilon. For
            cispo epsilon_high bounds ρ itself; for gmpo both bound log ρ.
        delta: an upper bound of ρ where A is negative too (two-sided clipping).
        use_bias_correction_kl: whether ρ multiplies the KL divergence, as DeepSeek-V3.2 does.
        importance_sampling_ratio: (B, T) or (B, 1), factors for answers that another program wrote,
            see `sampling_ratio`; vespo takes them into w.
        sapo_temperature_pos, sapo_temperature_neg: τ of sapo for A > 0, and else.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: k and λ of vespo for A ≥ 0,
            and else.
        sampling_logps: (B, T), log-probabilities when the answers were drawn, for
            off_policy_mask_threshold; None: old_logps.
        off_policy_mask_threshold: leave out the answers that `off_policy_mask` does; None: none.
        entropies: (B, T), of each token's distribution: for the two options that follow, and to be
            reported.
        top_entropy_quantile: the share of tokens, those of the highest entropy, that are learnt
            from; 1: all.
        entropy_coef: the weight of the mean entropy, which is subtracted from the loss.
        normalization: "sequence_mean", "token_mean", "constant" or "sequence_sum"; None: that of
            the loss_type.
        num_items: what token_mean divides by: the tokens of the whole step on all devices by the
            number of devices, say; None: the tokens of this call.
        max_completion_length: the constant L of constant.

    Returns:
        The loss, a scalar, and detached scalars by the names that TRL logs: kl if beta is not 0;
        entropy if entropies are given; clip_ratio/low_mean, clip_ratio/high_mean,
        clip_ratio/region_mean, clip_ratio/low_min, clip_ratio/high_max; or cispo_clip_ratio; or
        vespo/phi_seq_mean; policy_loss, the loss without the entropy term.

    Raises:
        TypeError: logps or advantages are not floating point, an option is no number.
        ValueError: a shape does not fit, an option is unknown, what an option needs is missing.

    Precision: that of logps.
    Memory: a few tensors of B · T numbers.
    Source: Shao et al., "DeepSeekMath", 2024 (grpo); Liu et al., "Understanding R1-Zero-Like
        Training", 2025 (dr_grpo); Yu et al., "DAPO", 2025; Zheng et al., "Group Sequence Policy
        Optimization", 2025; MiniMax, "MiniMax-M1", 2025 (cispo); Gao et al., "Soft Adaptive Policy
        Optimization", 2025; Zhao et al., "Geometric-Mean Policy Optimization", 2025.
    """
    op = "grpo_loss"
    check.one_of(op, "loss_type", loss_type, LOSSES)
    check.one_of(op, "importance_sampling_level", importance_sampling_level, LEVELS)
    numbers = {"beta": beta, "epsilon": epsilon, "entropy_coef": entropy_coef}
    for name, value in numbers.items():
        check.number(op, name, value, "be at least 0", value is not None and value >= 0)
    b = _batch(op, logps, old_logps, advantages, mask)
    if importance_sampling_ratio is not None:
        importance_sampling_ratio = _ones_elsewhere(op, importance_sampling_ratio, b)
    high = epsilon if epsilon_high is None else epsilon_high
    learnt_from = b.counts
    if top_entropy_quantile < 1.0:
        _needed(op, "entropies", entropies, "top_entropy_quantile")
        learnt_from = high_entropy_mask(entropies, b.counts, 1.0 - top_entropy_quantile)

    log_ratio = b.log_ratio
    if importance_sampling_level == "sequence":
        log_ratio = b.answer_mean(log_ratio)
    ratio, phi = torch.exp(log_ratio), None
    if loss_type in CLIPPED:
        loss = clipped_policy_loss(ratio, b.advantages, epsilon, high, delta)
    elif loss_type == "cispo":
        loss = -ratio.clamp(max=high).detach() * b.advantages * b.logps
    elif loss_type == "sapo":
        loss = _sapo(ratio, b.advantages, sapo_temperature_pos, sapo_temperature_neg)
    elif loss_type == "vespo":
        phi = gamma_weights(
            b.log_ratio, b.advantages, importance_sampling_ratio,
            vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg,
        )  # fmt: skip
        loss = -phi * b.advantages * b.logps
    else:
        loss = -_geometric_mean_weight(b, learnt_from, epsilon, high) * b.advantages

    if off_policy_mask_threshold is not None:
        drawn_at = b.old_logps if sampling_logps is None else sampling_logps
        loss = loss * off_policy_mask(
            b.logps, drawn_at, advantages, b.counts, off_policy_mask_threshold
        )
    if loss_type != "gmpo":
        loss = loss * learnt_from
    if importance_sampling_ratio is not None and loss_type != "vespo":
        loss = loss * importance_sampling_ratio

    metrics: Metrics = {}
    if beta:
        _needed(op, "ref_logps", ref_logps, "beta")
        away = counted(op, "ref_logps", ref_logps, mask, "mask") - b.logps
        kl = torch.exp(away) - away - 1.0
        if use_bias_correction_kl and loss_type != "gmpo":
            kl = kl * ratio
        loss = loss + beta * kl
        metrics["kl"] = _mean(b, kl)

    normalization = NORMALIZATIONS[loss_type] if normalization is None else normalization
    loss = _normalized(op, b, loss, normalization, num_items, max_completion_length)
    metrics["policy_loss"] = loss.detach()
    if entropies is not None:
        entropies = counted(op, "entropies", entropies, mask, "mask")
        metrics["entropy"] = _mean(b, entropies)
    if entropy_coef:
        _needed(op, "entropies", entropies, "entropy_coef")
        learnable = entropies.masked_fill(~learnt_from, 0.0).sum()
        loss = loss - entropy_coef * learnable / learnt_from.sum().clamp(min=1)
    if phi is not None:
        metrics["vespo/phi_seq_mean"] = _mean(b, phi)
    elif loss_type == "cispo":
        metrics["cispo_clip_ratio"] = _share(b, (ratio > high) & (b.advantages > 0))
    elif loss_type == "gmpo":
        metrics |= _clip_metrics(b, b.log_ratio, -epsilon, high)
    elif loss_type in CLIPPED:
        bounded = ratio if delta is None else ratio.clamp(max=delta)
        metrics |= _clip_metrics(b, bounded, 1.0 - epsilon, 1.0 + high)
    return loss, metrics


def _batch(
    op: str, logps: Tensor, old_logps: Tensor | None, advantages: Tensor, mask: Tensor
) -> _Batch:
    """Check them, and put zeros where no token counts: nothing there has influence."""
    logps = counted(op, "logps", logps, mask, "mask")
    if old_logps is None:
        old_logps = logps.detach()
    else:
        old_logps = counted(op, "old_logps", old_logps, mask, "mask")
    advantages = by_token(op, advantages, logps)
    return _Batch(logps, old_logps, advantages, mask != 0, number_of_tokens(mask, logps.dtype))


def _ones_elsewhere(op: str, importance_sampling_ratio: Tensor, b: _Batch) -> Tensor:
    name = "importance_sampling_ratio"
    check.floating(op, name, importance_sampling_ratio)
    answers, shape = len(b.counts), tuple(importance_sampling_ratio.shape)
    if shape not in ((answers, 1), tuple(b.counts.shape)):
        contract = f"have shape {check.spell(b.counts.shape)} or ({answers}, 1)"
        check.fail(op, name, contract, check.spell(shape))
    if shape == tuple(b.counts.shape):
        importance_sampling_ratio = importance_sampling_ratio.masked_fill(~b.counts, 1.0)
    return importance_sampling_ratio


def _needed(op: str, name: str, given: Tensor | None, option: str) -> None:
    if given is None:
        check.fail(op, name, f"be given for {option}", None)


def _sapo(ratio: Tensor, advantages: Tensor, positive: float, otherwise: float) -> Tensor:
    temperature = torch.full_like(advantages, otherwise).masked_fill(advantages > 0, positive)
    return -torch.sigmoid(temperature * (ratio - 1.0)) * 4.0 / temperature * advantages


def _normalized(
    op: str,
    b: _Batch,
    loss: Tensor,
    normalization: str,
    num_items: Tensor | float | None,
    max_completion_length: int | None,
) -> Tensor:
    """Make one number of the losses of tokens, (B, T), or of answers, (B, 1)."""
    totals = loss.expand_as(b.logps).masked_fill(~b.counts, 0.0).sum(-1)
    answers = max(1, len(totals))
    check.one_of(op, "normalization", normalization, WAYS_TO_NORMALIZE)
    if normalization == "sequence_mean":
        return (totals / b.tokens).sum() / answers
    if normalization == "sequence_sum":
        return totals.sum() / answers
    if normalization == "constant":
        if max_completion_length is None:
            check.fail(op, "max_completion_length", "be given for constant", None)
        check_positive(op, "max_completion_length", max_completion_length)
        return totals.sum() / (answers * max_completion_length)
    if num_items is None:
        num_items = b.counts.sum()
    if isinstance(num_items, Tensor):
        return totals.sum() / num_items.clamp(min=1)
    return totals.sum() / max(1.0, num_items)


def _mean(b: _Batch, x: Tensor) -> Tensor:
    """Over the tokens that count; over answers for what is (B, 1)."""
    x = x.detach()
    if x.shape != b.counts.shape:
        return x.mean()
    return x.masked_fill(~b.counts, 0.0).sum() / b.counts.sum().clamp(min=1)


def _share(b: _Batch, is_so: Tensor) -> Tensor:
    return _mean(b, is_so.to(b.logps.dtype))


def _clip_metrics(b: _Batch, ratio: Tensor, lowest: float, highest: float) -> Metrics:
    low = (ratio < lowest) & (b.advantages < 0)
    high = (ratio > highest) & (b.advantages > 0)
    return {
        "clip_ratio/low_mean": _share(b, low),
        "clip_ratio/high_mean": _share(b, high),
        "clip_ratio/region_mean": _share(b, low | high),
        "clip_ratio/low_min": _share_by_answer(b, low, 1.0).amin(),
        "clip_ratio/high_max": _share_by_answer(b, high, 0.0).amax(),
    }


def _share_by_answer(b: _Batch, is_so: Tensor, of_none: float) -> Tensor:
    """`of_none` stands for an answer without tokens, and for a batch without answers."""
    if is_so.shape == b.counts.shape:
        share = b.answer_mean((is_so & b.counts).to(b.logps.dtype))
        share = share.masked_fill(~b.counts.any(-1, keepdim=True), of_none)
    else:
        share = is_so.to(b.logps.dtype)
    return share if len(share) else share.new_full((1,), of_none)
