"""Gated units of any activation, with the bounds, scales and layouts that models add to them.

    g     = min(gate_scale · gate, limit)             u = clamp(up, −limit, limit) + up_offset
    y     = scale · act(g) · u
    dgate = dy · scale · u · act′(g) · gate_scale     (0 where gate is beyond the limit)
    dup   = dy · scale · act(g)                       (0 where up is beyond the limit)

Kernels and traffic: glu.py. Memory traffic in bytes per element of a 2-byte y: 6 forward, 10
backward; gate and up are kept.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_fn.functional.activation.glu import Gating, check_glu, glu_bwd, glu_fwd, halves
from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp

_QUICK_GELU = 1.702

# Transformers' names in ACT2FN. The kernel of each, and the slope of its sigmoid.
_KERNELS: dict[str, tuple[str, float]] = {
    "silu": ("silu", 1.0),
    "swish": ("silu", 1.0),
    "quick_gelu": ("silu", _QUICK_GELU),
    "gelu": ("gelu_erf", 1.0),
    "gelu_python": ("gelu_erf", 1.0),
    "gelu_pytorch_tanh": ("gelu_tanh", 1.0),
    "gelu_python_tanh": ("gelu_tanh", 1.0),
    "gelu_new": ("gelu_tanh", 1.0),
    "gelu_fast": ("gelu_tanh", 1.0),
    "gelu_accurate": ("gelu_tanh", 1.0),
    "relu": ("relu", 1.0),
    "relu2": ("relu_squared", 1.0),
    "sigmoid": ("sigmoid", 1.0),
    "linear": ("linear", 1.0),
}

_MEANINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_erf": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "linear": lambda x: x,
}


def reference(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    activation: str = "silu",
    alpha: float = 1.0,
    gate_scale: float = 1.0,
    scale: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    limit_activated: bool = False,
    interleaved: bool = False,
) -> Tensor:
    g, u = halves(gate, up, interleaved)
    kernel, slope = _KERNELS[activation]
    g = g * gate_scale
    if limit is not None and not limit_activated:
        g = g.clamp(max=limit)
    act = _silu(g, slope * alpha) if kernel == "silu" else _MEANINGS[kernel](g)
    if limit is not None and limit_activated:
        act = act.clamp(max=limit)
    if limit is not None:
        u = u.clamp(-limit, limit)
    return (scale * act * (u + up_offset)).to(gate.dtype)


def _silu(x: Tensor, alpha: float) -> Tensor:
    # PyTorch's own where it has one: models that call it keep their bits.
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


def gated_activation_fwd(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    alpha: float,
    gate_scale: float,
    scale: float,
    up_offset: float,
    limit: float | None,
    limit_activated: bool,
    interleaved: bool,
) -> tuple[Tensor]:
    unit = unit_of(
        activation, alpha, gate_scale, scale, up_offset, limit, limit_activated, interleaved
    )
    return glu_fwd(gate, up, unit)


def gated_activation_bwd(
    gate: Tensor,
    up: Tensor | None,
    dy: Tensor,
    activation: str,
    alpha: float,
    gate_scale: float,
    scale: float,
    up_offset: float,
    limit: float | None,
    limit_activated: bool,
    interleaved: bool,
    need_dgate: bool,
    need_dup: bool,
) -> tuple[Tensor | None, Tensor | None]:
    unit = unit_of(
        activation, alpha, gate_scale, scale, up_offset, limit, limit_activated, interleaved
    )
    return glu_bwd(gate, up, dy, unit, need_dgate, need_dup)


def unit_of(
    activation: str,
    alpha: float,
    gate_scale: float,
    scale: float,
    up_offset: float,
    limit: float | None,
    limit_activated: bool,
    interleaved: bool,
) -> Gating:
    """The unit that the options of the public op mean."""
    kernel, slope = _KERNELS[activation]
    return Gating(
        kernel,
        alpha=slope * alpha,
        gate_scale=gate_scale,
        scale=scale,
        up_offset=up_offset,
        limit=limit,
        limit_activated=limit_activated,
        interleaved=interleaved,
    )


_gated_activation = custom_vjp(
    "gated_activation",
    reference=reference,
    fwd=gated_activation_fwd,
    bwd=gated_activation_bwd,
    results="y",
    grads="gate up",
    rows="gate up y",
)


def check_unit(
    op: str,
    activation: str,
    alpha: float,
    gate_scale: float,
    scale: float,
    up_offset: float,
    limit: float | None,
) -> None:
    """Check which unit is meant."""
    check.one_of(op, "activation", activation, tuple(_KERNELS))
    numbers = {"alpha": alpha, "gate_scale": gate_scale, "scale": scale, "up_offset": up_offset}
    for name, value in numbers.items():
        check.number(op, name, value, "be a number", True)
    if alpha != 1 and _KERNELS[activation][0] != "silu":
        check.fail(op, "alpha", f"be 1 for {activation!r}, which has no such slope", alpha)
    if limit is not None:
        check.number(op, "limit", limit, "be a number, or None", True)
        if limit <= 0:
            check.fail(op, "limit", "be positive, or None", limit)


def gated_activation(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    activation: str = "silu",
    alpha: float = 1.0,
    gate_scale: float = 1.0,
    scale: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    limit_activated: bool = False,
    interleaved: bool = False,
) -> Tensor:
    """Multiply an activated gate with a second input, with the bounds and scales of some models.

        y = scale · act(min(gate_scale · gate, limit)) · (clamp(up, −limit, limit) + up_offset)

    GPT-OSS: `activation="silu", alpha=1.702, limit=7.0, up_offset=1.0, interleaved=True`;
    MiniMax-M3 the same without `interleaved`; DeepSeek-V4: `limit=config.swiglu_limit`; Step-3.7:
    `limit=..., limit_activated=True`; Falcon-H1: `gate_scale=gate_multiplier`.

    Args:
        gate: (..., F), floating point, any strides. Without `up`, both in one tensor (..., 2F): it
            is read in place, and its gradient is one tensor too.
        up: (..., F), shape and dtype of gate, any strides; None: gate is packed.
        activation: a name in transformers' ACT2FN: "silu" or "swish": x · σ(alpha · x);
            "quick_gelu": silu with 1.702 · alpha; "gelu" or "gelu_python": exact;
            "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_new", "gelu_fast" or "gelu_accurate": the
            tanh form; "relu", "relu2" (its square), "sigmoid", "linear".
        alpha: slope of the sigmoid in silu and quick_gelu.
        gate_scale: multiplies the gate before everything else.
        scale: multiplies the result.
        up_offset: added to up after the bound.
        limit: bounds the scaled gate from above and up on both sides; None: no bounds.
        limit_activated: bound act(gate) from above instead of the gate.
        interleaved: a packed gate has gate and up in turns, (gate₀, up₀, gate₁, …), and not in
            halves.

    Returns:
        (..., F), dtype of gate, contiguous.

    Raises:
        TypeError: gate or up is not a floating-point tensor, their dtypes differ, or an option is
            no number.
        ValueError: up does not have the shape of gate, or lies on another device; without `up`, the
            last size of gate is odd; the activation is unknown; alpha is not 1 where there is no
            such slope; limit is not positive; interleaved with `up`.

    Precision: computed in float32 (float64 for float64 inputs); every output is rounded once.
    Memory: gate and up live until the backward pass, nothing else.
    Source: Shazeer, "GLU Variants Improve Transformer", 2020; OpenAI, "gpt-oss-120b & gpt-oss-20b
        Model Card", 2025.
    """
    op = "gated_activation"
    check_glu(op, gate, up)
    check_unit(op, activation, alpha, gate_scale, scale, up_offset, limit)
    if interleaved and up is not None:
        check.fail(op, "interleaved", "be False when `up` is given", interleaved)
    return _gated_activation(
        gate, up, activation, alpha, gate_scale, scale, up_offset, limit, limit_activated,
        interleaved,
    )  # fmt: skip
