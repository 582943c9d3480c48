"""Find, prove and undo replacements in Hugging Face models.

    from liger_fn.hf import apply
    report = apply(model)
    print(report)
    report.undo()

`apply_to_llama`, `apply_to_qwen3` and so on exist for every causal and image-text model type of
transformers; they are made when they are first named.
"""

from __future__ import annotations

from liger_fn.hf.install import Report, apply, patched, undo
from liger_fn.hf.kernels import kernel_mapping
from liger_fn.hf.names import (
    ApplyTo,
    AutoLigerKernelForCausalLM,
    AutoLigerKernelForImageTextToText,
    apply_to,
    functions,
)

__all__ = [
    "AutoLigerKernelForCausalLM",
    "AutoLigerKernelForImageTextToText",
    "Report",
    "apply",
    "kernel_mapping",
    "patched",
    "undo",
]


def __getattr__(name: str) -> ApplyTo:
    if name in functions():
        return apply_to(functions()[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *functions()})
