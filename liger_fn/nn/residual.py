"""Residual connections that are learned."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from liger_fn.functional import attention_residual


class AttentionResidual(nn.Module):
    """What a layer takes in where residuals are attended to instead of added up.

        h = AttentionResidual(D)(outputs)   of the outputs (L, ..., D) of all blocks before

    One of them belongs before each attention and each MLP. The state_dict keys are `query`, which
    starts at 0, so that all blocks count alike, and `weight`, that of the norm.

    Args:
        hidden_size: D.
        eps: see `liger_fn.functional.attention_residual`.
        elementwise_affine: whether the norm has a weight, which starts at 1.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.query = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))
        weight = torch.ones(hidden_size, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight) if elementwise_affine else None

    def forward(self, values: Tensor | Sequence[Tensor]) -> Tensor:
        return attention_residual(values, self.query, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        affine = self.weight is not None
        return f"{self.query.shape[0]}, eps={self.eps}, elementwise_affine={affine}"
