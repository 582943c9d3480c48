"""Activation modules."""

from torch import Tensor, nn

from liger_fn.functional import relu_squared, softmax, sparsemax


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


class ReLUSquared(nn.Module):
    """The square of the positive part, transformers' "relu2". See `functional.relu_squared`."""

    def forward(self, input: Tensor) -> Tensor:
        return relu_squared(input)


class Sparsemax(nn.Module):
    """The projection onto distributions along `dim`. See `functional.sparsemax`."""

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        return sparsemax(input, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
