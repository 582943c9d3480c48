"""Calls so small that nobody waits for the device: they show what a call costs the host."""

import torch
from torch import Tensor

from liger_fn.testing.spec import Benchmark, Draw, OpSpec
from liger_fn.testing.specs import (
    attention_residual,
    fused_mlp,
    fused_moe,
    gated_linear,
    mhc_post,
    mhc_pre,
)
from liger_fn.testing.specs.fused_linear_divergence import heads


def _log_probabilities(d: Draw) -> Tensor:
    return d.normal(16, 1024).float().log_softmax(-1).to(d.dtype)


_TINY = {
    "rms_norm": lambda d: {"x": d.normal(16, 1024), "weight": d.normal(1024)},
    "fused_add_rms_norm": lambda d: {
        "x": d.normal(16, 1024),
        "residual": d.normal(16, 1024),
        "weight": d.normal(1024),
    },
    "layer_norm": lambda d: {
        "x": d.normal(16, 1024),
        "weight": d.normal(1024),
        "bias": d.normal(1024),
    },
    "swiglu": lambda d: {"gate": d.normal(16, 1024), "up": d.normal(16, 1024)},
    "geglu": lambda d: {"gate": d.normal(16, 1024), "up": d.normal(16, 1024)},
    "softmax": lambda d: {"x": d.normal(16, 1024)},
    "rope": lambda d: {
        "q": d.normal(1, 16, 8, 64).transpose(1, 2),
        "k": d.normal(1, 16, 2, 64).transpose(1, 2),
        "cos": d.uniform(1, 16, 32).repeat(1, 1, 2),
        "sin": d.uniform(1, 16, 32).repeat(1, 1, 2),
    },
    "jsd": lambda d: {"input": _log_probabilities(d), "target": _log_probabilities(d)},
    "kl_div": lambda d: {
        "input": _log_probabilities(d),
        "target": _log_probabilities(d),
        "reduction": "batchmean",
        "log_target": True,
    },
    "tvd": lambda d: {"input": _log_probabilities(d).exp(), "target": _log_probabilities(d).exp()},
    "soft_target_cross_entropy": lambda d: {
        "logits": d.normal(16, 1024),
        "target": _log_probabilities(d).exp(),
    },
    "cross_entropy": lambda d: {"logits": d.normal(16, 1024), "target": d.integers(1024, 16)},
    "fused_linear_cross_entropy": lambda d: {
        # Not as many tokens as features, which quack refuses.
        "weight": d.normal(1024, 256, scale=0.1),
        "x": d.normal(128, 256),
        "y": d.integers(1024, 128),
    },
    "logprobs": lambda d: {"logits": d.normal(16, 1024), "target": d.integers(1024, 16)},
    "fused_linear_logprobs": lambda d: {
        "weight": d.normal(1024, 256, scale=0.1),
        "x": d.normal(128, 256),
        "y": d.integers(1024, 128),
    },
    "fused_linear_selected_logprobs": lambda d: {
        "weight": d.normal(1024, 256, scale=0.1),
        "x": d.normal(128, 256),
        "indices": d.integers(1024, 128, 16),
    },
    "fused_linear_cosine": lambda d: heads(d, 128, 256, 512, 1024),
    "fused_linear_jsd": lambda d: heads(d, 128, 256, 512, 1024),
    "fused_linear_kl_div": lambda d: heads(d, 128, 256, 512, 1024),
    "fused_linear_tvd": lambda d: heads(d, 128, 256, 512, 1024, apart=True),
    "attention_residual": lambda d: attention_residual.arguments(d, 4, 1, 16, 1024),
    "mhc_pre": lambda d: mhc_pre.arguments(d, 1, 16, 4, 256, params=torch.float32),
    "mhc_post": lambda d: mhc_post.arguments(d, 1, 16, 4, 256),
    "fused_mlp": lambda d: fused_mlp.arguments(d, (1, 64), 64, 32),
    "gated_linear": lambda d: gated_linear.arguments(d, (1, 64), 32, 64),
    "neighborhood_attention": lambda d: {
        **{n: d.normal(1, 16, 2, 64).transpose(1, 2) for n in ("q", "k", "v")},
        "kernel_size": 7,
    },
    "fused_moe": lambda d: fused_moe.arguments(d, (64,), 64, 32, 4, 2),
}


def tiny(spec: OpSpec) -> Benchmark:
    """The op's tiny call; of an op that has none here, the first case of its tests."""
    grads = spec.benchmarks[0].grads if spec.benchmarks else ()
    return Benchmark("tiny", _TINY.get(spec.name, spec.cases[0].make), grads=grads)
