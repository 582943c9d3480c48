"""Tiny random models for nearly every architecture that transformers knows.

    tiny_config("llama")      a LlamaConfig with sizes for about 50,000 parameters
    tiny_model("llama")       a LlamaForCausalLM with random float32 weights, in eval mode
    tiny_inputs(model)        input_ids, attention_mask, labels
    loss_and_gradients(model, inputs)
    model_types(task)         every model type of a task: "causal-lm", or "image-text-to-text" (the
                              inputs are then text only)

Nothing is downloaded. The default configuration of a type is read, its sizes are shrunk by the name
of the field, lists with an entry per layer are cut to one layer of each kind, token ids are moved
into the small vocabulary, and the exceptions of single types come last. All weights are drawn
anew, those of norms and the biases too, so that a wrong convention or a dropped bias shows.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import math
import os
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 128
HIDDEN = 64
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 16
MAX_LAYERS = 4
TOKENS = 16
BATCH = 2

MAPPINGS = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}


def model_types(task: str = "causal-lm") -> list[str]:
    """List the model types of a task."""
    return sorted(getattr(modeling_auto, MAPPINGS[task]))


def model_class(model_type: str, task: str = "causal-lm") -> Any:
    """Return the class that a task maps a model type to."""
    name = getattr(modeling_auto, MAPPINGS[task])[model_type]
    return getattr(transformers, name[0] if isinstance(name, tuple | list) else name)


LAYER_FIELDS = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "layers",
    "num_decoder_layers",
    "encoder_layers",
    "num_encoder_layers",
    "depth",
    "num_layers_per_stack",
    "resampler_depth",
    "num_blocks",
]

# The largest value of an integer field, by its name.
SIZE_NAMES = [
    (VOCAB, """
        vocab_size unpadded_vocab_size vocab_size_per_layer_input text_vocab_size
        audio_vocab_size codebook_size num_embeddings pronunciation_vocab_size
        shape_vocab_size encoder_hash_byte_group_vocab n_tokens
    """),
    (HIDDEN, """
        hidden_size d_model n_embd emb_dim embed_dim embedding_dim embedding_size
        word_embed_proj_dim encoder_hidden_size backbone_hidden_size text_hidden_size
        hidden_size_global attention_hidden_size lru_width projection_dim out_hidden_size
        projector_hidden_size output_dim input_size pronunciation_embed_dim
        shape_embed_dim input_embedding_size output_embedding_size decoder_hidden_size
        cross_attention_hidden_size hidden_size_per_layer_input vision_output_dim
        ple_embed_dim image_text_hidden_size pooler_output_size dim
        patch_embed_hidden_size width projection_hidden_size vision_hidden_size
        adapter_out_dim adapter_in_dim bottleneck_dim
    """),
    (HEADS, """
        num_attention_heads n_head n_heads num_heads decoder_attention_heads
        encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads
        attention_heads swa_num_attention_heads num_sliding_attention_heads
        conf_num_attention_heads resampler_heads resampler_n_heads index_n_heads
        indexer_n_heads mamba_num_heads mamba_n_heads linear_num_heads
        linear_num_key_heads linear_num_value_heads swa_attention_heads
    """),
    (KV_HEADS, """
        num_key_value_heads swa_num_key_value_heads num_kv_heads
        num_global_key_value_heads num_key_value_heads_resampler num_attention_groups
        indexer_kv_heads n_mamba_heads num_sliding_key_value_heads
    """),
    (HEAD_DIM, """
        head_dim d_kv d_head dim_head swa_head_dim global_head_dim attention_head_size
        linear_key_head_dim linear_value_head_dim linear_head_dim resampler_head_dim
        resampler_dim_head index_head_dim indexer_head_dim kv_channels mamba_head_dim
        mamba_d_head v_head_dim qk_nope_head_dim attention_head_dim swa_v_head_dim
        mamba_headdim
    """),
    (8, """
        qk_rope_head_dim state_size mamba_d_state ssm_state_size time_step_rank
        mamba_dt_rank chunk_size mamba_chunk_size prompt_length d_rel index_topk
        index_block_size attention_window_size sliding_window sliding_window_size
        keep_window_size local_attention attention_chunk_size window_size num_query_tokens
        latent_query_num resampler_n_latents resampler_num_latents rel_extent
        num_centroids centroid_intermediate_top_k local_attention_window_len
    """),
    (96, """
        intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff d_inner n_inner dff
        dim_ff ffn_hidden_size mlp_dim intermediate_size_mlp dense_intermediate_size
        feed_forward_size projection_intermediate_size alignment_intermediate_size
        prefix_dense_intermediate_size prompt_mid_dim projector_intermediate_size
    """),
    (32, """
        moe_intermediate_size shared_expert_intermediate_size
        moe_shared_expert_intermediate_size shared_intermediate_size
        shared_experts_intermediate_size share_expert_dim expert_ffn_hidden_size
        kv_lora_rank q_lora_rank o_lora_rank router_hidden_size moe_hidden_size
        moe_latent_size laurel_rank hc_lowrank adapter_rank gated_norm_rank
        moe_ffn_hidden_size expert_hidden_size
    """),
    (4, """
        num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num
        num_routed_experts
    """),
    (2, """
        num_experts_per_tok moe_topk moe_k top_k_experts num_experts_per_token moe_top_k
        num_experts_per_topk index_topk_blocks split_ngram_parts index_topk_freq
        mamba_n_groups n_groups mamba_ngroups num_codebooks
    """),
    (1, """
        n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts
        num_mtp_layers num_nextn_predict_layers
    """),
    (128, """
        max_position_embeddings n_positions n_ctx max_seq_len context_length
        original_max_position_embeddings max_source_positions max_target_positions
        max_position position_embedding_size
    """),
    (1000, """
        ngram_vocab_size_base
    """),
]  # fmt: skip
SIZES = {name: size for size, names in SIZE_NAMES for name in names.split()}

# Sizes that some text configurations leave at None although the modelling code needs a number.
FILL_NONE = {
    "head_dim": HEAD_DIM,
    "num_key_value_heads": HEADS,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}

# Parts of a composite configuration that are not the language model.
NON_TEXT = [
    "vision",
    "audio",
    "vq",
    "qformer",
    "perceiver",
    "sam",
    "encoder_config",
    "protein",
    "depth",
    "codec",
]
VISION_SIZES = {"num_hidden_layers": 2, "depth": 2, "image_size": 56}
ONE_LAYER = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
TOKEN_NAMES = [
    "im_start_id",
    "im_end_id",
    "im_newline_id",
    "image_patch_id",
    "eod_token_id",
    "sep_token_id",
]


def _mrope(*section):
    """Give a text configuration an mrope section; otherwise the modelling code has a large one."""

    def fix(default, values):
        rope = values.get("rope_parameters") or default.rope_parameters
        rope = dict(rope or {"rope_type": "default", "rope_theta": 1e4})
        rope["mrope_section"] = list(section)
        return {**values, "rope_parameters": rope}

    return fix


# By the `model_type` of a configuration class, also of a part: values, or a function of the default
# configuration and the shrunk values.
EXCEPTIONS: dict[str, Any] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": lambda d, kw: {
        **kw,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "ffn_hidden_size": 96,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": HIDDEN,
            "ffn_act_fn": {"name": "silu"},
        },
    },
    "dory": {
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
        "num_hidden_layers": 6,
        "layer_types": [
            "sliding_attention",
            "mlp",
            "full_attention",
            "mlp",
            "full_attention",
            "mlp",
        ],
    },
    "dots3_note_audio_encoder": {"adapter_input_size": HIDDEN},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "hrm_text": {
        "num_hidden_layers": 2,
        "num_layers_per_stack": None,
        "H_cycles": 1,
        "L_cycles": 2,
        "L_bp_cycles": [1],
        "embedding_scale": 2.0,
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
    },
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"],
        "num_hidden_layers": 2,
        "num_dense_layers": 1,
    },
    "longcat_flash": {"head_dim": 8, "num_key_value_heads": HEADS},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_shape": (4, 4),
        "axial_pos_embds_dim": (32, 32),
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 2,
        "hash_seed": 0,
        "max_position_embeddings": 16,
        "attn_layers": ("local", "lsh"),
        "is_decoder": True,
    },
    "zamba": {
        "num_hidden_layers": 4,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    **{
        n: _mrope(2, 3, 3)
        for n in (
            "qwen2_vl_text",
            "qwen2_5_vl_text",
            "paddleocr_vl_text",
            "qwen2_5_omni_text",
            "qwen3_omni_moe_text",
            "qwen3_vl_text",
            "qwen3_vl_moe_text",
            "cosmos3_edge_text",
        )
    },
    **{n: _mrope(2, 2, 4) for n in ("glm4v_text", "glm_ocr_text")},
    "glm4v_moe_text": _mrope(1, 1, 2),
    "ernie4_5_vl_moe_text": _mrope(3, 3, 2),
    "hunyuan_vl_text": _mrope(2, 2, 2, 2),
    "hunyuan_vl_vision": {"max_image_size": 64, "image_size": 64},
    "mistral4": lambda d, kw: {
        **kw,
        "rope_parameters": {
            **d.rope_parameters,
            "partial_rotary_factor": 8 / 24,
            "original_max_position_embeddings": 64,
        },
    },
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "chameleon": {
        "vocabulary_map": {
            "<image>": VOCAB - 3,
            **{f"IMGIMG{c}Z": VOCAB - 20 + i for i, c in enumerate("ABCD")},
        }
    },
    "emu3": {
        "vocabulary_map": {
            "<image>": VOCAB - 3,
            "<|extra_200|>": VOCAB - 4,
            **{f"<|visual token 00000{i}|>": VOCAB - 20 + i for i in range(4)},
        }
    },
    "deepseek_ocr2_text": {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"]},
    "glm5_next_text": {"index_kpool": 4},
    "granite4_vision": {"deepstack_layer_map": [[0, 0], [1, 1]], "downsample_rate": "1/2"},
    "step3p5": {"sliding_window": 8},
    "udop": {"decoder_start_token_id": 0},
    "qwen2_5_omni_thinker": {"vision_start_token_id": VOCAB - 20},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": VOCAB - 20},
    "radio": {"video_temporal_patch_size": 2},
    "dots3_note_text": {
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_qk_rope_head_dim": 8,
        "swa_v_head_dim": 16,
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "sliding_window": 8,
    },
    **{
        n: {
            "base_channels": 32,
            "channel_multiplier": (1, 2),
            "num_res_blocks": 1,
            "latent_channels": 32,
            "embed_dim": 32,
            "num_embeddings": 64,
            "codebook_size": 64,
        }
        for n in ("chameleon_vqgan", "emu3_vqgan", "janus_vqgan")
    },
    "florence_vision": {
        "depths": (1, 1, 1, 1),
        "embed_dim": (16, 32, 64, 64),
        "num_heads": (1, 2, 4, 4),
        "num_groups": (1, 2, 4, 4),
    },
    "llama4_vision_model": {
        "projector_input_dim": 64,
        "projector_output_dim": 64,
        "vision_output_dim": 64,
    },
    "gemma3n_text": lambda d, kw: {**kw, "intermediate_size": 96, "num_kv_shared_layers": 0},
    "xlstm": {"chunk_size": 16, "embedding_dim": HIDDEN, "mode": "train", "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
}


def tiny_config(model_type: str, **overrides: Any) -> transformers.PreTrainedConfig:
    """Shrink the default configuration of a model type; `overrides` go to its class last."""
    return _build(CONFIG_MAPPING[model_type], extra=overrides)


def _build(cls, default=None, role="text", extra=None):
    default = _silently(cls) if default is None else default
    shrink = _Shrink(cls, default, any(word in role for word in NON_TEXT))
    return _silently(cls, **{**shrink.values(), **(extra or {})})


def _silently(make, *args, **kwargs):
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
        return make(*args, **kwargs)


class _Shrink:
    """The arguments with which a configuration class makes a small configuration."""

    def __init__(self, cls, default, non_text):
        self.cls, self.default, self.non_text = cls, default, non_text
        self.names = _fields(cls)
        self.aliases = getattr(cls, "attribute_map", None) or {}
        self.kw: dict[str, Any] = {}

    def values(self) -> dict[str, Any]:
        self.layers()
        self.sizes()
        self.heads()
        self.rope()
        self.tokens()
        if self.non_text:
            self.vision()
        self.parts()
        self.dropout()
        exception = EXCEPTIONS.get(getattr(self.cls, "model_type", ""), {})
        return exception(self.default, self.kw) if callable(exception) else {**self.kw, **exception}

    def get(self, name):
        name = self.aliases.get(name, name)
        with contextlib.suppress(Exception):
            # Some properties refuse to be read although the value is there.
            return (
                vars(self.default)[name]
                if name in vars(self.default)
                else getattr(self.default, name)
            )
        return None

    def positive(self, *names):
        """Those of the names that are fields with a positive integer."""
        values = ((name, self.get(name)) for name in names if name in self.names)
        return [n for n, v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0]

    def layers(self):
        fields = self.positive(*LAYER_FIELDS)
        if not fields:
            return
        total = self.get(fields[0])
        keep = _layers_to_keep(vars(self.default), total)
        self.kw.update({name: min(self.get(name), 2) for name in fields})
        self.kw[fields[0]] = min(total, len(keep))
        for name in self.names:
            value = self.get(name)
            if _per_layer(value, total) and name not in self.aliases:
                self.kw[name] = type(value)(value[i] for i in keep)
        self.kw.update(dict.fromkeys(self.positive(*ONE_LAYER), 1))
        self.kw.update(dict.fromkeys(self.positive("num_kv_shared_layers"), 0))

    def sizes(self):
        for name in self.names:
            if self.get(name) is None and not self.non_text and name in FILL_NONE:
                self.kw[name] = FILL_NONE[name]
        for name in self.positive(*self.names):
            if name not in self.kw and name in SIZES:
                self.kw[name] = min(self.get(name), SIZES[name])

    def heads(self):
        """Keep one key-value head per head, and one for all, as they are."""
        for heads, kv in (
            ("num_attention_heads", "num_key_value_heads"),
            ("num_attention_heads", "num_kv_heads"),
            ("swa_num_attention_heads", "swa_num_key_value_heads"),
        ):
            if len(self.positive(heads, kv)) < 2:
                continue
            if self.get(kv) == self.get(heads):
                self.kw[kv] = self.kw.get(heads, self.get(heads))
            elif self.get(kv) == 1:
                self.kw[kv] = 1

    def rope(self):
        heads = max(1, self.kw.get("num_attention_heads", HEADS))
        head = self.kw.get("head_dim") or self.kw.get("hidden_size", HIDDEN) // heads
        head = self.kw.get("qk_rope_head_dim", head)
        for name in ("rope_parameters", "rope_scaling"):
            if name in self.names and isinstance(self.get(name), dict):
                self.kw[name] = _shrink_rope(self.get(name), head)
        self.kw.update(dict.fromkeys(self.positive("rotary_dim"), 8))

    def tokens(self):
        """Move token ids into the vocabulary, those of placeholders to its end."""
        taken = 2
        for name in self.names:
            value = self.get(name)
            is_token = name.endswith(("_token_id", "_token_index", "_token_ids"))
            if not (is_token or name in TOKEN_NAMES) or name == "forced_eos_token_id":
                continue
            is_list = isinstance(value, list | tuple)
            if name in SPECIAL_TOKENS:
                outside = isinstance(value, int) and value >= VOCAB
                if outside or (is_list and SPECIAL_TOKENS[name] == 2):
                    self.kw[name] = SPECIAL_TOKENS[name]
            elif isinstance(value, int) and not isinstance(value, bool):
                taken += 1
                self.kw[name] = VOCAB - taken
            elif is_list and value and all(isinstance(x, int) for x in value):
                self.kw[name] = type(value)(VOCAB - taken - 1 - i for i in range(len(value)))
                taken += len(value)

    def vision(self):
        for name in self.positive(*VISION_SIZES):
            self.kw[name] = min(VISION_SIZES[name], self.get(name))
        image, patch = self.get("image_size"), self.get("patch_size")
        if isinstance(image, int) and isinstance(patch, int):
            self.kw["image_size"] = patch * (4 if patch <= 16 else 2)
        for name in ("deepstack_visual_indexes", "fullatt_block_indexes", "global_attn_indexes"):
            if name in self.names and self.get(name) is not None:
                self.kw[name] = type(self.get(name))([0])

    def parts(self):
        tables = (
            getattr(self.cls, name, None) or {} for name in ("sub_configs_defaults", "sub_configs")
        )
        for name in set().union(*tables):
            part = self.get(name)
            if part is not None and not isinstance(part, dict | str):
                self.kw[name] = _build(type(part), part, role=name)

    def dropout(self):
        """Switch dropout and router noise off: tests compare two forwards."""
        for name in self.names:
            value = self.get(name)
            if (
                isinstance(value, float)
                and value > 0
                and ("drop" in name or name.endswith("_pdrop"))
            ):
                self.kw[name] = 0.0
        if "router_jitter_noise" in self.names:
            self.kw["router_jitter_noise"] = 0.0


SPECIAL_TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def _fields(cls) -> list[str]:
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls)]
    return [p for p in inspect.signature(cls.__init__).parameters if p not in ("self", "kwargs")]


def _per_layer(value, layers) -> bool:
    return isinstance(value, list | tuple) and len(value) == layers and layers > 2


def _layers_to_keep(values: dict[str, Any], layers: int) -> list[int]:
    """The first layer of each kind; at least two, at most `MAX_LAYERS`."""
    lists = [value for value in values.values() if _per_layer(value, layers)]
    dense = values.get("first_k_dense_replace") or values.get("num_dense_layers") or 0
    first: dict[tuple, int] = {}
    for i in range(layers):
        words = (value[i] for value in lists if isinstance(value[i], str | bool | None))
        first.setdefault((*map(repr, words), isinstance(dense, int) and i < dense), i)
    keep = list(first.values())
    keep += [i for i in range(layers) if i not in keep][: max(0, 2 - len(keep))]
    return sorted(keep[:MAX_LAYERS])


def _shrink_rope(rope: Any, head: int) -> Any:
    """Keep the type and the factors of rope, and fit its sections to the small head."""
    if not isinstance(rope, dict):
        return rope
    if any(isinstance(value, dict) for value in rope.values()):
        return {name: _shrink_rope(value, head) for name, value in rope.items()}
    rope = copy.deepcopy(rope)
    rotated = int(head * (rope.get("partial_rotary_factor") or 1.0))
    for name in ("mrope_section", "xdrope_section"):
        if rope.get(name):
            rope[name] = _scale_sections(rope[name], rotated // 2)
    if rope.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = 64
    for name in ("short_factor", "long_factor"):
        if rope.get(name):
            rope[name] = rope[name][: rotated // 2]
    return rope


def _scale_sections(sections: list[int], total: int) -> list[int]:
    small = [max(1, int(size * total / sum(sections))) for size in sections]
    small[-1] += total - sum(small)
    return sections if sum(sections) == total else small


def tiny_model(
    model_type: str,
    task: str = "causal-lm",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    config: transformers.PreTrainedConfig | None = None,
    **overrides: Any,
) -> transformers.PreTrainedModel:
    """Make a small model with random weights; `overrides` go to its configuration."""
    config = tiny_config(model_type, **overrides) if config is None else config
    cls = model_class(model_type, task)
    wanted = getattr(cls, "config_class", None)
    if wanted is not None and not isinstance(config, wanted):
        # A composite configuration given to a class for text only, as AutoModel allows.
        parts = [value for value in vars(config).values() if isinstance(value, wanted)]
        config = parts[0] if parts else config
    is_decoder_only = not getattr(config, "is_encoder_decoder", False)
    if task == "causal-lm" and hasattr(config, "is_decoder") and is_decoder_only:
        config.is_decoder = True
    torch.manual_seed(seed)
    model = _silently(cls._from_config, config, dtype=torch.float32)
    randomize(model, seed)
    model.tie_weights()
    return model.to(dtype).train(model_type in TRAIN_MODE)


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw all weights anew, so that every branch matters: no norms of ones, no biases of zeros."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if not p.is_floating_point():
            continue
        if not torch.isfinite(p).all():
            p.zero_()
        noise = torch.randn(p.shape, generator=g, dtype=torch.float32).to(p.dtype)
        name = name.lower()
        if p.dim() <= 1 or "a_log" in name or "conv" in name:
            p.add_(0.1 * noise)
        elif "embed" in name or "wte" in name:
            p.copy_(0.2 * noise)
        else:
            p.copy_(noise * (0.8 / math.sqrt(p.shape[-1])))


def with_every_tail(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Switch on what a model may do to its logits and its loss, so that a lost part shows.

    Auxiliary router losses are added, and scales that are 1 by default are not.
    """
    text = model.config.get_text_config()
    for config in (model.config, text):
        if getattr(config, "output_router_logits", None) is not None and not _has_own_router(model):
            config.output_router_logits = True
        _set_numbers(config, logits_scaling=3.0, **TAILS)
    for part in (model, getattr(model, "model", None)):
        _set_numbers(part, aux_loss_coef=0.5, **TAILS)
    return model


TAILS = {
    "logit_scale": 0.25,
    "lm_head_multiplier": 0.5,
    "router_aux_loss_coef": 0.5,
    "z_loss_coefficient": 0.1,
}


def _set_numbers(owner, **values):
    for name, value in values.items():
        old = getattr(owner, name, None)
        if isinstance(old, int | float) and not isinstance(old, bool):
            # Some are properties without a setter.
            with contextlib.suppress(AttributeError):
                setattr(owner, name, value)


def _has_own_router(model) -> bool:
    """These return no router logits that the common auxiliary loss could read."""
    return model.config.model_type in ("flint", "doge")


def tiny_inputs(
    model: transformers.PreTrainedModel, batch: int = BATCH, tokens: int = TOKENS, seed: int = 0
) -> dict[str, Any]:
    """Make a batch with labels, a few of them ignored."""
    g = torch.Generator().manual_seed(seed + 1)
    text = model.config.get_text_config(decoder=True)
    vocab = min(getattr(text, "vocab_size", VOCAB) or VOCAB, VOCAB)
    # Keep clear of the ids of placeholders.
    top = max(vocab - 24, 8)
    ids = torch.randint(4, top, (batch, tokens), generator=g)
    labels = torch.randint(4, top, (batch, tokens), generator=g)
    labels[:, :3] = -100
    labels[0, tokens // 2] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    fix = INPUTS.get(model.config.model_type) or INPUTS.get(type(model).__name__)
    if fix is not None:
        inputs = fix(model, inputs)
    accepted = inspect.signature(type(model).forward).parameters
    takes_any = any(p.kind == p.VAR_KEYWORD for p in accepted.values())
    return {name: value for name, value in inputs.items() if name in accepted or takes_any}


def loss_and_gradients(
    model: torch.nn.Module, inputs: dict[str, Any], run: Any = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Train one step, from the same random state each time; `run` stands for the model if given."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    loss = (model if run is None else run)(**inputs)[0]
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got: tuple, expected: tuple, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    """Compare what `loss_and_gradients` returned for two models."""
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in got[1].items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=rtol, atol=atol)


def _codebooks(model, inputs):
    k = model.config.num_codebooks
    return {
        "input_ids": inputs["input_ids"].repeat_interleave(k, dim=0),
        "attention_mask": inputs["attention_mask"],
        "labels": inputs["labels"][..., None].repeat(1, 1, k),
    }


def _with_pixels(model, inputs):
    size = model.config.vision_config.image_size
    return {**inputs, "pixel_values": torch.zeros(len(inputs["input_ids"]), 3, size, size)}


def _without_cache(model, inputs):
    return {**inputs, "use_cache": False}


INPUTS = {
    # Its cache wants a number of layers that its configuration does not have.
    "blt": _without_cache,
    # Its layers run twice, and the second time find the keys of the first in the cache.
    "dory": _without_cache,
    # Its state is updated in place.
    "rwkv": _without_cache,
    "MusicgenForCausalLM": _codebooks,
    "MusicgenMelodyForCausalLM": _codebooks,
    "git": _with_pixels,
    "blip": _with_pixels,
}
# Types that cannot be trained on text here, and why.
NOT_TRAINABLE = {
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"), "a draft model without a loss"
    ),
    **dict.fromkeys(
        [
            "blip-2",
            "idefics",
            "instructblip",
            "instructblipvideo",
            "kosmos-2",
            "pix2struct",
            "pp_formulanet",
            "vision-encoder-decoder",
        ],
        "needs images",
    ),
    "udop": "needs boxes",
    "diffusion_gemma": "block diffusion, no language-model loss",
    "pi0": "robot policy, no language-model loss",
    "xlstm": "transformers updates its state in place, which its backward pass refuses on CPU",
}
# Types that refuse to be differentiated in eval mode.
TRAIN_MODE = {"reformer", "xlstm"}
