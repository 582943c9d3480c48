"""The kernels of all gated linear units: elementwise, with activation and options as constants.

    g = gate_scale · gate                 y     = scale · act(g) · u          u = up + up_offset
    dgate = dy · scale · u · act′(g) · gate_scale
    dup   = dy · scale · act(g)

`act` is one of `ACTIVATIONS`; `g` or `act(g)` may be bounded from above and `up` on both sides, and
gradients vanish beyond a bound. Memory traffic in bytes per element of a 2-byte y: 6 forward (read
gate and up, write y), 10 backward (read gate, up and dy, write dgate and dup). Only gate and up are
kept: the activation is computed again, for arithmetic is free beside the memory.

`gate` may be packed, (..., 2F): gate first, then up, or both in turns. They are read where they
lie, and the backward pass writes one packed gradient.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.core.direct import MOST, Bound
from liger_fn.functional.core.kernels import exp_of
from liger_fn.functional.core.launch import (
    accumulator,
    cdiv,
    dense_like,
    has_work,
    next_power_of_2,
    rows_of,
    tl,
    triton,
    triton_dtype,
)


@triton.jit
def _sigmoid(x, FAST: tl.constexpr = False):
    # For x below -88 exp gives infinity, and 1/∞ the right 0.
    if FAST:
        # One instruction each, where exp takes four and a division six; an error of a few 2⁻²².
        root = tl.math.rsqrt(1.0 + exp_of(x, -1.0))
        sigmoid = root * root
    else:
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
    return sigmoid


@triton.jit
def _cdf_tanh(x):
    """Give Φ(x) ≈ (1 + tanh(u)) / 2 = σ(2u), u = √(2/π)·(x + 0.044715·x³), and its derivative."""
    TWICE_SQRT_2_OVER_PI: tl.constexpr = 1.5957691216057308
    # Both are constant beyond 50, where x² of the largest numbers would overflow and give 0 · ∞.
    x = tl.minimum(tl.maximum(x, -50.0), 50.0)
    cdf = _sigmoid(TWICE_SQRT_2_OVER_PI * x * (1.0 + 0.044715 * x * x))
    return cdf, cdf * (1.0 - cdf) * (TWICE_SQRT_2_OVER_PI * (1.0 + 3 * 0.044715 * x * x))


@triton.jit
def _cdf_erf(x):
    """Give Φ(x) = (1 + erf(x/√2)) / 2, and its derivative."""
    SQRT_HALF: tl.constexpr = 0.7071067811865476
    ONE_OVER_SQRT_2_PI: tl.constexpr = 0.3989422804014327
    return 0.5 * (1.0 + tl.erf(x * SQRT_HALF)), ONE_OVER_SQRT_2_PI * tl.exp(-0.5 * x * x)


ACTIVATIONS = ("silu", "gelu_tanh", "gelu_erf", "relu", "relu_squared", "sigmoid", "linear")


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, FAST: tl.constexpr = False):
    """Give act(x), and its derivative; silu is x · σ(alpha · x).

    FAST computes σ of silu and of sigmoid to some 20 bits: enough for what is rounded to two bytes.
    """
    if ACTIVATION == "linear":
        act, dact = x, tl.full(x.shape, 1.0, x.dtype)
    elif ACTIVATION == "relu":
        # Compared so that NaN stays NaN.
        act, dact = tl.where(x < 0.0, 0.0, x), tl.where(x > 0.0, 1.0, 0.0).to(x.dtype)
    elif ACTIVATION == "relu_squared":
        relu = tl.where(x < 0.0, 0.0, x)
        act, dact = relu * relu, 2.0 * relu
    elif ACTIVATION == "sigmoid":
        act = _sigmoid(x, FAST)
        dact = act * (1.0 - act)
    else:
        if ACTIVATION == "silu":
            s = _sigmoid(ALPHA * x, FAST)
            ds = ALPHA * s * (1.0 - s)
        elif ACTIVATION == "gelu_tanh":
            s, ds = _cdf_tanh(x)
        else:
            s, ds = _cdf_erf(x)
        act, dact = x * s, s + x * ds
    return act, dact


@triton.jit
def _bounded_above(x, dx, LIMIT: tl.constexpr):
    """Give min(x, limit), and the derivative of that where dx is the derivative of x."""
    return tl.where(x > LIMIT, LIMIT, x), tl.where(x > LIMIT, 0.0, dx)


@triton.jit
def _activated_gate(
    gate, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, GATE_SCALE: tl.constexpr,
    LIMIT: tl.constexpr, LIMIT_ACTIVATED: tl.constexpr,
):  # fmt: skip
    """Give the bounded activation of a gate, and its derivative."""
    g = gate * GATE_SCALE
    dg = tl.full(gate.shape, GATE_SCALE, gate.dtype)
    if LIMIT is not None and not LIMIT_ACTIVATED:
        g, dg = _bounded_above(g, dg, LIMIT)
    act, dact = activate(g, ACTIVATION, ALPHA)
    dact *= dg
    if LIMIT is not None and LIMIT_ACTIVATED:
        act, dact = _bounded_above(act, dact, LIMIT)
    return act, dact


@triton.jit
def _factor(up, UP_OFFSET: tl.constexpr, SCALE: tl.constexpr, LIMIT: tl.constexpr):
    """Give what multiplies the activated gate, and its derivative."""
    slope = tl.full(up.shape, SCALE, up.dtype)
    if LIMIT is not None:
        slope = tl.where(tl.abs(up) > LIMIT, 0.0, slope)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return (up + UP_OFFSET) * SCALE, slope


@triton.jit
def tile(N, F, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr):
    """Give the rows and columns of this program; neighbours share rows: streams are long."""
    tiles = tl.cdiv(F, BLOCK_F)
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = (program % tiles) * BLOCK_F + tl.arange(0, BLOCK_F)
    return row[:, None], col[None, :], (row < N)[:, None] & (col < F)[None, :]


@triton.jit
def _load_gate_and_up(
    gate_ptr, up_ptr, gate_stride_n, up_stride_n, N, F,
    PACKED: tl.constexpr, INTERLEAVED: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    if INTERLEAVED:
        row, col, inside = tile(N, 2 * F, BLOCK_N, 2 * BLOCK_F)
        pairs = tl.load(gate_ptr + row * gate_stride_n + col, mask=inside, other=0.0)
        gate, up = tl.split(tl.reshape(pairs, (BLOCK_N, BLOCK_F, 2)))
    else:
        row, col, inside = tile(N, F, BLOCK_N, BLOCK_F)
        if PACKED:
            up_ptr += F
        gate = tl.load(gate_ptr + row * gate_stride_n + col, mask=inside, other=0.0)
        up = tl.load(up_ptr + row * up_stride_n + col, mask=inside, other=0.0)
    return gate.to(COMPUTE), up.to(COMPUTE)


@triton.jit(do_not_specialize=["N"])
def _glu_fwd_kernel(
    gate_ptr, up_ptr, y_ptr, gate_stride_n, up_stride_n, N, F,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, GATE_SCALE: tl.constexpr, SCALE: tl.constexpr,
    UP_OFFSET: tl.constexpr, LIMIT: tl.constexpr, LIMIT_ACTIVATED: tl.constexpr,
    PACKED: tl.constexpr, INTERLEAVED: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    gate, up = _load_gate_and_up(
        gate_ptr, up_ptr, gate_stride_n, up_stride_n, N, F,
        PACKED, INTERLEAVED, COMPUTE, BLOCK_N, BLOCK_F,
    )  # fmt: skip

    act, _ = _activated_gate(gate, ACTIVATION, ALPHA, GATE_SCALE, LIMIT, LIMIT_ACTIVATED)
    factor, _ = _factor(up, UP_OFFSET, SCALE, LIMIT)

    row, col, inside = tile(N, F, BLOCK_N, BLOCK_F)
    tl.store(y_ptr + row * F + col, act * factor, mask=inside)


@triton.jit(do_not_specialize=["N"])
def _glu_bwd_kernel(
    gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, y_ptr,
    gate_stride_n, up_stride_n, dy_stride_n, dx_stride_n, N, F,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, GATE_SCALE: tl.constexpr, SCALE: tl.constexpr,
    UP_OFFSET: tl.constexpr, LIMIT: tl.constexpr, LIMIT_ACTIVATED: tl.constexpr,
    PACKED: tl.constexpr, INTERLEAVED: tl.constexpr,
    NEED_DGATE: tl.constexpr, NEED_DUP: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # A load whose value is not used is left out by the compiler.
    gate, up = _load_gate_and_up(
        gate_ptr, up_ptr, gate_stride_n, up_stride_n, N, F,
        PACKED, INTERLEAVED, COMPUTE, BLOCK_N, BLOCK_F,
    )  # fmt: skip
    row, col, inside = tile(N, F, BLOCK_N, BLOCK_F)
    dy = tl.load(dy_ptr + row * dy_stride_n + col, mask=inside, other=0.0).to(COMPUTE)

    act, dact = _activated_gate(gate, ACTIVATION, ALPHA, GATE_SCALE, LIMIT, LIMIT_ACTIVATED)
    factor, dfactor = _factor(up, UP_OFFSET, SCALE, LIMIT)
    dgate, dup = dy * factor * dact, dy * act * dfactor
    if y_ptr is not None:
        tl.store(y_ptr + row * F + col, act * factor, mask=inside)

    if INTERLEAVED:
        pairs = tl.interleave(dgate, dup).to(dgate_ptr.dtype.element_ty)
        row, col, inside = tile(N, 2 * F, BLOCK_N, 2 * BLOCK_F)
        tl.store(dgate_ptr + row * dx_stride_n + col, pairs, mask=inside)
    else:
        if PACKED:
            dup_ptr += F
        if NEED_DGATE:
            tl.store(dgate_ptr + row * dx_stride_n + col, dgate, mask=inside)
        if NEED_DUP:
            tl.store(dup_ptr + row * dx_stride_n + col, dup, mask=inside)


class Gating(NamedTuple):
    """Which unit the kernels compute, and how gate and up are packed."""

    activation: str
    alpha: float = 1.0
    gate_scale: float = 1.0
    scale: float = 1.0
    up_offset: float = 0.0
    limit: float | None = None
    limit_activated: bool = False
    interleaved: bool = False

    def constants(self) -> dict[str, Any]:
        """The same as the kernels name it."""
        return {name.upper(): value for name, value in self._asdict().items()}


def _glu_config(F: int) -> dict:
    """1024 elements for four warps: a thread has one 16-byte load of each operand.

    So small a program takes few registers, and many of them on a chip hide the memory's latency.
    """
    block_f = min(1024, next_power_of_2(F))
    return {"BLOCK_F": block_f, "BLOCK_N": 1024 // block_f, "num_warps": 4}


def _grid(N: int, F: int, kernel: Bound) -> tuple[int]:
    constants = kernel.constants
    return (cdiv(N, constants["BLOCK_N"]) * cdiv(F, constants["BLOCK_F"]),)


@functools.lru_cache(MOST)
def _glu_fwd_with(F: int, dtype: torch.dtype, unit: Gating, packed: bool) -> Bound:
    return Bound(
        _glu_fwd_kernel,
        PACKED=packed, **unit.constants(), COMPUTE=triton_dtype(accumulator(dtype)),
        **_glu_config(F),
    )  # fmt: skip


def glu_fwd(gate: Tensor, up: Tensor | None, unit: Gating) -> tuple[Tensor]:
    """Launch the forward pass of a unit."""
    packed = up is None
    y = gate.new_empty(*gate.shape[:-1], gate.shape[-1] // 2) if packed else dense_like(gate)

    if has_work(y):
        F = y.shape[-1]
        N = y.numel() // F
        gate, gate_stride_n = rows_of(gate)
        up, up_stride_n = (gate, gate_stride_n) if packed else rows_of(up)
        kernel = _glu_fwd_with(F, y.dtype, unit, packed)
        kernel(_grid(N, F, kernel), gate, up, y, gate_stride_n, up_stride_n, N, F)
    return (y,)


@functools.lru_cache(MOST)
def _glu_bwd_with(
    F: int, dtype: torch.dtype, unit: Gating, packed: bool, need_dgate: bool, need_dup: bool
) -> Bound:
    return Bound(
        _glu_bwd_kernel,
        PACKED=packed, **unit.constants(),
        NEED_DGATE=need_dgate, NEED_DUP=need_dgate if packed else need_dup,
        COMPUTE=triton_dtype(accumulator(dtype)), **_glu_config(F),
    )  # fmt: skip


def glu_bwd(
    gate: Tensor,
    up: Tensor | None,
    dy: Tensor,
    unit: Gating,
    need_dgate: bool,
    need_dup: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Launch the backward pass of a unit."""
    return glu_bwd_again(gate, up, dy, unit, need_dgate, need_dup, need_y=False)[:2]


def glu_bwd_again(
    gate: Tensor,
    up: Tensor | None,
    dy: Tensor,
    unit: Gating,
    need_dgate: bool,
    need_dup: bool,
    need_y: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launch the backward pass, and give y once more: it costs a write, but no read."""
    packed = up is None
    dgate = dense_like(gate) if need_dgate else None
    dup = dense_like(up) if need_dup else None
    y = dense_like(dy) if need_y else None

    if has_work(dy) and (need_dgate or need_dup or need_y):
        F = dy.shape[-1]
        N = dy.numel() // F
        gate, gate_stride_n = rows_of(gate)
        up, up_stride_n = (gate, gate_stride_n) if packed else rows_of(up)
        dy, dy_stride_n = rows_of(dy)
        kernel = _glu_bwd_with(F, dy.dtype, unit, packed, need_dgate, need_dup)
        kernel(
            _grid(N, F, kernel), gate, up, dy, dgate, dgate if packed else dup, y,
            gate_stride_n, up_stride_n, dy_stride_n, 2 * F if packed else F, N, F,
        )  # fmt: skip
    return dgate, dup, y


def halves(gate: Tensor, up: Tensor | None, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Give gate and up in the type of the arithmetic, whether packed or not."""
    if up is None and interleaved:
        gate, up = gate[..., ::2], gate[..., 1::2]
    elif up is None:
        gate, up = gate.chunk(2, -1)
    compute = accumulator(gate.dtype)
    return gate.to(compute), up.to(compute)


def check_glu(op: str, gate: Tensor, up: Tensor | None) -> None:
    """Check the arguments that all gated linear units share."""
    check.floating(op, "gate", gate)
    check.at_least_1d(op, "gate", gate)
    if up is None:
        if gate.shape[-1] % 2:
            check.fail(op, "gate", "have an even last size when `up` is None", gate.shape[-1])
        return
    check.floating(op, "up", up)
    check.dtype(op, "up", up, gate, "gate")
    check.shape(op, "up", up, gate.shape, "the shape of `gate`")
    check.device(op, "up", up, gate, "gate")
