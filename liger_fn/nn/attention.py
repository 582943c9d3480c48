"""Attention modules."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from liger_fn.functional import multi_token_attention
from liger_fn.functional.attention.multi_token_attention import Pair


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
