"""SwiGLU: the SiLU of a gate, times a second input. Formulas, kernels and traffic: glu.py.

    y     = silu(gate) · up               silu(x) = x · σ(x)
    dgate = dy · up · silu′(gate)         silu′(x) = σ(x) · (1 + x · (1 − σ(x)))
    dup   = dy · silu(gate)

Memory traffic in bytes per element of a 2-byte y: 6 forward, 10 backward; gate and up are kept.
"""

import torch
from torch import Tensor

from liger_fn.functional.activation.glu import Gating, check_glu, glu_bwd, glu_fwd, halves
from liger_fn.functional.core.custom_vjp import custom_vjp

_SILU = Gating("silu")


def reference(gate: Tensor, up: Tensor | None = None) -> Tensor:
    g, u = halves(gate, up)
    return (torch.nn.functional.silu(g) * u).to(gate.dtype)


def swiglu_fwd(gate: Tensor, up: Tensor | None) -> tuple[Tensor]:
    return glu_fwd(gate, up, _SILU)


def swiglu_bwd(
    gate: Tensor, up: Tensor | None, dy: Tensor, need_dgate: bool, need_dup: bool
) -> tuple[Tensor | None, Tensor | None]:
    return glu_bwd(gate, up, dy, _SILU, need_dgate, need_dup)


_swiglu = custom_vjp(
    "swiglu",
    reference=reference,
    fwd=swiglu_fwd,
    bwd=swiglu_bwd,
    results="y",
    grads="gate up",
    rows="gate up y",
)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Multiply the SiLU of a gate with a second input, as the MLPs of Llama, Qwen and Mistral do.

        y = silu(gate) · up        silu(x) = x · σ(x)

    Args:
        gate: (..., F), floating point, any strides. Without `up`, both in one tensor (..., 2F),
            gate first: it is read in place, and its gradient is one tensor too.
        up: (..., F), shape and dtype of gate, any strides; None: gate is packed.

    Returns:
        (..., F), dtype of gate, contiguous.

    Raises:
        TypeError: gate or up is not a floating-point tensor, or their dtypes differ.
        ValueError: up does not have the shape of gate, or lies on another device; or, without `up`,
            the last size of gate is odd.

    Precision: computed in float32 (float64 for float64 inputs); every output is rounded once.
    Memory: gate and up live until the backward pass, nothing else.
    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    check_glu("swiglu", gate, up)
    return _swiglu(gate, up)
