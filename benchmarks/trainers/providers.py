"""Whose trainers are measured: TRL's as they are, with its own options, and ours.

TRL 1.14 made what was `loss_type="chunked_nll"` its only way to compute a loss: there is no other
default to compare with. `use_liger_kernel` has it patch layers; its loss stays its own.
"""

import importlib
import importlib.util
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from benchmarks.trainers.sizes import TRAINERS

REFERENCE, NUDGED = "trl", "trl-nudged"


@dataclass(frozen=True)
class Provider:
    """One way to train.

    Attributes:
        module: where the trainers are.
        options: of the trainer's configuration.
        attributes: of a subclass of the trainer.
        trainers: those that it makes a difference for.
        nudge: whether weights begin as far away as bfloat16 rounds them, which shows how far
            rounding alone carries the losses.
        packages: whose versions a row names.
    """

    module: str
    options: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    trainers: tuple[str, ...] = TRAINERS
    nudge: bool = False
    packages: tuple[str, ...] = ("trl",)

    def trainer(self, name: str) -> type:
        made = getattr(importlib.import_module(self.module), f"{name}Trainer")
        return type(made.__name__, (made,), dict(self.attributes)) if self.attributes else made

    def version(self) -> str:
        return ", ".join(f"{package} {version(package)}" for package in self.packages)


OURS = "liger_fn.hf.trl"
# After the dash: only the loss, or all; in small chunks of rows; without metrics of tokens.
PROVIDERS = {
    REFERENCE: Provider("trl"),
    NUDGED: Provider("trl", nudge=True),
    "trl+liger": Provider("trl", {"use_liger_kernel": True}, packages=("trl", "liger-kernel")),
    "liger_fn-loss": Provider(OURS, attributes={"ops": ("fused_linear_cross_entropy",)}),
    "liger_fn": Provider(OURS),
    "liger_fn-small": Provider(OURS, attributes={"chunk_size": 1024}),
    "liger_fn-lean": Provider(OURS, attributes={"token_metrics": False}, trainers=("SFT",)),
}


# Where kernels are not compiled, there is nothing to see of the others.
ON_A_CPU = (REFERENCE, "liger_fn")


def missing(name: str, device: torch.device) -> str:
    """Say why a provider cannot run here; the empty string if nothing speaks against it."""
    for package in ("trl", "datasets", "accelerate"):
        if importlib.util.find_spec(package) is None:
            return f"needs {package}, which is not installed; pip install trl"
    if name != "trl+liger":
        return ""
    if device.type != "cuda":
        return "needs a GPU"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed; pip install '.[peers]'"
    return ""
