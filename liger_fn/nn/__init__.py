"""Modules: parameters and one functional call each.

Parameters, names and state_dict keys are those of torch's or Hugging Face's class of the same
purpose, so a checkpoint of the one loads into the other.
"""

from liger_fn.nn.activation import ReLUSquared, Softmax, Sparsemax
from liger_fn.nn.attention import MultiTokenAttention, NeighborhoodAttention
from liger_fn.nn.divergence import (
    FusedLinearCosineLoss,
    FusedLinearJSDLoss,
    FusedLinearKLDivLoss,
    FusedLinearTVDLoss,
    JSDLoss,
    KLDivLoss,
    SoftTargetCrossEntropyLoss,
    TVDLoss,
)
from liger_fn.nn.dyt import DyT
from liger_fn.nn.embedding import Embedding
from liger_fn.nn.experts import Experts
from liger_fn.nn.gated_norm import GatedRMSNorm
from liger_fn.nn.group_norm import GroupNorm
from liger_fn.nn.loss import CrossEntropyLoss, FusedLinearCrossEntropyLoss
from liger_fn.nn.mlp import FusedMLP, GeGLUMLP, SwiGLUMLP, TiledMLP
from liger_fn.nn.norm import FusedAddRMSNorm, LayerNorm, RMSNorm
from liger_fn.nn.poly_norm import PolyNorm
from liger_fn.nn.position import RotaryEmbedding
from liger_fn.nn.preference import (
    FusedLinearCPOLoss,
    FusedLinearDPOLoss,
    FusedLinearGRPOLoss,
    FusedLinearKTOLoss,
    FusedLinearORPOLoss,
    FusedLinearSimPOLoss,
)
from liger_fn.nn.residual import AttentionResidual, HyperConnected, HyperConnection

__all__ = [
    "AttentionResidual",
    "CrossEntropyLoss",
    "DyT",
    "Embedding",
    "Experts",
    "FusedAddRMSNorm",
    "FusedLinearCPOLoss",
    "FusedLinearCosineLoss",
    "FusedLinearCrossEntropyLoss",
    "FusedLinearDPOLoss",
    "FusedLinearGRPOLoss",
    "FusedLinearJSDLoss",
    "FusedLinearKLDivLoss",
    "FusedLinearKTOLoss",
    "FusedLinearORPOLoss",
    "FusedLinearSimPOLoss",
    "FusedLinearTVDLoss",
    "FusedMLP",
    "GatedRMSNorm",
    "GeGLUMLP",
    "GroupNorm",
    "HyperConnected",
    "HyperConnection",
    "JSDLoss",
    "KLDivLoss",
    "LayerNorm",
    "MultiTokenAttention",
    "NeighborhoodAttention",
    "PolyNorm",
    "RMSNorm",
    "ReLUSquared",
    "RotaryEmbedding",
    "SoftTargetCrossEntropyLoss",
    "Softmax",
    "Sparsemax",
    "SwiGLUMLP",
    "TVDLoss",
    "TiledMLP",
]
