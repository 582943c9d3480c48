"""Norms with a gate as modules."""

from typing import Literal

import torch
from torch import Tensor, nn

from liger_fn.functional import gated_rms_norm


class GatedRMSNorm(nn.Module):
    """RMSNorm with a gate after it, or before it with `gate_first`.

    With `cast_before_weight=True` it takes the place of Hugging Face's Qwen3NextRMSNormGated, and
    with `gate_first=True, groups=hidden_size // group_size` too of MambaRMSNormGated and
    Zamba2RMSNormGated; the one state_dict key is `weight`.

    Args:
        hidden_size: D.
        eps, gate_first, groups, activation, cast_before_weight: see
            `liger_fn.functional.gated_rms_norm`.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        gate_first: bool = False,
        groups: int = 1,
        activation: Literal["silu", "sigmoid"] = "silu",
        cast_before_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.gate_first, self.groups = eps, gate_first, groups
        self.activation, self.cast_before_weight = activation, cast_before_weight
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(
            x,
            gate,
            self.weight,
            eps=self.eps,
            gate_first=self.gate_first,
            groups=self.groups,
            activation=self.activation,
            cast_before_weight=self.cast_before_weight,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.weight.shape[0]}, eps={self.eps}, gate_first={self.gate_first}, "
            f"groups={self.groups}, activation={self.activation!r}, "
            f"cast_before_weight={self.cast_before_weight}"
        )
