"""Rotary position embedding as a module."""

from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor, nn

from liger_fn.functional import rope


class RotaryEmbedding(nn.Module):
    """Rotate queries and keys by their positions.

    Angles are position · base^(−2i/R) for pair i of R rotated features, computed in float32. There
    is no parameter and no state_dict key (`inv_freq` is a buffer that is not saved, as in Hugging
    Face's class; it stays in float32 when the module is cast).

    Args:
        head_dim: C, the width of a head.
        base: the longest wavelength is about 2π · base.
        rotary_dim: R, the leading features that are rotated; None: all C.
        interleaved: pairs are (2i, 2i+1) instead of (i, i + R/2).
        layout: "bhtc" or "bthc", the order of q's and k's dimensions.
    """

    inv_freq: Tensor

    def __init__(
        self,
        head_dim: int,
        base: float = 10000.0,
        *,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        layout: Literal["bhtc", "bthc"] = "bhtc",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.head_dim, self.base = head_dim, base
        self.rotary_dim = head_dim if rotary_dim is None else rotary_dim
        self.interleaved, self.layout = interleaved, layout
        pairs = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device=device)
        self.register_buffer("inv_freq", base ** (-pairs / self.rotary_dim), persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        # What moves and casts a module calls this. In 16 bits the angles of far tokens would be off
        # by whole radians.
        inv_freq = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype is not inv_freq.dtype:
            self.inv_freq = inv_freq.to(self.inv_freq.device)
        return self

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Give cos and sin (..., R/2) of positions (...), in float32."""
        angles = positions[..., None].float() * self.inv_freq.float()
        return angles.cos(), angles.sin()

    def forward(
        self, q: Tensor, k: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rotate q (B, H, T, C) and k (B, K, T, C); positions (T,) or (B, T), default 0, 1, 2, …"""
        if positions is None:
            tokens = q.shape[2 if self.layout == "bhtc" else 1]
            positions = torch.arange(tokens, device=q.device)
        cos, sin = self.cos_sin(positions)
        return rope(
            q,
            k,
            cos,
            sin,
            rotary_dim=self.rotary_dim,
            interleaved=self.interleaved,
            layout=self.layout,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.head_dim}, base={self.base}, rotary_dim={self.rotary_dim}, "
            f"interleaved={self.interleaved}, layout={self.layout!r}"
        )
