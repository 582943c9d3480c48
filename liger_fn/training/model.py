"""The model to train: a built-in Llama, a Hugging Face config, or a model directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from liger_fn.training.options import BadInput
from liger_fn.training.text import byte_pair_tokenizer, byte_tokenizer

SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LARGE: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
}


def unpatched(model: PreTrainedModel) -> None:
    """Leave the model as Hugging Face made it."""


def patched(model: PreTrainedModel) -> Any:
    """Apply liger_fn to this one model; returns the report of what was replaced."""
    from liger_fn import hf

    return hf.apply(model)


PATCHES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "unpatched": unpatched,
    "patched": patched,
}


def has_weights(source: Path | None) -> bool:
    """Say whether a model directory holds weights to train on from."""
    files = () if source is None or not source.is_dir() else source.iterdir()
    return any(f.suffix in (".safetensors", ".bin") for f in files)


def pick_tokenizer(
    source: Path | None, vocab: str, documents: list[str]
) -> PreTrainedTokenizerBase:
    """Take the model directory's tokenizer, if it has one; else bytes, or learned byte pairs."""
    if source is not None and (source / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(source, local_files_only=True)
    if vocab == "bytes":
        return byte_tokenizer()
    if not vocab.isdecimal() or int(vocab) <= 257:
        raise BadInput(f"train: `--vocab` must be `bytes` or a number above 257; got {vocab!r}.")
    return byte_pair_tokenizer(documents, int(vocab))


def pick_config(
    source: Path | None, tokenizer: PreTrainedTokenizerBase, seq: int, large: bool
) -> PretrainedConfig:
    """Read the config at `source`, or make the built-in Llama's; check that the text fits it."""
    if source is None:
        return LlamaConfig(
            **(LARGE if large else SMALL),
            vocab_size=len(tokenizer),
            max_position_embeddings=seq,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    config = read_config(source)
    sizes = config.get_text_config()
    if sizes.vocab_size < len(tokenizer):
        raise BadInput(
            f"train: the config's `vocab_size` must be at least the tokenizer's {len(tokenizer)};"
            f" got {sizes.vocab_size}."
        )
    longest = getattr(sizes, "max_position_embeddings", None)
    if longest is not None and longest < seq:
        raise BadInput(
            f"train: `--seq` must be at most the config's {longest} positions; got {seq}."
        )
    return config


def read_config(source: Path) -> PretrainedConfig:
    file = source / "config.json" if source.is_dir() else source
    if not file.is_file():
        raise BadInput(
            f"train: `--config` must be a config.json or a directory with one; got {source}."
        )
    try:
        kind = json.loads(file.read_text()).get("model_type")
    except (ValueError, AttributeError) as reason:
        raise BadInput(
            f"train: `--config` must hold a JSON object; got {file}: {reason}."
        ) from None
    try:
        config = AutoConfig.from_pretrained(file, local_files_only=True)
    except (ValueError, OSError):
        raise BadInput(
            f"train: the config's `model_type` must be one that transformers knows; got {kind!r}."
        ) from None
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise BadInput(f"train: the config must be a causal language model's; got {kind!r}.")
    return config


def make_model(
    config: PretrainedConfig,
    source: Path | None,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """Make the same model at every call: the directory's weights, or random ones from the seed."""
    torch.manual_seed(seed)
    if source is not None and has_weights(source):
        model = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, local_files_only=True
        )
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return placed(model, device).train()


def placed(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    # transformers wraps `to` without passing its types on.
    return model.to(device)  # type: ignore[arg-type]
