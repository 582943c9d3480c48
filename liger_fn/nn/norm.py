"""Normalisation modules."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from liger_fn.functional import rms_norm
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
        shape = (
            (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        )
        if len(shape) != 1:
            raise NotImplementedError(
                f"RMSNorm: `normalized_shape` must have one dimension; got {shape}."
            )
        self.normalized_shape, self.eps = shape, eps
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

    def forward(self, x: Tensor) -> Tensor:
        eps = torch.finfo(accumulator(x.dtype)).eps if self.eps is None else self.eps
        return rms_norm(
            x,
            self.weight,
            eps=eps,
            offset=self.offset,
            cast_before_weight=self.cast_before_weight,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape[0]}, eps={self.eps}, "
            f"elementwise_affine={self.weight is not None}, "
            f"offset={self.offset}, cast_before_weight={self.cast_before_weight}"
        )
