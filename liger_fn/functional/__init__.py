"""The door: every public op.

Sizes: B batch, T tokens, N rows, D features, F MLP width, V vocabulary, H heads (or hidden size
beside V), K key-value heads, C head width (or rows per chunk beside V), R rotated features, E
experts (K of them a token's), L blocks.

Losses of log-probabilities (DPO, KTO, GRPO and their kin) are in `liger_fn.functional.preference`.
"""

from liger_fn.functional import preference
from liger_fn.functional.activation.gated_activation import gated_activation
from liger_fn.functional.activation.geglu import geglu
from liger_fn.functional.activation.relu_squared import relu_squared
from liger_fn.functional.activation.softmax import softmax
from liger_fn.functional.activation.sparsemax import sparsemax
from liger_fn.functional.activation.swiglu import swiglu
from liger_fn.functional.attention.multi_token_attention import multi_token_attention
from liger_fn.functional.attention.neighborhood_attention import neighborhood_attention
from liger_fn.functional.core.backend import using
from liger_fn.functional.embedding.embedding import embedding
from liger_fn.functional.linear_loss.cosine import fused_linear_cosine
from liger_fn.functional.linear_loss.cross_entropy import fused_linear_cross_entropy
from liger_fn.functional.linear_loss.cross_entropy_accumulate import (
    fused_linear_cross_entropy_accumulate,
)
from liger_fn.functional.linear_loss.jsd import fused_linear_jsd
from liger_fn.functional.linear_loss.kl_div import fused_linear_kl_div
from liger_fn.functional.linear_loss.logprobs import fused_linear_logprobs
from liger_fn.functional.linear_loss.selected_logprobs import fused_linear_selected_logprobs
from liger_fn.functional.linear_loss.tvd import fused_linear_tvd
from liger_fn.functional.loss.cross_entropy import cross_entropy
from liger_fn.functional.loss.jsd import jsd
from liger_fn.functional.loss.kl_div import kl_div
from liger_fn.functional.loss.logprobs import logprobs
from liger_fn.functional.loss.soft_target_cross_entropy import soft_target_cross_entropy
from liger_fn.functional.loss.tvd import tvd
from liger_fn.functional.loss.vocab_parallel import (
    fused_linear_vocab_parallel_cross_entropy,
    vocab_parallel_cross_entropy,
)
from liger_fn.functional.mlp.fused_mlp import fused_mlp
from liger_fn.functional.mlp.gated_linear import gated_linear
from liger_fn.functional.mlp.moe import fused_moe
from liger_fn.functional.mlp.tiled import tiled_mlp
from liger_fn.functional.norm.dyt import dyt
from liger_fn.functional.norm.fused_add_rms_norm import fused_add_rms_norm
from liger_fn.functional.norm.gated_rms_norm import gated_rms_norm
from liger_fn.functional.norm.group_norm import group_norm
from liger_fn.functional.norm.layer_norm import layer_norm
from liger_fn.functional.norm.modulated_layer_norm import modulated_layer_norm
from liger_fn.functional.norm.modulated_rms_norm import modulated_rms_norm
from liger_fn.functional.norm.poly_norm import poly_norm
from liger_fn.functional.norm.rms_norm import rms_norm
from liger_fn.functional.position.rope import rope
from liger_fn.functional.residual.attention_residual import attention_residual
from liger_fn.functional.residual.mhc_post import mhc_post
from liger_fn.functional.residual.mhc_pre import mhc_pre

__all__ = [
    "attention_residual",
    "cross_entropy",
    "dyt",
    "embedding",
    "fused_add_rms_norm",
    "fused_linear_cosine",
    "fused_linear_cross_entropy",
    "fused_linear_cross_entropy_accumulate",
    "fused_linear_jsd",
    "fused_linear_kl_div",
    "fused_linear_logprobs",
    "fused_linear_selected_logprobs",
    "fused_linear_tvd",
    "fused_linear_vocab_parallel_cross_entropy",
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
    "preference",
    "relu_squared",
    "rms_norm",
    "rope",
    "soft_target_cross_entropy",
    "softmax",
    "sparsemax",
    "swiglu",
    "tiled_mlp",
    "tvd",
    "using",
    "vocab_parallel_cross_entropy",
]
