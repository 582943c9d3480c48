"""Fused training ops for PyTorch as pure functions, and an adapter for Hugging Face models.

    liger_fn.functional   the ops
    liger_fn.nn           modules over them
    liger_fn.hf           find, prove and undo replacements in Hugging Face models
    liger_fn.testing      what `python -m liger_fn verify` runs

Importing `liger_fn` itself imports nothing heavy: each part is imported when it is first named.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__version__ = "0.1.0"
__all__ = ["__version__", "functional", "hf", "nn", "testing"]

_PARTS = ("functional", "hf", "nn", "testing")


def __getattr__(name: str) -> ModuleType:
    if name in _PARTS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PARTS})
