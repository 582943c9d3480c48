"""Policy gradients before GRPO: PPO, REINFORCE and RLOO, and the advantages that all take."""

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.preference.grpo import clipped_policy_loss, grpo_loss
from liger_fn.functional.preference.pairs import Metrics, check_per_sequence
from liger_fn.functional.preference.sequence import counted

SCALES = ("group", "batch", "none")


def group_advantages(
    rewards: Tensor, num_generations: int, *, scale: str = "group", eps: float = 1e-4
) -> Tensor:
    """Compare each answer's reward with the mean of its group's.

        A = (R − mean(R of the group)) / (std(R) + eps)

    Args:
        rewards: (B,), floating point: the answers of a prompt follow each other.
        num_generations: answers per prompt.
        scale: "group": std of the group; "batch": of all rewards; "none": no division (Dr. GRPO).
        eps: keeps groups of equal rewards at 0.

    Returns:
        (B,), the dtype of rewards.

    Raises:
        TypeError: rewards are not floating point.
        ValueError: they do not fill groups, scale is unknown.

    Precision: that of rewards.
    Memory: nothing lives until the backward pass.
    Source: Shao et al., "DeepSeekMath", 2024.
    """
    op = "group_advantages"
    groups = _groups(op, rewards, num_generations)
    check.one_of(op, "scale", scale, SCALES)
    advantages = groups - groups.mean(1, keepdim=True)
    if scale == "group" and num_generations > 1:
        advantages = advantages / (groups.std(1, keepdim=True) + eps)
    elif scale == "batch" and rewards.numel() > 1:
        advantages = advantages / (rewards.std() + eps)
    return advantages.reshape(-1)


def rloo_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    """Compare each answer's reward with the mean of the others' in its group.

        A_i = R_i − 1/(G − 1) · Σ_{j ≠ i} R_j

    Args:
        rewards: (B,), floating point: the answers of a prompt follow each other.
        num_generations: G, answers per prompt, at least 2.

    Returns:
        (B,), the dtype of rewards.

    Raises:
        TypeError: rewards are not floating point.
        ValueError: they do not fill groups, or G is 1.

    Precision: that of rewards.
    Memory: nothing lives until the backward pass.
    Source: Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style Optimization", 2024.
    """
    op = "rloo_advantages"
    groups = _groups(op, rewards, num_generations)
    if num_generations < 2:
        check.fail(op, "num_generations", "be at least 2", num_generations)
    others = (groups.sum(1, keepdim=True) - groups) / (num_generations - 1)
    return (groups - others).reshape(-1)


def _groups(op: str, rewards: Tensor, num_generations: int) -> Tensor:
    check_per_sequence(op, {"rewards": rewards})
    check.number(op, "num_generations", num_generations, "be at least 1", num_generations >= 1)
    if rewards.shape[0] % num_generations:
        check.fail(op, "rewards", f"fill groups of {num_generations}", f"{len(rewards)} of them")
    return rewards.reshape(-1, num_generations)


def ppo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Compute the clipped policy loss of proximal policy optimisation.

        loss = −mean over tokens of min(ρ·A, clip(ρ, 1 − ε, 1 + ε_high)·A),  ρ = e^(logp − old)

    Args:
        logps, old_logps: (B, T), floating point: log-probabilities of tokens under the policy, and
            under the policy that wrote them.
        advantages: (B, T), or (B,).
        mask: (B, T), the tokens that count.
        epsilon, epsilon_high: the range of ρ, [1 − epsilon, 1 + epsilon_high]; None: epsilon.

    Returns:
        The loss, a scalar, and detached scalars: those of `grpo_loss`, of which this is bnpo.

    Raises:
        TypeError: logps or advantages are not floating point.
        ValueError: a shape does not fit, an option is out of its range.

    Precision: that of logps.
    Memory: a few tensors of B · T numbers.
    Source: Schulman et al., "Proximal Policy Optimization Algorithms", 2017, Eq. 7.
    """
    return grpo_loss(
        logps, advantages, mask, old_logps=old_logps, loss_type="bnpo",
        epsilon=epsilon, epsilon_high=epsilon_high,
    )  # fmt: skip


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None = 0.2
) -> tuple[Tensor, Metrics]:
    """Compute the clipped value loss of proximal policy optimisation.

        loss = ½ · mean over tokens of max((V − R)², (clip(V, V_old − c, V_old + c) − R)²)

    Args:
        values, old_values: (B, T), floating point: the critic's values now, and when it judged.
        returns: (B, T), what it should have said.
        mask: (B, T), the tokens that count.
        clip: c above; None: no clipping.

    Returns:
        The loss, a scalar, and the detached share of clipped tokens, value_clip_ratio.

    Raises:
        TypeError: values are not floating point.
        ValueError: a shape does not fit.

    Precision: that of values.
    Memory: a few tensors of B · T numbers.
    Source: Schulman et al., 2017; Engstrom et al., "Implementation Matters in Deep RL", 2020.
    """
    op = "ppo_value_loss"
    values = counted(op, "values", values, mask, "mask")
    returns = counted(op, "returns", returns, mask, "mask")
    tokens = (mask != 0).sum().clamp(min=1)
    loss = (values - returns).square()
    beyond = torch.zeros_like(values)
    if clip is not None:
        old_values = counted(op, "old_values", old_values, mask, "mask")
        held = torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)
        clipped = (held - returns).square()
        beyond = (clipped > loss).to(values.dtype)
        loss = torch.maximum(loss, clipped)
    return 0.5 * loss.sum() / tokens, {"value_clip_ratio": beyond.sum() / tokens}


def reinforce_loss(logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Compute the policy gradient's loss, one term per token.

        loss = −1/B · Σ_answers Σ_t m_t · A · logp_t

    Args:
        logps: (B, T), floating point: log-probabilities of the answers' tokens.
        advantages: (B,), or (B, T): rewards less a baseline, see `rloo_advantages`.
        mask: (B, T), the tokens that count.

    Returns:
        A scalar, the dtype of logps.

    Raises:
        TypeError: logps or advantages are not floating point.
        ValueError: a shape does not fit.

    Precision: that of logps.
    Memory: a few tensors of B · T numbers.
    Source: Williams, "Simple statistical gradient-following algorithms", 1992.
    """
    loss, _ = grpo_loss(
        logps,
        advantages,
        mask,
        loss_type="cispo",
        normalization="sequence_sum",
        epsilon_high=float("inf"),
    )
    return loss


def rloo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Compute the loss of REINFORCE with a leave-one-out baseline, clipped as PPO's.

        loss = −mean over answers of min(ρ·A, clip(ρ, 1 − ε, 1 + ε_high)·A),  ρ = π(y|x)/π_old(y|x)

    Args:
        logps, old_logps: (B,), floating point: log-probabilities of whole answers
            (`sequence_logps`) under the policy, and under the policy that wrote them.
        advantages: (B,), see `rloo_advantages`.
        epsilon, epsilon_high: the range of ρ, [1 − epsilon, 1 + epsilon_high]; None: epsilon.

    Returns:
        The loss, a scalar, and detached scalars by the names that TRL logs: clip_ratio/low_mean,
        clip_ratio/high_mean, clip_ratio/region_mean, clip_ratio/low_min, clip_ratio/high_max.

    Raises:
        TypeError: logps or advantages are not floating point.
        ValueError: a shape does not fit, or there is no answer.

    Precision: that of logps.
    Memory: a few tensors of B numbers.
    Source: Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style Optimization", 2024.
    """
    op = "rloo_loss"
    named = {"logps": logps, "old_logps": old_logps, "advantages": advantages}
    check_per_sequence(op, named)
    if not logps.numel():
        check.fail(op, "logps", "have at least one answer", check.spell(logps.shape))
    high = epsilon if epsilon_high is None else epsilon_high
    ratio = torch.exp(logps - old_logps)
    loss = clipped_policy_loss(ratio, advantages, epsilon, high)
    is_low = ((ratio < 1.0 - epsilon) & (advantages < 0)).to(logps.dtype)
    is_high = ((ratio > 1.0 + high) & (advantages > 0)).to(logps.dtype)
    return loss.mean(), {
        "clip_ratio/low_mean": is_low.mean(),
        "clip_ratio/high_mean": is_high.mean(),
        "clip_ratio/region_mean": torch.maximum(is_low, is_high).mean(),
        "clip_ratio/low_min": is_low.amin(),
        "clip_ratio/high_max": is_high.amax(),
    }
