"""A gated MLP as one op: gate and up in one product, the activation where they lie, then down.

    h = x · gate_upᵀ + gate_up_bias      a = unit(h)          y = a · downᵀ + down_bias

    da    = dy · down                    dh       = unit′(h) · da, gate and up in one tensor
    ddown = dyᵀ · a                      dgate_up = dhᵀ · x
    dx    = dh · gate_up                 biases   = Σ_rows dh, Σ_rows dy

Products are PyTorch's, the unit's kernels those of activation/glu.py. Two products forward, four
backward, of 6·N·F·D and 12·N·F·D operations for N tokens. Kept are x, h (2·F numbers a token) and,
without `recompute`, `a` (F more); to make it again takes one write, where dh is computed.
"""

from torch import Tensor
from torch.nn import functional

from liger_fn.functional.activation import gated_activation
from liger_fn.functional.activation.gated_activation import check_unit, unit_of
from liger_fn.functional.activation.glu import glu_fwd
from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.launch import has_work
from liger_fn.functional.mlp.gated_linear import sum_of_rows, unit_and_layer_bwd


def reference(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    alpha: float = 1.0,
    gate_scale: float = 1.0,
    scale: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    limit_activated: bool = False,
    interleaved: bool = False,
    recompute: bool = True,
) -> Tensor:
    h = functional.linear(x, gate_up, gate_up_bias)
    a = gated_activation.reference(
        h, None, activation=activation, alpha=alpha, gate_scale=gate_scale, scale=scale,
        up_offset=up_offset, limit=limit, limit_activated=limit_activated, interleaved=interleaved,
    )  # fmt: skip
    return functional.linear(a, down, down_bias)


def fused_mlp_fwd(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    alpha: float,
    gate_scale: float,
    scale: float,
    up_offset: float,
    limit: float | None,
    limit_activated: bool,
    interleaved: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    (width, D), tokens = gate_up.shape, x.shape[:-1]
    if not has_work(x):
        y, h = x.new_zeros(x.shape), x.new_empty((*tokens, width))
        return y, h, None if recompute else x.new_empty((*tokens, width // 2))

    unit = unit_of(
        activation, alpha, gate_scale, scale, up_offset, limit, limit_activated, interleaved
    )
    h = functional.linear(x.reshape(-1, D), gate_up, gate_up_bias)
    (a,) = glu_fwd(h, None, unit)
    y = functional.linear(a, down, down_bias).view(x.shape)
    return y, h.view(*tokens, width), None if recompute else a.view(*tokens, width // 2)


def fused_mlp_bwd(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    h: Tensor,
    a: Tensor | None,
    dy: Tensor,
    activation: str,
    alpha: float,
    gate_scale: float,
    scale: float,
    up_offset: float,
    limit: float | None,
    limit_activated: bool,
    interleaved: bool,
    recompute: bool,
    need_dx: bool,
    need_dgate_up: bool,
    need_ddown: bool,
    need_dgate_up_bias: bool,
    need_ddown_bias: bool,
) -> tuple[Tensor | None, ...]:
    needs = {
        "x": (x, need_dx), "gate_up": (gate_up, need_dgate_up), "down": (down, need_ddown),
        "gate_up_bias": (gate_up_bias, need_dgate_up_bias),
        "down_bias": (down_bias, need_ddown_bias),
    }  # fmt: skip
    if not has_work(dy):
        # Shapes alone, or nothing that an output depends on.
        return tuple(t.new_zeros(t.shape) if need else None for t, need in needs.values())

    unit = unit_of(
        activation, alpha, gate_scale, scale, up_offset, limit, limit_activated, interleaved
    )
    (width, D), gradients = gate_up.shape, {}
    h, dy = h.reshape(-1, width), dy.reshape(-1, D)
    need_dh = need_dx or need_dgate_up or need_dgate_up_bias
    dh, _, gradients["down"] = unit_and_layer_bwd(
        h, None, a, down, dy, unit, need_dh, False, need_ddown
    )
    if need_ddown_bias:
        gradients["down_bias"] = sum_of_rows(dy)
    if need_dgate_up:
        gradients["gate_up"] = dh.t().mm(x.reshape(-1, D))
    if need_dgate_up_bias:
        gradients["gate_up_bias"] = sum_of_rows(dh)
    if need_dx:
        gradients["x"] = dh.mm(gate_up).view(x.shape)
    return tuple(gradients[name] if need else None for name, (_, need) in needs.items())


_fused_mlp = custom_vjp(
    "fused_mlp",
    reference=reference,
    fwd=fused_mlp_fwd,
    bwd=fused_mlp_bwd,
    results="y",
    residuals="h a",
    grads="x gate_up down gate_up_bias down_bias",
    rows="x y h a",
    autocast="x gate_up down gate_up_bias down_bias",
)


def fused_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    alpha: float = 1.0,
    gate_scale: float = 1.0,
    scale: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    limit_activated: bool = False,
    interleaved: bool = False,
    recompute: bool = True,
) -> Tensor:
    """Compute a gated MLP (SwiGLU and its kin) of packed weights, forward and backward in one op.

        y = unit(x · gate_upᵀ + gate_up_bias) · downᵀ + down_bias

    Args:
        x: (..., D), floating point, any strides: the tokens.
        gate_up: (2F, D), the dtype of x (under autocast cast as F.linear's), any strides: the
            weights of the gate, then those of up; `torch.cat([gate, up])` of a model that has two.
        down: (D, F), the dtype of x, any strides.
        gate_up_bias, down_bias: (2F,) and (D,), the dtype of x; None: no bias.
        activation, alpha, gate_scale, scale, up_offset, limit, limit_activated, interleaved: the
            unit, and how gate and up lie in the product, as in `gated_activation`.
        recompute: make the activation again in the backward pass instead of keeping it.

    Returns:
        (..., D), dtype of x.

    Raises:
        TypeError: a tensor is not of the dtype that it must be of, an option is no number.
        ValueError: a shape or device does not fit, an option is out of its range.

    Precision: products and the activation are rounded to the dtype of x, their sums are float32
        (float64 for float64), as are those of the biases' gradients.
    Memory: x, the weights and 2·F numbers a token live until the backward pass, 3·F without
        `recompute`. The gradients of gate and up are one tensor, as are those of their weights.
    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    op = "fused_mlp"
    check.floating(op, "x", x)
    check.at_least_1d(op, "x", x)
    parameters = {
        "gate_up": gate_up, "down": down, "gate_up_bias": gate_up_bias, "down_bias": down_bias
    }  # fmt: skip
    for name, p in parameters.items():
        if p is not None:
            check.floating(op, name, p)
            check.dtype_inside(op, name, p, x, "x")
            check.device(op, name, p, x, "x")
    if gate_up.dim() != 2 or gate_up.shape[0] == 0 or gate_up.shape[0] % 2:
        contract = "have shape (2F, D) with a width F of at least 1"
        check.fail(op, "gate_up", contract, check.spell(gate_up.shape))
    D, width = x.shape[-1], gate_up.shape[0]
    check.shape(op, "gate_up", gate_up, (width, D), "(2F, D) with the last size of `x`")
    check.shape(op, "down", down, (D, width // 2), "(D, F) with the sizes of `gate_up`")
    if gate_up_bias is not None:
        check.shape(op, "gate_up_bias", gate_up_bias, (width,), "(2F,)")
    if down_bias is not None:
        check.shape(op, "down_bias", down_bias, (D,), "(D,)")
    check_unit(op, activation, alpha, gate_scale, scale, up_offset, limit)
    return _fused_mlp(
        x, gate_up, down, gate_up_bias, down_bias, activation, float(alpha), float(gate_scale),
        float(scale), float(up_offset), limit, bool(limit_activated), bool(interleaved),
        bool(recompute),
    )  # fmt: skip
