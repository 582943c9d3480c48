"""Which tokens and answers a policy learns from, and how much."""

import math

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.preference.sequence import counted, number_of_tokens

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def high_entropy_mask(entropies: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """Find the tokens whose entropy is among the highest.

        mask_t and H_t ≥ the `quantile` of H over the tokens that count

    Args:
        entropies: (B, T), floating point.
        mask: (B, T), the tokens that count.
        quantile: from 0 to 1; 0.8 keeps the highest fifth.

    Returns:
        (B, T), boolean.

    Raises:
        TypeError: entropies are not floating point.
        ValueError: a shape does not fit.

    Precision: that of entropies.
    Memory: the entropies, sorted, while it runs.
    Source: Wang et al., "Beyond the 80/20 Rule", 2025.
    """
    entropies = counted("high_entropy_mask", "entropies", entropies.detach(), mask, "mask")
    counts = mask != 0
    if not entropies.numel():
        return counts
    return (entropies >= _quantile(entropies, counts, quantile)) & counts


def _quantile(x: Tensor, counts: Tensor, quantile: float) -> Tensor:
    """torch.quantile of what counts; torch.nanquantile waits for the device in PyTorch 2.11."""
    ordered = x.masked_fill(~counts, math.inf).reshape(-1).sort().values
    rank = (counts.sum() - 1).clamp(min=0).to(x.dtype) * quantile
    # Not by indexing, which would ask the device for the index.
    below, above = ordered.gather(0, torch.stack([rank.floor(), rank.ceil()]).long())
    return torch.lerp(below, above, rank - rank.floor())


def off_policy_mask(
    logps: Tensor, sampling_logps: Tensor, advantages: Tensor, mask: Tensor, threshold: float
) -> Tensor:
    """Find the answers to learn from: good ones, and those that the policy still might give.

        A ≥ 0  or  1/|y| · Σ_t m_t · (sampling_t − logp_t) ≤ threshold

    Args:
        logps: (B, T), floating point: log-probabilities of tokens under the policy.
        sampling_logps: (B, T), the same when the answer was drawn. NaN counts as no difference.
        advantages: (B,) or (B, T).
        mask: (B, T), the tokens that count.
        threshold: the mean divergence that bad answers may have.

    Returns:
        (B, 1), or (B, T) for advantages by token; boolean.

    Raises:
        TypeError: logps are not floating point.
        ValueError: a shape does not fit.

    Precision: that of logps.
    Memory: nothing lives until the backward pass.
    Source: DeepSeek-AI, "DeepSeek-V3.2", 2025 (off-policy sequence masking).
    """
    op = "off_policy_mask"
    logps = counted(op, "logps", logps.detach(), mask, "mask")
    sampling_logps = counted(op, "sampling_logps", sampling_logps, mask, "mask")
    divergence = (sampling_logps - logps).nan_to_num(nan=0.0).sum(-1)
    mean = divergence / number_of_tokens(mask, divergence.dtype)
    return (by_token(op, advantages, logps) >= 0) | (mean[:, None] <= threshold)


def by_token(op: str, advantages: Tensor, logps: Tensor) -> Tensor:
    """Check advantages (B,) or (B, T), and view them as (B, 1) or (B, T)."""
    check.floating(op, "advantages", advantages)
    if advantages.dim() == 1:
        check.shape(op, "advantages", advantages, logps.shape[:1], "one per answer, or per token")
        return advantages[:, None]
    check.shape(op, "advantages", advantages, logps.shape, "one per token, or per answer")
    return advantages


def sampling_ratio(
    old_logps: Tensor,
    sampling_logps: Tensor,
    mask: Tensor,
    *,
    mode: str = "sequence_mask",
    clip_min: float | None = None,
    clip_max: float | None = 3.0,
) -> Tensor:
    """Weigh answers that another program drew by how likely the policy was to draw them.

        r_t = e^(old_t − sampling_t), or r = e^(Σ_t m_t · (old_t − sampling_t)) of a whole answer

    Args:
        old_logps: (B, T), floating point: log-probabilities of tokens under the policy, as the
            trainer computes them.
        sampling_logps: (B, T), as the program that drew them did. NaN counts as no difference.
        mask: (B, T), the tokens that count.
        mode: "token_..." or "sequence_...": of each token or of each answer; "..._truncate":
            clamp ratios to the range; "..._mask": set those outside to 0.
        clip_min, clip_max: the range; None: no bound.

    Returns:
        (B, T) for tokens, (B, 1) for answers: constants, 1 where no token counts.

    Raises:
        TypeError: logps are not floating point.
        ValueError: a shape does not fit, mode is unknown.

    Precision: that of logps.
    Memory: nothing lives until the backward pass.
    Source: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training",
        2025.
    """
    op = "sampling_ratio"
    check.one_of(op, "mode", mode, MODES)
    old_logps = counted(op, "old_logps", old_logps.detach(), mask, "mask")
    sampling_logps = counted(op, "sampling_logps", sampling_logps.detach(), mask, "mask")
    log_ratio = (old_logps - sampling_logps).nan_to_num(nan=0.0)
    if mode.startswith("sequence"):
        log_ratio = log_ratio.sum(-1, keepdim=True)
    ratio = log_ratio.exp()
    lowest = -math.inf if clip_min is None else clip_min
    highest = math.inf if clip_max is None else clip_max
    if mode.endswith("truncate"):
        return ratio.clamp(lowest, highest)
    return ratio.masked_fill((ratio < lowest) | (ratio > highest), 0.0)
