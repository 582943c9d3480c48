"""A bridge for users of Hugging Face's `kernels` package: our norm under the name it gives norms.

    from kernels import Mode, kernelize, use_kernel_mapping
    with use_kernel_mapping(kernel_mapping(), inherit_mapping=False):
        kernelize(model, mode=Mode.TRAINING)

`apply` does more and needs nothing installed. Classes that transformers marks "RMSNorm" do not all
round alike, so here too a proof decides, at the first call of each class; a class without one keeps
its own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from liger_fn.hf.families import FAMILIES, NORM
from liger_fn.hf.probe import Rejected


class RMSNorm(nn.Module):
    """The layer that `kernelize` takes the forward of; its `self` is then the model's own norm."""

    can_torch_compile = False
    has_backward = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return _forward_for(self)(self, hidden_states)


@dataclass(frozen=True)
class Repository:
    """What `kernels` asks for a layer."""

    layer: type[nn.Module]

    def load(self) -> type[nn.Module]:
        return self.layer


def kernel_mapping(devices: tuple[str, ...] = ("cuda",)) -> dict[str, dict[str, Repository]]:
    """Return a mapping for `kernels.use_kernel_mapping` that brings our norm to these devices."""
    return {"RMSNorm": dict.fromkeys(devices, Repository(RMSNorm))}


_forwards: dict[type, Callable] = {}


def _forward_for(norm: nn.Module) -> Callable:
    if type(norm) not in _forwards:
        _forwards[type(norm)] = _proved_forward(norm)
    return _forwards[type(norm)]


def _proved_forward(norm: nn.Module) -> Callable:
    try:
        return NORM.prove(
            norm, [family for family in FAMILIES if family.place is NORM]
        ).candidate.run
    except Rejected:
        return type(norm).forward
