"""Losses of preference, policy gradient and distillation, of log-probabilities.

They are plain PyTorch, since their tensors are small, (B,) or (B, T): what is large, the logits, is
`fused_linear_logprobs`'s business. Any loss follows from that one primitive:

    logps = fused_linear_logprobs(weight, x, y)                                   # (2B, T)
    chosen, rejected = sequence_logps(logps, y != -100).chunk(2)                  # (B,) each
    loss, metrics = dpo_loss(chosen, rejected, ref_chosen, ref_rejected)

which is what `fused_linear_dpo` does in one call.

Metrics are detached scalars on the device, by the names that TRL logs; none waits for it.
"""

from liger_fn.functional.preference.cpo import cpo_loss, simpo_loss
from liger_fn.functional.preference.distillation import distillation_loss
from liger_fn.functional.preference.dpo import dpo_loss
from liger_fn.functional.preference.fused_linear import (
    fused_linear_cpo,
    fused_linear_dpo,
    fused_linear_grpo,
    fused_linear_kto,
    fused_linear_orpo,
    fused_linear_simpo,
)
from liger_fn.functional.preference.grpo import grpo_loss
from liger_fn.functional.preference.kto import kto_kl, kto_loss
from liger_fn.functional.preference.orpo import orpo_loss
from liger_fn.functional.preference.policy_gradient import (
    group_advantages,
    ppo_loss,
    ppo_value_loss,
    reinforce_loss,
    rloo_advantages,
    rloo_loss,
)
from liger_fn.functional.preference.sequence import (
    length_desensitized_logps,
    nll_loss,
    sequence_logps,
    wpo_weights,
)
from liger_fn.functional.preference.weighting import (
    high_entropy_mask,
    off_policy_mask,
    sampling_ratio,
)

__all__ = [
    "cpo_loss",
    "distillation_loss",
    "dpo_loss",
    "fused_linear_cpo",
    "fused_linear_dpo",
    "fused_linear_grpo",
    "fused_linear_kto",
    "fused_linear_orpo",
    "fused_linear_simpo",
    "group_advantages",
    "grpo_loss",
    "high_entropy_mask",
    "kto_kl",
    "kto_loss",
    "length_desensitized_logps",
    "nll_loss",
    "off_policy_mask",
    "orpo_loss",
    "ppo_loss",
    "ppo_value_loss",
    "reinforce_loss",
    "rloo_advantages",
    "rloo_loss",
    "sampling_ratio",
    "sequence_logps",
    "simpo_loss",
    "wpo_weights",
]
