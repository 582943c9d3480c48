"""Layers in the place of a norm as modules."""

import torch
from torch import Tensor, nn

from liger_fn.functional import dyt


class DyT(nn.Module):
    """Dynamic tanh: y = tanh(alpha · x) · weight + bias.

    The state_dict keys are the paper's: alpha, weight, bias. See `liger_fn.functional.dyt`.

    Args:
        num_features: D.
        alpha_init_value: where alpha starts.
    """

    def __init__(
        self,
        num_features: int,
        alpha_init_value: float = 0.5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        alpha = torch.full((1,), alpha_init_value, device=device, dtype=dtype)
        self.alpha = nn.Parameter(alpha)
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return dyt(x, self.alpha, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}"
