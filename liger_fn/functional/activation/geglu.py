"""GeGLU: the GELU of a gate, times a second input. Formulas, kernels and traffic: glu.py.

    y     = gelu(gate) · up               gelu(x) = x · Φ(x)
    dgate = dy · up · gelu′(gate)         gelu′(x) = Φ(x) + x · Φ′(x)
    dup   = dy · gelu(gate)

with the normal distribution's Φ(x) = (1 + erf(x/√2)) / 2, or its approximation by tanh. Memory
traffic in bytes per element of a 2-byte y: 6 forward, 10 backward; gate and up are kept.
"""

import torch
from torch import Tensor

from liger_fn.functional.activation.glu import Gating, check_glu, glu_bwd, glu_fwd, halves
from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp

_UNITS = {"tanh": Gating("gelu_tanh"), "none": Gating("gelu_erf")}


def reference(gate: Tensor, up: Tensor | None = None, *, approximate: str = "tanh") -> Tensor:
    g, u = halves(gate, up)
    return (torch.nn.functional.gelu(g, approximate=approximate) * u).to(gate.dtype)


def geglu_fwd(gate: Tensor, up: Tensor | None, approximate: str) -> tuple[Tensor]:
    return glu_fwd(gate, up, _UNITS[approximate])


def geglu_bwd(
    gate: Tensor,
    up: Tensor | None,
    dy: Tensor,
    approximate: str,
    need_dgate: bool,
    need_dup: bool,
) -> tuple[Tensor | None, Tensor | None]:
    return glu_bwd(gate, up, dy, _UNITS[approximate], need_dgate, need_dup)


_geglu = custom_vjp(
    "geglu",
    reference=reference,
    fwd=geglu_fwd,
    bwd=geglu_bwd,
    results="y",
    grads="gate up",
    rows="gate up y",
)


def geglu(gate: Tensor, up: Tensor | None = None, *, approximate: str = "tanh") -> Tensor:
    """Multiply the GELU of a gate with a second input, as the MLPs of Gemma and T5 do.

        y = gelu(gate) · up        gelu(x) = x · Φ(x)

    Args:
        gate: (..., F), floating point, any strides. Without `up`, both in one tensor (..., 2F),
            gate first: it is read in place, and its gradient is one tensor too.
        up: (..., F), shape and dtype of gate, any strides; None: gate is packed.
        approximate: "tanh": Φ(x) ≈ (1 + tanh(√(2/π) · (x + 0.044715 · x³))) / 2; "none": the exact
            Φ(x) = (1 + erf(x/√2)) / 2, which is the default of torch.nn.functional.gelu.

    Returns:
        (..., F), dtype of gate, contiguous.

    Raises:
        TypeError: gate or up is not a floating-point tensor, or their dtypes differ.
        ValueError: up does not have the shape of gate, or lies on another device; without `up`, the
            last size of gate is odd; approximate is neither "tanh" nor "none".

    Precision: computed in float32 (float64 for float64 inputs); every output is rounded once.
    Memory: gate and up live until the backward pass, nothing else.
    Source: Shazeer, "GLU Variants Improve Transformer", 2020; Hendrycks and Gimpel, "Gaussian Error
        Linear Units", 2016.
    """
    check_glu("geglu", gate, up)
    check.one_of("geglu", "approximate", approximate, ("tanh", "none"))
    return _geglu(gate, up, approximate)
