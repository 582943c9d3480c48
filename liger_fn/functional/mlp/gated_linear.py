"""A gated unit and the linear layer after it, without keeping what is between them.

    a = unit(gate, up)                   y = a · weightᵀ + bias

    da      = dy · weight                dgate, dup = unit′(gate, up) · da
    dweight = dyᵀ · a                    dbias      = Σ_rows dy

Products are PyTorch's, the unit's kernels those of activation/glu.py. As two ops, gate, up and `a`
would be kept: F numbers a token more. Here the backward pass of the unit, which has everything in
registers, writes `a` once more: 12 bytes per element of a 2-byte `a` in place of 10.
"""

import math

from torch import Tensor
from torch.nn import functional

from liger_fn.functional.activation import gated_activation
from liger_fn.functional.activation.gated_activation import check_unit, unit_of
from liger_fn.functional.activation.glu import Gating, check_glu, glu_bwd_again, glu_fwd
from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.launch import accumulator


def reference(
    gate: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
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
    a = gated_activation.reference(
        gate, up, activation=activation, alpha=alpha, gate_scale=gate_scale, scale=scale,
        up_offset=up_offset, limit=limit, limit_activated=limit_activated, interleaved=interleaved,
    )  # fmt: skip
    return functional.linear(a, weight, bias)


def gated_linear_fwd(
    gate: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
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
    (a,) = glu_fwd(gate, up, unit)
    # As rows: of more dimensions and a bias F.linear makes two launches.
    (D, F), tokens = weight.shape, gate.shape[:-1]
    return (functional.linear(a.view(math.prod(tokens), F), weight, bias).view(*tokens, D),)


def unit_and_layer_bwd(
    gate: Tensor,
    up: Tensor | None,
    a: Tensor | None,
    weight: Tensor,
    dy: Tensor,
    unit: Gating,
    need_dgate: bool,
    need_dup: bool,
    need_dweight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Give dgate, dup and dweight, each if it is needed; dy is (N, D).

    Without `a`, what is between the two, the kernel of the unit's gradient makes it again.
    """
    F = weight.shape[1]
    dgate, dup, again = None, None, need_dweight and a is None
    if need_dgate or need_dup:
        da = dy.mm(weight).view(*gate.shape[:-1], F)
        dgate, dup, made = glu_bwd_again(gate, up, da, unit, need_dgate, need_dup, again)
        a = made if again else a
    elif again:
        (a,) = glu_fwd(gate, up, unit)
    dweight = dy.t().mm(a.reshape(dy.shape[0], F)) if need_dweight and a is not None else None
    return dgate, dup, dweight


def sum_of_rows(rows: Tensor) -> Tensor:
    """The gradient of a bias."""
    return rows.sum(0, dtype=accumulator(rows.dtype)).to(rows.dtype)


def gated_linear_bwd(
    gate: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
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
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    unit = unit_of(
        activation, alpha, gate_scale, scale, up_offset, limit, limit_activated, interleaved
    )
    dy = dy.reshape(math.prod(gate.shape[:-1]), weight.shape[0])
    gradients = unit_and_layer_bwd(
        gate, up, None, weight, dy, unit, need_dgate, need_dup, need_dweight
    )
    return *gradients, sum_of_rows(dy) if need_dbias else None


_gated_linear = custom_vjp(
    "gated_linear",
    reference=reference,
    fwd=gated_linear_fwd,
    bwd=gated_linear_bwd,
    results="y",
    grads="gate up weight bias",
    rows="gate up y",
    autocast="gate up weight bias",
)


def gated_linear(
    gate: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
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
    """Apply a gated unit and the linear layer after it, keeping only gate and up.

        y = unit(gate, up) · weightᵀ + bias

    Where gate and up come of layers with adapters, quantised weights or hooks of their own, this is
    the part of an MLP that can still be one op; `fused_mlp` is all of it.

    Args:
        gate: (..., F), floating point, any strides; with up=None (..., 2F), both in one tensor.
        up: like gate, or None.
        weight: (D, F), the dtype of gate (under autocast cast as F.linear's), any strides.
        bias: (D,), the dtype of gate; None: no bias.
        activation, alpha, gate_scale, scale, up_offset, limit, limit_activated, interleaved: the
            unit, and how gate and up lie in one tensor, as in `gated_activation`.

    Returns:
        (..., D), dtype of gate.

    Raises:
        TypeError: a tensor is not of the dtype that it must be of, an option is no number.
        ValueError: a shape or device does not fit, an option is out of its range.

    Precision: the unit is computed in float32 and rounded to the dtype of gate, which the product
        reads; sums, that of the gradient of bias too, are float32 (float64 for float64).
    Memory: gate, up and weight live until the backward pass; the unit's result does not.
    Source: Shazeer, "GLU Variants Improve Transformer", 2020; on making activations again: Chen et
        al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    """
    op = "gated_linear"
    check_glu(op, gate, up)
    F = gate.shape[-1] if up is not None else gate.shape[-1] // 2
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None:
            check.floating(op, name, p)
            check.dtype_inside(op, name, p, gate, "gate")
            check.device(op, name, p, gate, "gate")
    if weight.dim() != 2 or weight.shape[1] != F or F == 0:
        contract = f"have shape (D, {F}), (D, F) with the width of the unit, at least 1"
        check.fail(op, "weight", contract, check.spell(weight.shape))
    if bias is not None:
        check.shape(op, "bias", bias, weight.shape[:1], "(D,)")
    if interleaved and up is not None:
        check.fail(op, "interleaved", "be False unless `up` is None", interleaved)
    check_unit(op, activation, alpha, gate_scale, scale, up_offset, limit)
    return _gated_linear(
        gate, up, weight, bias, activation, float(alpha), float(gate_scale), float(scale),
        float(up_offset), limit, bool(limit_activated), bool(interleaved),
    )  # fmt: skip
