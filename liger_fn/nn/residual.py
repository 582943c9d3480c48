"""Residual connections that are learned."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from liger_fn.functional import attention_residual, mhc_post, mhc_pre


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


class HyperConnection(nn.Module):
    """Manifold-constrained hyper-connection: residual streams around one layer.

        post, comb, h = connection(x)       of x (..., H, D), h (..., D)
        x = mhc_post(x, layer(h), post, comb.transpose(-1, -2))

    Takes the place of Hugging Face's DeepseekV4HyperConnection and Glm5NextTextHyperConnection; the
    state_dict keys are theirs: `fn` (H² + 2·H, H · D), `base` (H² + 2·H,) and `scale` (3,).
    `HyperConnected` does both lines.

    Args:
        hidden_size: D, the width of a stream.
        streams: H.
        iterations, eps, sinkhorn_eps, pre_eps, post_scale: see `liger_fn.functional.mhc_pre`; what
            these models call hc_eps is both sinkhorn_eps and pre_eps.
    """

    def __init__(
        self,
        hidden_size: int,
        streams: int = 4,
        iterations: int = 20,
        *,
        eps: float = 1e-6,
        sinkhorn_eps: float = 1e-6,
        pre_eps: float = 1e-6,
        post_scale: float = 2.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        coefficients = streams * (streams + 2)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        fn = torch.empty(coefficients, streams * hidden_size, **like)
        self.fn = nn.Parameter(nn.init.normal_(fn, std=0.02))
        self.base = nn.Parameter(torch.zeros(coefficients, **like))
        self.scale = nn.Parameter(torch.ones(3, **like))
        self.options: dict[str, Any] = {
            "iterations": iterations,
            "eps": eps,
            "sinkhorn_eps": sinkhorn_eps,
            "pre_eps": pre_eps,
            "post_scale": post_scale,
        }

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, post, comb = mhc_pre(x, self.fn, self.base, self.scale, **self.options)
        return post, comb, h

    def extra_repr(self) -> str:
        shape = f"fn={tuple(self.fn.shape)}"
        return ", ".join([shape, *(f"{k}={v!r}" for k, v in self.options.items())])


class HyperConnected(nn.Module):
    """A layer with its hyper-connection: it takes and gives H streams (..., H, D).

    The state_dict keys are those of `layer` and `connection`.

    Args:
        layer: takes and gives (..., D).
        hidden_size, streams, options: see `HyperConnection`.
    """

    def __init__(
        self, layer: nn.Module, hidden_size: int, streams: int = 4, **options: Any
    ) -> None:
        super().__init__()
        self.layer = layer
        self.connection = HyperConnection(hidden_size, streams, **options)

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """Give the streams after the layer, which gets the further arguments."""
        post, comb, h = self.connection(x)
        return mhc_post(x, self.layer(h, *arguments, **options), post, comb.transpose(-1, -2))
