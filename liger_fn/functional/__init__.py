"""The door: every public op.

Sizes: B batch, T tokens, N rows, D features, F MLP width, V vocabulary, H heads (or hidden size beside V),
K key-value heads, C head width (or rows per chunk beside V), R rotated features.
"""

from liger_fn.functional.core.backend import using
from liger_fn.functional.norm.rms_norm import rms_norm

__all__ = ["rms_norm", "using"]
