"""The models that are measured: widths of published ones, with as many layers as the time allows.

A layer repeats, so that a few of them show what all of them do; the embedding and the head are
whole, and weigh more in a model with few layers than in the one that it stands for.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A configuration class of transformers, what it is given, and the batch it is trained with."""

    config: str
    sizes: dict[str, Any] = field(repr=False)
    batch: int
    seq: int
    is_for_tests: bool = False


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


SHAPES = {
    "llama-1b": Shape(
        "LlamaConfig",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "rope_parameters": _rope(5e5),
        },
        batch=4,
        seq=4096,
    ),
    "llama-8b-4": Shape(
        "LlamaConfig",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 4,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
            "rope_parameters": _rope(5e5),
        },
        batch=2,
        seq=4096,
    ),
    "qwen3-4b-6": Shape(
        "Qwen3Config",
        {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 6,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
            "max_position_embeddings": 40960,
            "rope_parameters": _rope(1e6),
        },
        batch=2,
        seq=4096,
    ),
    "gemma3-4b-6": Shape(
        "Gemma3TextConfig",
        {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            # Five layers with a window and one without, as in the whole model.
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "vocab_size": 262208,
            "sliding_window": 1024,
            "max_position_embeddings": 131072,
        },
        batch=2,
        seq=4096,
    ),
    "mistral-7b-4": Shape(
        "MistralConfig",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 4,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 32768,
            "sliding_window": None,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 32768,
            "rope_parameters": _rope(1e6),
        },
        batch=2,
        seq=4096,
    ),
    "qwen3-moe-2": Shape(
        "Qwen3MoeConfig",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_hidden_layers": 2,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "rope_parameters": _rope(1e6),
        },
        batch=2,
        seq=4096,
    ),
    "tiny": Shape(
        "LlamaConfig",
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 320,
            "tie_word_embeddings": True,
        },
        batch=2,
        seq=32,
        is_for_tests=True,
    ),
}

_SMALL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}

# Small enough for hundreds of steps in seconds; the vocabulary is that of the text.
CURVES = {
    "llama-small": Shape("LlamaConfig", _SMALL, batch=8, seq=256),
    "qwen3-small": Shape("Qwen3Config", _SMALL, batch=8, seq=256),
    "gemma3-small": Shape("Gemma3TextConfig", {**_SMALL, "sliding_window": 64}, batch=8, seq=256),
}
