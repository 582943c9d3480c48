"""One file per op; its `SPEC` states the facts."""

import importlib

OPS = (
    "attention_residual",
    "cross_entropy",
    "dyt",
    "embedding",
    "fused_add_rms_norm",
    "fused_linear_cosine",
    "fused_linear_cross_entropy",
    "fused_linear_jsd",
    "fused_linear_kl_div",
    "fused_linear_logprobs",
    "fused_linear_selected_logprobs",
    "fused_linear_tvd",
    "fused_mlp",
    "fused_moe",
    "gated_activation",
    "gated_linear",
    "gated_rms_norm",
    "geglu",
    "group_norm",
    "jsd",
    "kl_div",
    "layer_norm",
    "logprobs",
    "mhc_post",
    "mhc_pre",
    "modulated_layer_norm",
    "modulated_rms_norm",
    "multi_token_attention",
    "neighborhood_attention",
    "poly_norm",
    "relu_squared",
    "rms_norm",
    "rope",
    "soft_target_cross_entropy",
    "softmax",
    "sparsemax",
    "swiglu",
    "tvd",
)


def specs():
    """The spec of every op, in the order of the door."""
    return tuple(importlib.import_module(f"{__name__}.{name}").SPEC for name in OPS)
