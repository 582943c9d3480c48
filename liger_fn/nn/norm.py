"""Normalisation modules."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from liger_fn.functional import fused_add_rms_norm, layer_norm, rms_norm
from liger_fn.functional.core.launch import accumulator


class RMSNorm(nn.Module):
    """Normalise the last dimension by its root mean square: y = x̂ · (offset + weight).

    Takes the place of torch.nn.RMSNorm and of Hugging Face's LlamaRMSNorm
    (`cast_before_weight=True`), GemmaRMSNorm (`offset=1.0`) and their kin; the one state_dict key
    is `weight`.

    Args:
        normalized_shape: D, or (D,).
        eps: added to the mean square; None is torch.nn.RMSNorm's choice, the machine epsilon of
            float32 (of float64 for float64 x).
        elementwise_affine: whether there is a weight. It starts at 1 − offset, so that the norm
            starts as x̂.
        offset, cast_before_weight: see `liger_fn.functional.rms_norm`.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = 1e-6,
        elementwise_affine: bool = True,
        *,
        offset: float = 0.0,
        cast_before_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = shape = _one_dimension(self, normalized_shape)
        self.eps = eps
        self.offset, self.cast_before_weight = offset, cast_before_weight
        self.weight: nn.Parameter | None
        if elementwise_affine:
            self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.offset)

    def options(self, x: Tensor) -> dict[str, Any]:
        eps = torch.finfo(accumulator(x.dtype)).eps if self.eps is None else self.eps
        return {
            "eps": eps,
            "offset": self.offset,
            "cast_before_weight": self.cast_before_weight,
        }

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, **self.options(x))

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape[0]}, eps={self.eps}, "
            f"elementwise_affine={self.weight is not None}, "
            f"offset={self.offset}, cast_before_weight={self.cast_before_weight}"
        )


class FusedAddRMSNorm(RMSNorm):
    """Add a residual and normalise the sum: `y, s = norm(x, residual)` with s = x + residual.

    Between two layers of a model it takes the place of the addition and the RMSNorm after it; s is
    the next residual. Parameters, state_dict key and options are those of `RMSNorm`.
    """

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return fused_add_rms_norm(x, residual, self.weight, **self.options(x))


class LayerNorm(nn.Module):
    """Normalise the last dimension to mean 0 and variance 1: y = x̂ · weight + bias.

    Takes the place of torch.nn.LayerNorm; the state_dict keys are `weight` and `bias`.

    Args:
        normalized_shape: D, or (D,).
        eps: added to the variance.
        elementwise_affine: whether there is a weight, which starts at 1.
        bias: whether there is a bias too, which starts at 0.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = shape = _one_dimension(self, normalized_shape)
        self.eps, self.elementwise_affine = eps, elementwise_affine
        for name, there_is in (("weight", True), ("bias", bias)):
            parameter = None
            if elementwise_affine and there_is:
                parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape[0]}, eps={self.eps}, "
            f"elementwise_affine={self.elementwise_affine}, bias={self.bias is not None}"
        )


def _one_dimension(norm: nn.Module, normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """Give (D,); several dimensions are torch's to normalise."""
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if len(shape) != 1:
        raise NotImplementedError(
            f"{type(norm).__name__}: `normalized_shape` must have one dimension; got {shape}."
        )
    return shape
