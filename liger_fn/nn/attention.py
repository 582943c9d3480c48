"""Attention modules."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from liger_fn.functional import multi_token_attention, neighborhood_attention
from liger_fn.functional.attention.multi_token_attention import Pair
from liger_fn.functional.attention.neighborhood_attention import Window
from liger_fn.functional.core import check


class MultiTokenAttention(nn.Conv2d):
    """Causal weights of attention, mixed over queries, keys and heads by a convolution.

    Parameters, their names and how they begin are those of torch.nn.Conv2d.

    Args:
        in_channels, out_channels: the heads of scores, and of what comes out.
        kernel_size: how many queries and how many keys are mixed: one number, or two.
        stride, padding, dilation, groups, sparse: see `liger_fn.functional.multi_token_attention`.
        bias: whether there is one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | Literal["causal"] = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        sparse: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            0 if padding == "causal" else padding,
            dilation,
            groups,
            bias,
            device=device,
            dtype=dtype,
        )
        self.options: dict[str, Any] = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "sparse": sparse,
        }

    def forward(self, scores: Tensor) -> Tensor:
        """Mix scores (..., H, T, T), which are scaled and not yet masked."""
        return multi_token_attention(scores, self.weight, self.bias, **self.options)

    def extra_repr(self) -> str:
        padding, sparse = self.options["padding"], self.options["sparse"]
        return f"{super().extra_repr()}, padding={padding!r}, sparse={sparse}"


class NeighborhoodAttention(nn.Module):
    """Attention of each token to a window around it, between projections.

    Its parameters are those of four nn.Linear: q_proj, k_proj, v_proj and out_proj.

    Args:
        hidden_size: the width of tokens.
        num_heads: how many heads share it.
        kernel_size: how many tokens a window has; two numbers for tokens in a plane.
        dilation, window, scale: see `liger_fn.functional.neighborhood_attention`.
        bias: whether the projections have one.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        kernel_size: int | tuple[int, ...] = 7,
        dilation: int | tuple[int, ...] = 1,
        bias: bool = True,
        *,
        window: Window = "shifted",
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            contract = f"divide {hidden_size}, the hidden size"
            check.fail("NeighborhoodAttention", "num_heads", contract, num_heads)

        def projection() -> nn.Linear:
            return nn.Linear(hidden_size, hidden_size, bias, device=device, dtype=dtype)

        self.q_proj, self.k_proj, self.v_proj = projection(), projection(), projection()
        self.out_proj = projection()
        self.num_heads, self.kernel_size = num_heads, kernel_size
        self.options: dict[str, Any] = {"dilation": dilation, "window": window, "scale": scale}

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens (..., T, D), or (..., T₁, T₂, D) for two kernel sizes."""
        sizes = self.kernel_size if isinstance(self.kernel_size, tuple) else (self.kernel_size,)
        before_tokens = -2 - len(sizes)
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).movedim(-2, before_tokens)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = neighborhood_attention(q, k, v, self.kernel_size, **self.options)
        return self.out_proj(y.movedim(before_tokens, -2).flatten(-2))

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, {options}"
