"""What modulated norms share: each sample has a scale and a shift of its own. Kernels: rows.py.

A scale is for a norm's kernels a weight, of which each sample has one, and a shift a bias.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.core.launch import accumulator


def reference_samples(
    x: Tensor, scale: Tensor, shift: Tensor | None, offset: float, eps: float, centred: bool
) -> Tensor:
    """The norm of x (..., T, D), modulated by scale and shift (..., D)."""
    h = x.to(accumulator(x.dtype))
    if centred:
        h = h - h.mean(-1, keepdim=True)
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    y = y * (scale.to(h.dtype) + offset)[..., None, :]
    if shift is not None:
        y = y + shift.to(h.dtype)[..., None, :]
    return y.to(x.dtype)


def samples_of(x: Tensor, scale: Tensor) -> Sequence[int]:
    """The sizes of x that scale has too: its other rows share a sample's scale."""
    sizes = list(scale.shape[:-1])
    if scale.dim() == x.dim():
        while sizes and sizes[-1] == 1:
            sizes.pop()
    return sizes


def by_sample(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """View x (*sizes, ..., D) as (*sizes, T, D)."""
    return x.reshape(*sizes, math.prod(x.shape[len(sizes) : -1]), x.shape[-1])


def check_modulation(op: str, x: Tensor, scale: Tensor, shift: Tensor | None) -> None:
    check.floating(op, "scale", scale)
    check.at_least_1d(op, "scale", scale)
    sizes = samples_of(x, scale)
    fits = list(x.shape[: len(sizes)]) == sizes and len(sizes) < x.dim()
    if not fits or scale.shape[-1] != x.shape[-1]:
        contract = (
            f"have the last size of `x`, {x.shape[-1]}, after the first sizes of `x`, "
            f"{check.spell(x.shape[:-1])}, or some of them"
        )
        check.fail(op, "scale", contract, f"shape {check.spell(scale.shape)}")
    check.device(op, "scale", scale, x, "x")
    if shift is not None:
        check.floating(op, "shift", shift)
        check.shape(op, "shift", shift, scale.shape, "the shape of `scale`")
        check.device(op, "shift", shift, x, "x")
