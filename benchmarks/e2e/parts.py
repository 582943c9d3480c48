"""What a kernel is for, told by its name; on a CPU, where there are none, by an operator's.

A kernel of PyTorch's own says what it computes and not for whom: what a decoder has in one place
only, such as the square root of a norm, counts there; a product or a sum of elements, which it has
in many, under its own name. What Inductor has fused serves several of these at once.
"""

import re

INDUCTOR = "compiled by Inductor"
OTHER = "other"

# As they are shown. Experts are apart: their kernels hold products and gated units in one.
PARTS = (
    "matrix products",
    "attention",
    "experts",
    "gated unit",
    "norms",
    "rope",
    "loss",
    "embedding",
    "additions",
    "other elementwise",
    INDUCTOR,
    "optimizer",
    "copies and memsets",
    OTHER,
)

# The first that is found in a name decides: what may stand in the names of other parts comes late.
_PATTERNS = {
    INDUCTOR: r"^triton_[a-z]+_fused",
    "optimizer": r"multi_tensor_apply|^aten::_(fused_adamw|foreach)",
    "attention": r"sdpa|flash|fmha|attention|compute_dot_do_o|convert_dq_to_16bits|scaled_dot",
    "experts": r"_moe_|^_token_gather|^_fused_(up|down)_proj",
    "loss": r"cross_entropy|nll_loss|log_?softmax|SoftMax(For|Back)ward|^_logprobs"
    r"|^_times_scalar|^element_mul",
    "gated unit": r"_glu_|swiglu|geglu|gated_activation|silu|[gG]elu",
    "norms": r"norm(?!al)|LayerNorm|RowwiseMoments|GammaBeta|^_add_parts|^_modulated|^_dyt"
    r"|MeanOps|rsqrt|pow_tensor|^aten::(pow|mean)$",
    "rope": r"(?<!p)rope|rotary|CatArray|neg_kernel|(cos|sin)_kernel|^aten::(cat|neg|cos|sin)$",
    "embedding": r"[eE]mbedding|indexSelect|compute_grad_weight|sum_and_scatter|krn_partial",
    "matrix products": r"nvjet|gemm|Gemm|cutlass|xmma|gemv|split[kK]"
    r"|^aten::(_grouped_mm|(add|b|badd)?mm|addmv|dot)$",
    "additions": r"CUDAFunctor_add|^aten::add_?$|AccumulateGrad$",
    "copies and memsets": r"^Mem(set|cpy)|copy_kernel|copy_device|FillFunctor"
    r"|^aten::(copy_|fill_|zero_|clone|_to_copy)$",
    "other elementwise": r"elementwise_kernel|reduce_kernel|^aten::(mul|div|sub|sum|exp|where)_?$",
}
_COMPILED = {part: re.compile(pattern) for part, pattern in _PATTERNS.items()}

# Stretches of time that somebody has named, and waiting: they hold kernels, and are none.
_NO_KERNEL = re.compile(r"^(ProfilerStep|Optimizer\.|Context Sync)")


def part_of(name: str) -> str:
    """Say what a kernel or operator of this name is for."""
    found = (part for part, pattern in _COMPILED.items() if pattern.search(name))
    return next(found, OTHER)


def is_kernel(name: str) -> bool:
    """Say whether this is one; a profiler lists annotations among them."""
    return _NO_KERNEL.match(name) is None
