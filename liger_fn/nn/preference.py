"""Losses of preference and policy gradient as modules: options, and one functional call.

    loss, metrics = FusedLinearDPOLoss(beta=0.1)(model.lm_head.weight, hidden, target, ref_logps)

The head's options (temperature, logit_scale, softcap, ignore_index, chunk_size) and the loss's are
given to the constructor, tensors to the call. Metrics are detached scalars on the device.
"""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from liger_fn.functional import preference
from liger_fn.functional.preference import fused_linear

Metrics = dict[str, Tensor]


class _FusedLinearLoss(nn.Module):
    """Holds the options of `call`, which passes what is not the head's to `loss`."""

    call: ClassVar[Callable[..., tuple[Tensor, Metrics]]]
    loss: ClassVar[Callable[..., tuple[Tensor, Metrics]]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = {n for n in fused_linear.HEAD_OPTIONS if n != "bias"} | {"token_metrics"}
        for function in (type(self).call, type(self).loss):
            for name, parameter in inspect.signature(function).parameters.items():
                if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                    known.add(name)
        for name in options:
            if name not in known:
                raise TypeError(
                    f"{type(self).__name__}: `{name}` must be one of {', '.join(sorted(known))}; "
                    f"got {name!r}."
                )
        self.options = options

    def forward(
        self, weight: Tensor, input: Tensor, target: Tensor, *tensors: Any, **named: Any
    ) -> tuple[Tensor, Metrics]:
        """Give the loss and its metrics; tensors are those of the function of the same name."""
        return type(self).call(weight, input, target, *tensors, **named, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class FusedLinearDPOLoss(_FusedLinearLoss):
    """Direct preference optimisation, in all its variants: see `fused_linear_dpo` and `dpo_loss`.

    Call it with (weight, input (2B, T, H), target (2B, T), ref_logps (2B,)), or with ref_weight and
    ref_x by name.
    """

    call = staticmethod(fused_linear.fused_linear_dpo)
    loss = staticmethod(preference.dpo_loss)


class FusedLinearORPOLoss(_FusedLinearLoss):
    """Odds ratio preference optimisation: see `fused_linear_orpo` and `orpo_loss`.

    Call it with (weight, input (2B, T, H), target (2B, T), mask (2B, T) or None).
    """

    call = staticmethod(fused_linear.fused_linear_orpo)
    loss = staticmethod(preference.orpo_loss)


class FusedLinearCPOLoss(_FusedLinearLoss):
    """Contrastive preference optimisation and its kin: see `fused_linear_cpo` and `cpo_loss`.

    Call it with (weight, input (2B, T, H), target (2B, T), mask (2B, T) or None).
    """

    call = staticmethod(fused_linear.fused_linear_cpo)
    loss = staticmethod(preference.cpo_loss)


class FusedLinearSimPOLoss(_FusedLinearLoss):
    """Simple preference optimisation: see `fused_linear_simpo` and `simpo_loss`.

    Call it with (weight, input (2B, T, H), target (2B, T), mask (2B, T) or None).
    """

    call = staticmethod(fused_linear.fused_linear_simpo)
    loss = staticmethod(preference.simpo_loss)


class FusedLinearKTOLoss(_FusedLinearLoss):
    """Kahneman-Tversky optimisation: see `fused_linear_kto` and `kto_loss`.

    Call it with (weight, input (B, T, H), target (B, T), labels (B,), kl, ref_logps (B,)), or with
    ref_weight and ref_x by name.
    """

    call = staticmethod(fused_linear.fused_linear_kto)
    loss = staticmethod(preference.kto_loss)


class FusedLinearGRPOLoss(_FusedLinearLoss):
    """Group relative policy optimisation and its kin: see `fused_linear_grpo` and `grpo_loss`.

    Call it with (weight, input (B, T, H), target (B, T), advantages (B,), mask (B, T) or None) and,
    by name, old_logps (B, T) and what else `grpo_loss` takes.
    """

    call = staticmethod(fused_linear.fused_linear_grpo)
    loss = staticmethod(preference.grpo_loss)
