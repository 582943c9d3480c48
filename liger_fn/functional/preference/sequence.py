"""From log-probabilities of tokens to those of sequences.

    logps (B, T), mask (B, T)  ->  log π(y|x) = Σ_t m_t · logp_t                      (B,)

A mask is 1 (or True) on the tokens that count. What stands elsewhere has no influence, be it NaN.
"""

import torch
from torch import Tensor

from liger_fn.functional.core import check


def counted(op: str, name: str, logps: Tensor, mask: Tensor, mask_name: str) -> Tensor:
    """Check logps (B, T) and its mask, and put zeros where the mask does."""
    check.floating(op, name, logps)
    if logps.dim() != 2:
        check.fail(op, name, "have shape (B, T), sequences of tokens", check.spell(logps.shape))
    check.tensor(op, mask_name, mask)
    check.shape(op, mask_name, mask, logps.shape, f"that of `{name}`")
    return logps.masked_fill(mask == 0, 0.0)


def number_of_tokens(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The tokens that count in each sequence, at least one, in the dtype of what they divide."""
    return (mask != 0).sum(-1).clamp(min=1).to(dtype)


def sequence_logps(logps: Tensor, mask: Tensor, *, average: bool = False) -> Tensor:
    """Sum the log-probabilities of each sequence's tokens, or average them.

        log π(y|x) = Σ_t m_t · logp_t            average: divided by |y| = Σ_t m_t

    Args:
        logps: (B, T), floating point: log-probabilities of tokens.
        mask: (B, T), the tokens that count.
        average: whether to divide by the number of tokens (SimPO, ORPO, CPO's and TPO's ipo).

    Returns:
        (B,), the dtype of logps; 0 for a sequence without tokens.

    Raises:
        TypeError: logps is not floating point.
        ValueError: a shape does not fit.

    Precision: that of logps.
    Memory: nothing but the mask lives until the backward pass.
    Source: Meng et al., "SimPO", 2024 (the average as a reward).
    """
    total = counted("sequence_logps", "logps", logps, mask, "mask").sum(-1)
    return total / number_of_tokens(mask, total.dtype) if average else total


def length_desensitized_logps(logps: Tensor, mask: Tensor, *, alpha: float) -> Tensor:
    """Sum log-probabilities of pairs, the tokens beyond the shorter of two weighing alpha.

        log π(y|x) = Σ_{i ≤ l} logp_i + α · Σ_{i > l} logp_i        l = min(|chosen|, |rejected|)

    Args:
        logps: (2B, T), floating point: the chosen sequences, then the rejected ones.
        mask: (2B, T), the tokens that count.
        alpha: α above; 1 gives `sequence_logps`.

    Returns:
        (2B,), the dtype of logps.

    Raises:
        TypeError: logps is not floating point.
        ValueError: a shape does not fit, or logps has an odd number of sequences.

    Precision: that of logps.
    Memory: the weights of tokens, (2B, T), live until the backward pass.
    Source: Liu et al., "Length Desensitization in Direct Preference Optimization", 2024.
    """
    op = "length_desensitized_logps"
    logps = counted(op, "logps", logps, mask, "mask")
    if len(logps) % 2:
        check.fail(op, "logps", "have an even number of sequences", len(logps))
    counts = mask != 0
    chosen, rejected = counts.sum(-1).chunk(2)
    shared = torch.minimum(chosen, rejected).repeat(2)[:, None]
    weight = torch.ones_like(logps).masked_fill(counts.cumsum(-1) > shared, alpha)
    return (logps * weight).sum(-1)


def nll_loss(logps: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean negative log-probability of the tokens that count.

        loss = −Σ m · logp / Σ m

    Args:
        logps: (B, T), floating point: log-probabilities of tokens.
        mask: (B, T), the tokens that count.

    Returns:
        A scalar, the dtype of logps; 0 if no token counts.

    Raises:
        TypeError: logps is not floating point.
        ValueError: a shape does not fit.

    Precision: that of logps.
    Memory: nothing but the mask lives until the backward pass.
    Source: Ouyang et al., "Training language models to follow instructions", 2022.
    """
    total = counted("nll_loss", "logps", logps, mask, "mask").sum()
    return -total / (mask != 0).sum().clamp(min=1).to(total.dtype)


def wpo_weights(logps: Tensor, log_sum_sq: Tensor, mask: Tensor) -> Tensor:
    """Weigh sequences by how likely the policy itself would have written them.

        w(x, y) = exp( 1/|y| · Σ_t m_t · (logp_t − log Σ_v p_v²) )

    A pair weighs w(x, chosen) · w(x, rejected): give dpo_loss that as `weights`.

    Args:
        logps: (B, T), floating point: log-probabilities of tokens.
        log_sum_sq: (B, T), log Σ_v p_v² of each token's distribution: lse at half the temperature
            less twice lse (see `logprobs`).
        mask: (B, T), the tokens that count.

    Returns:
        (B,), the dtype of logps: constants.

    Raises:
        TypeError: logps is not floating point.
        ValueError: a shape does not fit.

    Precision: that of logps.
    Memory: nothing lives until the backward pass.
    Source: Zhou et al., "WPO: Enhancing RLHF with Weighted Preference Optimization", 2024, Eq. 2.
    """
    op = "wpo_weights"
    check.tensor(op, "log_sum_sq", log_sum_sq)
    check.shape(op, "log_sum_sq", log_sum_sq, logps.shape, "that of `logps`")
    aligned = counted(op, "logps", (logps - log_sum_sq).detach(), mask, "mask")
    return (aligned.sum(-1) / number_of_tokens(mask, aligned.dtype)).exp()
