"""The experts of a mixture."""

from typing import Any

import torch
from torch import Tensor, nn

from liger_fn.functional import fused_moe


class Experts(nn.Module):
    """The gated MLPs among which a router chooses for each token.

    state_dict keys and shapes are those of Hugging Face's experts (Qwen3MoeExperts and its kin):
    gate_up_proj (E, 2F, D) and down_proj (E, D, F), and with a bias gate_up_proj_bias (E, 2F) and
    down_proj_bias (E, D).

    Args:
        num_experts: E.
        hidden_size: D, the width of x.
        intermediate_size: F, the width between.
        bias: whether both projections have one.
        transposed: whether both are held the other way, (E, D, 2F) and (E, F, D), as GptOssExperts
            holds them.
        unit: the options of the unit, as `liger_fn.functional.gated_activation` has them; of
            GPT-OSS alpha=1.702, limit=7.0, up_offset=1.0, interleaved=True.
    """

    gate_up_proj_bias: Tensor | None
    down_proj_bias: Tensor | None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        *,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unit: Any,
    ) -> None:
        super().__init__()
        E, D, F = num_experts, hidden_size, intermediate_size

        def parameter(*shape: int, fan_in: int = 0) -> nn.Parameter:
            t = torch.zeros(shape, device=device, dtype=dtype)
            return nn.Parameter(nn.init.normal_(t, std=fan_in**-0.5) if fan_in else t)

        self.gate_up_proj = parameter(E, *((D, 2 * F) if transposed else (2 * F, D)), fan_in=D)
        self.gate_up_proj_bias = parameter(E, 2 * F) if bias else None
        self.down_proj = parameter(E, *((F, D) if transposed else (D, F)), fan_in=F)
        self.down_proj_bias = parameter(E, D) if bias else None
        self.transposed, self.unit = transposed, unit

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Give Σ_k weights[..., k] · expert[indices[..., k]](x)."""
        return fused_moe(
            x,
            indices,
            weights,
            self.gate_up_proj.transpose(1, 2) if self.transposed else self.gate_up_proj,
            self.down_proj.transpose(1, 2) if self.transposed else self.down_proj,
            gate_up_bias=self.gate_up_proj_bias,
            down_bias=self.down_proj_bias,
            **self.unit,
        )

    def extra_repr(self) -> str:
        shape = f"gate_up_proj={tuple(self.gate_up_proj.shape)}, transposed={self.transposed}"
        return ", ".join([shape, *(f"{k}={v!r}" for k, v in self.unit.items())])
