"""RMSNorm with a gate, which multiplies what comes out of the norm or what goes into it.

    after:  h = x              y = x̂ · weight · act(gate)
    before: h = x · act(gate)  y = ĥ · weight                     ĥ = h / √(mean(h²) + ε)

    p     = dy · act(gate), or dy         dweight = Σ_rows p · ĥ
    g     = p · weight                    dh = rstd · (g − ĥ · mean(g · ĥ))
    dx    = dh, or dh · act(gate)
    dgate = dy · ĥ · weight · act′(gate), or dh · x · act′(gate)

The features may be groups with a mean of their own: each is a norm of narrower rows.

Memory traffic in bytes per element of a 2-byte x: 6 forward (read x and gate, write y), 10 backward
(read x, gate and dy, write dx and dgate); `rstd`, 4 bytes a row and group, is kept. A row is read
once and stays in registers. The backward pass is one persistent launch, each program walking a
strip of rows with its share of dweight in registers while the next rows are on their way, and one
small launch that adds the shares in a fixed order. Programs go over the columns of wider rows
twice, the second time out of the cache, and keep their shares in memory of their own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from liger_fn.functional.activation.glu import activate
from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.direct import launch
from liger_fn.functional.core.kernels import no_blocks
from liger_fn.functional.core.launch import (
    accumulator,
    as_rows,
    cdiv,
    dense_like,
    has_work,
    sm_count,
    tl,
    triton,
    triton_dtype,
    unit_stride,
)
from liger_fn.functional.norm.blocks import (
    PER_SM,
    add_to_part,
    block_config,
    load_block,
    load_features,
    store_block,
)
from liger_fn.functional.norm.rows import (
    affine,
    check_norm,
    cover,
    load_row_features,
    load_rows,
    row_dots,
    rows_config,
    strips_of,
    sums_of_parts,
)

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
}


def reference(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    gate_first: bool = False,
    groups: int = 1,
    activation: str = "silu",
    cast_before_weight: bool = False,
) -> Tensor:
    compute = accumulator(x.dtype)
    act = _ACTIVATIONS[activation](gate.to(compute))
    h = x.to(compute) * act if gate_first else x.to(compute)
    h = h.unflatten(-1, (groups, -1)) if groups > 1 else h.unsqueeze(-2)
    y = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    if cast_before_weight:
        y = y.to(x.dtype).to(compute)
    if weight is not None:
        y = y * weight.to(compute)
    return (y if gate_first else y * act).to(x.dtype)


# A program has so many rows that, where these do not lie in whole vectors, a lane has one number of
# each that is no wider (triton 3.9).
_ONE_A_LANE = tl.constexpr(512)


@triton.jit(do_not_specialize=["N"])
def _gated_rms_norm_fwd_kernel(
    x_ptr, gate_ptr, weight_ptr, y_ptr, rstd_ptr,
    x_stride_n, gate_stride_n, y_stride_n, N, D,
    EPS: tl.constexpr, GATE_FIRST: tl.constexpr, ACTIVATION: tl.constexpr, CAST: tl.constexpr,
    COMPUTE: tl.constexpr, FAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    x_ptr += group * D
    gate_ptr += group * D
    y_ptr += group * D
    if weight_ptr is not None:
        weight_ptr += group * D
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = row < N
    h = load_rows(x_ptr, x_stride_n, row, in_n, D, COMPUTE, BLOCK_D, PIECES)
    gate = load_rows(gate_ptr, gate_stride_n, row, in_n, D, COMPUTE, BLOCK_D, PIECES)
    # Asked for before the reduction, it arrives meanwhile.
    weight = load_row_features(weight_ptr, D, BLOCK_N, BLOCK_D, PIECES)

    if GATE_FIRST:
        gated = no_blocks()
        for i in tl.static_range(PIECES):
            act, _ = activate(gate[i], ACTIVATION, 1.0, FAST)
            gated += (h[i] * act,)
        h = gated
    rstd = tl.math.rsqrt(row_dots(h, h, PIECES, _ONE_A_LANE) / D + EPS)
    tl.store(rstd_ptr + row * tl.num_programs(1) + group, rstd, mask=in_n)

    for i in tl.static_range(PIECES):
        y = affine(
            h[i] * rstd[:, None], weight[i] if weight_ptr is not None else None, None,
            0.0, y_ptr.dtype.element_ty, CAST,
        )  # fmt: skip
        if not GATE_FIRST:
            act, _ = activate(gate[i], ACTIVATION, 1.0, FAST)
            y *= act
        store_block(y_ptr, row, y_stride_n, in_n, i * BLOCK_D, D, y, BLOCK_D)


@triton.jit(do_not_specialize=["N"])
def _gated_rms_norm_fwd_wide_kernel(
    x_ptr, gate_ptr, weight_ptr, y_ptr, rstd_ptr,
    x_stride_n, gate_stride_n, y_stride_n, N, D,
    EPS: tl.constexpr, GATE_FIRST: tl.constexpr, ACTIVATION: tl.constexpr, CAST: tl.constexpr,
    COMPUTE: tl.constexpr, FAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    x_ptr += group * D
    gate_ptr += group * D
    y_ptr += group * D
    if weight_ptr is not None:
        weight_ptr += group * D
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = row < N

    squares = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    for start in range(0, D, BLOCK_D):
        h = load_block(x_ptr, row, x_stride_n, in_n, start, D, COMPUTE, BLOCK_D)
        if GATE_FIRST:
            gate = load_block(gate_ptr, row, gate_stride_n, in_n, start, D, COMPUTE, BLOCK_D)
            act, _ = activate(gate, ACTIVATION, 1.0, FAST)
            h *= act
        squares += h * h
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / D + EPS)
    tl.store(rstd_ptr + row * tl.num_programs(1) + group, rstd, mask=in_n)

    for start in range(0, D, BLOCK_D):
        h = load_block(x_ptr, row, x_stride_n, in_n, start, D, COMPUTE, BLOCK_D)
        gate = load_block(gate_ptr, row, gate_stride_n, in_n, start, D, COMPUTE, BLOCK_D)
        weight = load_features(weight_ptr, start, D, COMPUTE, BLOCK_D)
        act, _ = activate(gate, ACTIVATION, 1.0, FAST)
        if GATE_FIRST:
            h *= act
        y = affine(h * rstd[:, None], weight, None, 0.0, y_ptr.dtype.element_ty, CAST)
        if not GATE_FIRST:
            y *= act
        store_block(y_ptr, row, y_stride_n, in_n, start, D, y, BLOCK_D)


@triton.jit(do_not_specialize=["N", "strip"])
def _gated_rms_norm_bwd_kernel(
    x_ptr, gate_ptr, weight_ptr, rstd_ptr, dy_ptr, dx_ptr, dgate_ptr, dweight_part_ptr,
    x_stride_n, gate_stride_n, dy_stride_n, dx_stride_n, N, D, strip,
    GATE_FIRST: tl.constexpr, ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr,
    FAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    program, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x_ptr += group * D
    gate_ptr += group * D
    dy_ptr += group * D
    if weight_ptr is not None:
        weight_ptr += group * D
    if dx_ptr is not None:
        dx_ptr += group * D
    if dgate_ptr is not None:
        dgate_ptr += group * D
    weight = load_row_features(weight_ptr, D, BLOCK_N, BLOCK_D, PIECES)
    # What no pointer asks for, the compiler leaves out.
    dweight = no_blocks()
    for _ in tl.static_range(PIECES):
        dweight += (tl.zeros((BLOCK_N, BLOCK_D), COMPUTE),)

    for step in tl.range(0, strip, BLOCK_N, num_stages=STAGES):
        at = step + tl.arange(0, BLOCK_N)
        row = program * strip + at
        in_n = (row < N) & (at < strip)
        x = load_rows(x_ptr, x_stride_n, row, in_n, D, COMPUTE, BLOCK_D, PIECES)
        gate = load_rows(gate_ptr, gate_stride_n, row, in_n, D, COMPUTE, BLOCK_D, PIECES)
        dy = load_rows(dy_ptr, dy_stride_n, row, in_n, D, COMPUTE, BLOCK_D, PIECES)
        rstd = tl.load(rstd_ptr + row * tl.num_programs(1) + group, mask=in_n, other=0.0)
        rstd = rstd[:, None]

        hhat, g, dweight_next = no_blocks(), no_blocks(), no_blocks()
        for i in tl.static_range(PIECES):
            act, dact = activate(gate[i], ACTIVATION, 1.0, FAST)
            h = x[i] * rstd
            if GATE_FIRST:
                h *= act
            product = dy[i] * h
            through = dy[i]
            if weight_ptr is not None:
                w = weight[i].to(COMPUTE)
                through *= w
            if GATE_FIRST:
                dweight_next += (dweight[i] + product,)
            else:
                dweight_next += (dweight[i] + product * act,)
                if dgate_ptr is not None:
                    dgate = through * h * dact
                    store_block(dgate_ptr, row, dx_stride_n, in_n, i * BLOCK_D, D, dgate, BLOCK_D)
                through *= act
            hhat += (h,)
            g += (through,)
        dweight = dweight_next

        along = (row_dots(g, hhat, PIECES, _ONE_A_LANE) / D)[:, None]
        for i in tl.static_range(PIECES):
            dx = rstd * (g[i] - hhat[i] * along)
            if GATE_FIRST:
                act, dact = activate(gate[i], ACTIVATION, 1.0, FAST)
                if dgate_ptr is not None:
                    # The product is kept, and not both factors: without brackets registers spill.
                    dgate = dx * (x[i] * dact)
                    store_block(dgate_ptr, row, dx_stride_n, in_n, i * BLOCK_D, D, dgate, BLOCK_D)
                dx *= act
            if dx_ptr is not None:
                store_block(dx_ptr, row, dx_stride_n, in_n, i * BLOCK_D, D, dx, BLOCK_D)

    if dweight_part_ptr is not None:
        part_ptr = dweight_part_ptr + (program * tl.num_programs(1) + group) * D
        for i in tl.static_range(PIECES):
            col = i * BLOCK_D + tl.arange(0, BLOCK_D)
            tl.store(part_ptr + col, tl.sum(dweight[i], axis=0), mask=col < D)


@triton.jit
def _load_all(
    x_ptr, gate_ptr, weight_ptr, dy_ptr, row, x_stride_n, gate_stride_n, dy_stride_n,
    rstd, in_n, start, D,
    GATE_FIRST: tl.constexpr, ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr,
    FAST: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Load a block, and give x, act, act′, ĥ, p and g of it."""
    x = load_block(x_ptr, row, x_stride_n, in_n, start, D, COMPUTE, BLOCK_D)
    gate = load_block(gate_ptr, row, gate_stride_n, in_n, start, D, COMPUTE, BLOCK_D)
    p = load_block(dy_ptr, row, dy_stride_n, in_n, start, D, COMPUTE, BLOCK_D)
    weight = load_features(weight_ptr, start, D, COMPUTE, BLOCK_D)
    act, dact = activate(gate, ACTIVATION, 1.0, FAST)
    hhat = x * rstd[:, None]
    if GATE_FIRST:
        hhat *= act
        through_gate = x * dact
    else:
        through_gate = p * hhat * dact
        if weight_ptr is not None:
            through_gate *= weight
        p *= act
    g = p
    if weight_ptr is not None:
        g = p * weight
    return act, through_gate, hhat, p, g


@triton.jit(do_not_specialize=["N", "strip"])
def _gated_rms_norm_bwd_wide_kernel(
    x_ptr, gate_ptr, weight_ptr, rstd_ptr, dy_ptr, dx_ptr, dgate_ptr, dweight_part_ptr,
    x_stride_n, gate_stride_n, dy_stride_n, dx_stride_n, N, D, strip,
    GATE_FIRST: tl.constexpr, ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr,
    FAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x_ptr += group * D
    gate_ptr += group * D
    dy_ptr += group * D
    if weight_ptr is not None:
        weight_ptr += group * D
    if dx_ptr is not None:
        dx_ptr += group * D
    if dgate_ptr is not None:
        dgate_ptr += group * D
    if dweight_part_ptr is not None:
        dweight_part_ptr += (program * tl.num_programs(1) + group) * D

    for step in range(0, strip, BLOCK_N):
        at = step + tl.arange(0, BLOCK_N)
        row = program * strip + at
        in_n = (row < N) & (at < strip)
        rstd = tl.load(rstd_ptr + row * tl.num_programs(1) + group, mask=in_n, other=0.0)

        dots = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
        for start in range(0, D, BLOCK_D):
            _, _, hhat, _, g = _load_all(
                x_ptr, gate_ptr, weight_ptr, dy_ptr, row, x_stride_n, gate_stride_n, dy_stride_n,
                rstd, in_n, start, D, GATE_FIRST, ACTIVATION, COMPUTE, FAST, BLOCK_D,
            )  # fmt: skip
            dots += g * hhat
        along = (tl.sum(dots, axis=1) / D)[:, None]

        for start in range(0, D, BLOCK_D):
            act, dgate, hhat, p, g = _load_all(
                x_ptr, gate_ptr, weight_ptr, dy_ptr, row, x_stride_n, gate_stride_n, dy_stride_n,
                rstd, in_n, start, D, GATE_FIRST, ACTIVATION, COMPUTE, FAST, BLOCK_D,
            )  # fmt: skip
            dx = rstd[:, None] * (g - hhat * along)
            if GATE_FIRST:
                dgate *= dx
                dx *= act
            if dx_ptr is not None:
                store_block(dx_ptr, row, dx_stride_n, in_n, start, D, dx, BLOCK_D)
            if dgate_ptr is not None:
                store_block(dgate_ptr, row, dx_stride_n, in_n, start, D, dgate, BLOCK_D)
            if dweight_part_ptr is not None:
                share = tl.sum(p * hhat, axis=0)
                add_to_part(dweight_part_ptr, step, start, D, share, BLOCK_D)
        tl.debug_barrier()


def _gated_rms_norm_fwd_config(D: int, itemsize: int) -> dict:
    """Two rows are live, x and its gate: they are held up to 16 KiB each."""
    return rows_config(D, itemsize, widest=16384)


def _gated_rms_norm_bwd_config(D: int, itemsize: int, gate_first: bool) -> dict:
    """16 numbers a thread: ĥ, g and the share of dweight are live at once, four bytes each.

    Sixteen warps take all registers. While they add up their rows, the next rows of x, gate and dy
    are on their way: two steps ahead where these take two bytes an element. A gate that comes first
    lives until the end: half as many numbers a thread, where that is no less than a row.
    """
    widest = min(8192, 32768 // itemsize)
    if widest < D:
        return block_config(D) | {"per_sm": PER_SM}
    block_d, pieces = cover(D)
    width = block_d * pieces
    most = widest // 2 if gate_first else widest
    return {
        "BLOCK_N": min(64, 1 << max(0, (most // width).bit_length() - 1)),
        "BLOCK_D": block_d,
        "PIECES": pieces,
        "STAGES": 3 if itemsize == 2 else 2,
        "num_warps": 16,
        "per_sm": 1,
    }


def gated_rms_norm_fwd(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    eps: float,
    gate_first: bool,
    groups: int,
    activation: str,
    cast_before_weight: bool,
) -> tuple[Tensor, Tensor]:
    y = dense_like(x)
    rstd = x.new_empty((*x.shape[:-1], groups), dtype=accumulator(x.dtype))

    if has_work(y):
        x, gate, weight = as_rows(x), as_rows(gate), unit_stride(weight)
        N, D = x.shape
        config = _gated_rms_norm_fwd_config(D // groups, x.element_size())
        launch(
            _gated_rms_norm_fwd_kernel if "PIECES" in config else _gated_rms_norm_fwd_wide_kernel,
            (cdiv(N, config["BLOCK_N"]), groups),
            x, gate, weight, y, rstd, x.stride(0), gate.stride(0), D, N, D // groups,
            EPS=eps, GATE_FIRST=gate_first, ACTIVATION=activation, CAST=cast_before_weight,
            COMPUTE=triton_dtype(rstd.dtype), FAST=x.element_size() == 2, **config,
        )  # fmt: skip
    return y, rstd


def gated_rms_norm_bwd(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dy: Tensor,
    eps: float,
    gate_first: bool,
    groups: int,
    activation: str,
    cast_before_weight: bool,
    need_dx: bool,
    need_dgate: bool,
    need_dweight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dx = dense_like(x) if need_dx else None
    dgate = dense_like(gate) if need_dgate else None
    if not has_work(x):
        return dx, dgate, dense_like(weight).zero_() if need_dweight else None

    x, gate, dy = as_rows(x), as_rows(gate), as_rows(dy)
    weight, rstd = unit_stride(weight), unit_stride(rstd)
    N, D = x.shape
    config = _gated_rms_norm_bwd_config(D // groups, x.element_size(), gate_first)
    per_sm = config.pop("per_sm")
    # No more than run at once: the rest would start when the others end.
    at_once = max(1, per_sm * sm_count(x.device) // groups)
    programs, strip = strips_of(N, config["BLOCK_N"], at_once)
    part = x.new_empty((programs, D), dtype=rstd.dtype) if need_dweight else None
    launch(
        _gated_rms_norm_bwd_kernel if "PIECES" in config else _gated_rms_norm_bwd_wide_kernel,
        (programs, groups),
        x, gate, weight, rstd, dy, dx, dgate, part,
        x.stride(0), gate.stride(0), dy.stride(0), D, N, D // groups, strip,
        GATE_FIRST=gate_first, ACTIVATION=activation, COMPUTE=triton_dtype(rstd.dtype),
        FAST=x.element_size() == 2, **config,
    )  # fmt: skip
    (dweight,) = sums_of_parts([part], [weight if need_dweight else None])
    return dx, dgate, dweight


_gated_rms_norm = custom_vjp(
    "gated_rms_norm",
    reference=reference,
    fwd=gated_rms_norm_fwd,
    bwd=gated_rms_norm_bwd,
    results="y",
    residuals="rstd",
    grads="x gate weight",
    rows="x gate y rstd",
)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    gate_first: bool = False,
    groups: int = 1,
    activation: str = "silu",
    cast_before_weight: bool = False,
) -> Tensor:
    """Normalise by the root mean square, and multiply with an activated gate after or before.

        y = norm(x) · weight · act(gate)            norm(h) = h / √(mean(h²) + eps)
        y = norm(x · act(gate)) · weight            with `gate_first`

    Gated delta nets (Qwen3-Next) do the one, Mamba 2 (Zamba 2, Nemotron-H, Bamba) the other.

    Args:
        x: (..., D), floating point, any strides.
        gate: (..., D), shape and dtype of x, any strides.
        weight: (D,), floating point, may be of another dtype than x; None: 1.
        eps: added to the mean square.
        gate_first: multiply before the norm.
        groups: how many groups of features have a mean square of their own; divides D.
        activation: "silu" or "sigmoid".
        cast_before_weight: round the normalised value to x.dtype before the weight multiplies it,
            as Hugging Face's modules do.

    Returns:
        (..., D), dtype of x, contiguous.

    Raises:
        TypeError: x, gate or weight is not a floating-point tensor, gate has another dtype than x,
            eps or groups is no number.
        ValueError: a shape or device does not fit, groups does not divide D, the activation is
            unknown.

    Precision: computed in float32 (float64 for float64 x), dweight too; every output is rounded
        once (twice in y with `cast_before_weight`). Where x has two bytes, the activation is exact
        to some 20 bits.
    Memory: x, gate, weight and 4 bytes a row and group live until the backward pass.
    Source: Dao and Gu, "Transformers are SSMs", 2024; Yang, Kautz and Hatamizadeh, "Gated Delta
        Networks", 2024.
    """
    op = "gated_rms_norm"
    check_norm(op, x, eps, weight=weight)
    check.floating(op, "gate", gate)
    check.dtype(op, "gate", gate, x, "x")
    check.shape(op, "gate", gate, x.shape, "the shape of `x`")
    check.device(op, "gate", gate, x, "x")
    check.one_of(op, "activation", activation, tuple(_ACTIVATIONS))
    whole = isinstance(groups, (int, torch.SymInt))
    check.number(op, "groups", groups, "be an integer", whole)
    if groups < 1 or x.shape[-1] % groups:
        check.fail(op, "groups", f"divide {x.shape[-1]}, the last size of `x`", groups)
    return _gated_rms_norm(x, gate, weight, eps, gate_first, groups, activation, cast_before_weight)
