"""Who is measured: a model of Hugging Face as it is, patched, compiled, or patched and compiled.

A name is one of PATCHES, or `module:function` for a patch of your own, which takes the model; with
`+compile` after it the patched model is compiled.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

import liger_fn

COMPILE = "+compile"
NAMES = ("hf", "hf+compile", "liger", "liger_fn", "liger_fn+compile")
REFERENCE = "hf"

Patch = Callable[[Any], Any]


@dataclass(frozen=True)
class Provider:
    """What is done to the model: `patch` returns what it replaced, in words or as a report."""

    name: str
    patch: Patch
    compiled: bool
    version: str = ""


def _hf(model: Any) -> str:
    return ""


def _liger(model: Any) -> str:
    from liger_kernel.transformers.monkey_patch import (
        MODEL_TYPE_TO_APPLY_LIGER_FN,
        _apply_liger_kernel_to_instance,
    )

    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise NotImplementedError(f"liger-kernel has no patch for {kind}")
    _apply_liger_kernel_to_instance(model=model)
    return "what its function for the model type replaces"


def _liger_fn(model: Any) -> str:
    from liger_fn import hf

    counts = hf.apply(model).replaced()
    return "replaced " + ", ".join(f"{op} {count}" for op, count in counts.items())


# Each with what it imports, and what tells its version.
PATCHES: dict[str, tuple[Patch, str, Callable[[], str]]] = {
    "hf": (_hf, "transformers", lambda: f"transformers {version('transformers')}"),
    "liger": (
        _liger,
        "liger_kernel.transformers.monkey_patch",
        lambda: f"liger-kernel {version('liger-kernel')}",
    ),
    # Its package may be a checkout, which is not installed.
    "liger_fn": (_liger_fn, "liger_fn.hf", lambda: f"liger_fn {liger_fn.__version__}"),
}


def find(name: str) -> Provider:
    """Find a provider by its name; imports what it needs, and may fail as imports do."""
    base, compiled = base_name(name), name.endswith(COMPILE)
    if base not in PATCHES:
        module, _, attribute = base.partition(":")
        return Provider(name, getattr(importlib.import_module(module), attribute), compiled)
    patch, module, tell_version = PATCHES[base]
    importlib.import_module(module)
    return Provider(name, patch, compiled, tell_version())


def base_name(name: str) -> str:
    return name.removesuffix(COMPILE)


def is_name(name: str) -> bool:
    """Say whether this may be a provider's name; whether it works shows when it runs."""
    return base_name(name) in PATCHES or ":" in name


def missing(name: str, device: torch.device) -> str:
    """Say why a provider cannot run here; the empty string if nothing speaks against it."""
    if base_name(name) != "liger":
        return ""
    if device.type != "cuda":
        return "needs a GPU"
    if importlib.util.find_spec("liger_kernel") is None:
        return "is not installed; pip install '.[peers]'"
    return ""
