"""A bridge for users of Hugging Face's `kernels` package: our ops under the names it gives layers.

    from kernels import Mode, kernelize, use_kernel_mapping
    with use_kernel_mapping(kernel_mapping(), inherit_mapping=False):
        kernelize(model, mode=Mode.TRAINING)

`apply` does more and needs nothing installed. What transformers marks "RMSNorm" or "rotary_pos_emb"
does not all compute alike, so here too a proof decides, at the first call of each class; a class
without one keeps its own forward. Rotary functions are global in their file, also to `kernels`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from liger_fn.hf.families import FAMILIES, NORM
from liger_fn.hf.probe import Rejected
from liger_fn.hf.rotary import guarded, prove_rotary


class RMSNorm(nn.Module):
    """The layer that `kernelize` takes the forward of; its `self` is then the model's own norm."""

    can_torch_compile = False
    has_backward = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return _of_class(self, _proved_norm)(self, hidden_states)


class RotaryPosEmb(nn.Module):
    """The same for what `kernels` makes of a rotary function."""

    can_torch_compile = False
    has_backward = True

    def forward(self, q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        return _of_class(self, _proved_rotary)(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)


@dataclass(frozen=True)
class Repository:
    """What `kernels` asks for a layer."""

    layer: type[nn.Module]

    def load(self) -> type[nn.Module]:
        return self.layer


def kernel_mapping(devices: tuple[str, ...] = ("cuda",)) -> dict[str, dict[str, Repository]]:
    """Return a mapping for `kernels.use_kernel_mapping`: our norm and rope on these devices."""
    layers = {"RMSNorm": RMSNorm, "rotary_pos_emb": RotaryPosEmb}
    return {name: dict.fromkeys(devices, Repository(layer)) for name, layer in layers.items()}


_proved: dict[type, Callable] = {}


def _of_class(layer: nn.Module, prove: Callable[[Any], Callable]) -> Callable:
    if type(layer) not in _proved:
        _proved[type(layer)] = prove(layer)
    return _proved[type(layer)]


def _proved_norm(norm: nn.Module) -> Callable:
    families = [family for family in FAMILIES if family.place is NORM]
    try:
        return NORM.prove(norm, families).candidate.run
    except Rejected:
        return type(norm).forward


def _proved_rotary(layer: nn.Module) -> Callable:
    original = functools.partial(type(layer).forward, layer)
    try:
        return guarded(original, prove_rotary(original))
    except Rejected:
        return original
