"""Activation modules."""

from torch import Tensor, nn

from liger_fn.functional import softmax


class Softmax(nn.Module):
    """Turn one dimension into probabilities; takes the place of torch.nn.Softmax.

    Args:
        dim: the dimension; any but the last is moved there and back, as views.
        scale: see `liger_fn.functional.softmax`; so is the mask that forward takes.
    """

    def __init__(self, dim: int = -1, *, scale: float = 1.0) -> None:
        super().__init__()
        self.dim, self.scale = dim, scale

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            mask = mask.expand(x.shape).movedim(self.dim, -1)
        y = softmax(x.movedim(self.dim, -1), mask=mask, scale=self.scale)
        return y.movedim(-1, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, scale={self.scale}"
