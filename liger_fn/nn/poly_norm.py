"""Polynomial activations as modules."""

import torch
from torch import Tensor, nn

from liger_fn.functional import poly_norm


class PolyNorm(nn.Module):
    """A polynomial of degree three whose powers are normalised, as an activation.

    The state_dict keys are the paper's: weight (3,) and bias (1,). See
    `liger_fn.functional.poly_norm`.
    """

    def __init__(
        self,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((3,), 1.0 / 3.0, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return poly_norm(x, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"
