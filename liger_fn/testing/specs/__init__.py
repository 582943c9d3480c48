"""One file per op; its `SPEC` states the facts."""

import importlib

OPS = (
    "cross_entropy",
    "fused_add_rms_norm",
    "fused_linear_cross_entropy",
    "geglu",
    "layer_norm",
    "rms_norm",
    "rope",
    "fused_linear_cross_entropy",
    "geglu",
    "rms_norm",
    "rope",
    "softmax",
    "fused_linear_cross_entropy",
    "fused_linear_logprobs",
    "geglu",
    "logprobs",
    "rms_norm",
    "rope",
    "swiglu",
)


def specs():
    """The spec of every op, in the order of the door."""
    return tuple(importlib.import_module(f"{__name__}.{name}").SPEC for name in OPS)
