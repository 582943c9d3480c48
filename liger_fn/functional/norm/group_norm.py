"""GroupNorm: groups of channels, with all their positions, to mean 0 and variance 1.

    x̂ = (x − mean) · rstd       rstd = 1 / √(mean((x − mean)²) + ε)      y = x̂ · weight_c + bias_c

    g  = dy · weight_c
    dx = rstd · (g − mean(g) − x̂ · mean(g · x̂))      dweight_c = Σ dy · x̂       dbias_c = Σ dy

with means over a sample's group. The squares are those of what is left after the mean is known, so
that nothing cancels. Memory traffic in bytes per element of a 2-byte x: 4 forward (read x, write
y), 6 backward (read x and dy, write dx); the mean and `rstd`, 8 bytes a group, are kept. A program
goes over its group two or three times, out of the cache after the first; backward it gives the sums
of its channels, which a small launch adds over the samples in a fixed order.
"""

import math

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.direct import launch
from liger_fn.functional.core.launch import (
    accumulator,
    dense_like,
    has_work,
    next_power_of_2,
    tl,
    triton,
    triton_dtype,
    unit_stride,
)
from liger_fn.functional.norm.rows import sums_of_parts


def reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    return _reference(_channels_and_positions(x), weight, bias, num_groups, eps).reshape(x.shape)


def _reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float
) -> Tensor:
    compute = accumulator(x.dtype)
    h = x.to(compute).unflatten(-2, (num_groups, -1))
    h = h - h.mean((-2, -1), keepdim=True)
    y = h * torch.rsqrt(h.square().mean((-2, -1), keepdim=True) + eps)
    y = y.flatten(-3, -2)
    if weight is not None:
        y = y * weight.to(compute)[:, None]
    if bias is not None:
        y = y + bias.to(compute)[:, None]
    return y.to(x.dtype)


def _channels_and_positions(x: Tensor) -> Tensor:
    """View x (B, C, ...) as (B, C, S)."""
    return x.reshape(*x.shape[:2], math.prod(x.shape[2:]))


@triton.jit
def _load_tile(
    ptr, stride_c, c, s, K, S,
    COMPUTE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Load channels and positions from c and s on, and say which of them there are."""
    channel = (c + tl.arange(0, BLOCK_C)).to(tl.int64)
    position = s + tl.arange(0, BLOCK_S)
    inside = (channel < K)[:, None] & (position < S)[None, :]
    offset = channel[:, None] * stride_c + position[None, :]
    return tl.load(ptr + offset, mask=inside, other=0.0).to(COMPUTE), inside


@triton.jit
def _store_tile(ptr, c, s, K, S, tile, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    channel = (c + tl.arange(0, BLOCK_C)).to(tl.int64)
    position = s + tl.arange(0, BLOCK_S)
    inside = (channel < K)[:, None] & (position < S)[None, :]
    tl.store(ptr + channel[:, None] * S + position[None, :], tile, mask=inside)


@triton.jit
def _group_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, x_stride_b, x_stride_c, G, K, S,
    EPS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    group = program % G
    x_ptr += (program // G) * x_stride_b + group * K * x_stride_c
    y_ptr += program * K * S
    size = tl.full((), 1.0, COMPUTE) * K * S

    sums = tl.zeros((BLOCK_C, BLOCK_S), COMPUTE)
    for c in range(0, K, BLOCK_C):
        for s in range(0, S, BLOCK_S):
            x, _ = _load_tile(x_ptr, x_stride_c, c, s, K, S, COMPUTE, BLOCK_C, BLOCK_S)
            sums += x
    mean = tl.sum(tl.sum(sums, axis=1), axis=0) / size

    # What is left after the mean says how far its rounding is off.
    lefts = tl.zeros((BLOCK_C, BLOCK_S), COMPUTE)
    squares = tl.zeros((BLOCK_C, BLOCK_S), COMPUTE)
    for c in range(0, K, BLOCK_C):
        for s in range(0, S, BLOCK_S):
            x, inside = _load_tile(x_ptr, x_stride_c, c, s, K, S, COMPUTE, BLOCK_C, BLOCK_S)
            left = tl.where(inside, x - mean, 0.0)
            lefts += left
            squares += left * left
    off = tl.sum(tl.sum(lefts, axis=1), axis=0) / size
    variance = tl.sum(tl.sum(squares, axis=1), axis=0) / size - off * off
    rstd = 1.0 / tl.sqrt(variance + EPS)
    tl.store(mean_ptr + program, mean)
    tl.store(rstd_ptr + program, rstd)

    for c in range(0, K, BLOCK_C):
        channel = c + tl.arange(0, BLOCK_C)
        scale = tl.zeros((BLOCK_C,), COMPUTE) + rstd
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + group * K + channel, mask=channel < K, other=0.0)
            scale *= weight.to(COMPUTE)
        shift = tl.zeros((BLOCK_C,), COMPUTE)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + group * K + channel, mask=channel < K, other=0.0)
            shift += bias.to(COMPUTE)
        for s in range(0, S, BLOCK_S):
            x, _ = _load_tile(x_ptr, x_stride_c, c, s, K, S, COMPUTE, BLOCK_C, BLOCK_S)
            y = ((x - mean) - off) * scale[:, None] + shift[:, None]
            _store_tile(y_ptr, c, s, K, S, y, BLOCK_C, BLOCK_S)


@triton.jit
def _group_norm_bwd_kernel(
    x_ptr, weight_ptr, mean_ptr, rstd_ptr, dy_ptr, dx_ptr, dweight_part_ptr, dbias_part_ptr,
    x_stride_b, x_stride_c, dy_stride_b, dy_stride_c, G, K, S,
    COMPUTE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    group = program % G
    x_ptr += (program // G) * x_stride_b + group * K * x_stride_c
    dy_ptr += (program // G) * dy_stride_b + group * K * dy_stride_c
    mean, rstd = tl.load(mean_ptr + program), tl.load(rstd_ptr + program)
    size = tl.full((), 1.0, COMPUTE) * K * S

    along = tl.zeros((BLOCK_C,), COMPUTE)
    level = tl.zeros((BLOCK_C,), COMPUTE)
    for c in range(0, K, BLOCK_C):
        channel = c + tl.arange(0, BLOCK_C)
        in_c = channel < K
        products = tl.zeros((BLOCK_C, BLOCK_S), COMPUTE)
        sums = tl.zeros((BLOCK_C, BLOCK_S), COMPUTE)
        for s in range(0, S, BLOCK_S):
            x, _ = _load_tile(x_ptr, x_stride_c, c, s, K, S, COMPUTE, BLOCK_C, BLOCK_S)
            dy, _ = _load_tile(dy_ptr, dy_stride_c, c, s, K, S, COMPUTE, BLOCK_C, BLOCK_S)
            products += dy * ((x - mean) * rstd)
            sums += dy
        dweight, dbias = tl.sum(products, axis=1), tl.sum(sums, axis=1)
        # The channels of sample b begin at b · C = b · G · K, and program is b · G + group.
        if dweight_part_ptr is not None:
            tl.store(dweight_part_ptr + program * K + channel, dweight, mask=in_c)
        if dbias_part_ptr is not None:
            tl.store(dbias_part_ptr + program * K + channel, dbias, mask=in_c)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + group * K + channel, mask=in_c, other=0.0).to(COMPUTE)
            dweight *= weight
            dbias *= weight
        along += dweight
        level += dbias

    if dx_ptr is not None:
        dx_ptr += program * K * S
        along_all, level_all = tl.sum(along, axis=0) / size, tl.sum(level, axis=0) / size
        for c in range(0, K, BLOCK_C):
            channel = c + tl.arange(0, BLOCK_C)
            weight = tl.full((BLOCK_C,), 1.0, COMPUTE)
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + group * K + channel, mask=channel < K, other=0.0)
                weight = weight.to(COMPUTE)
            for s in range(0, S, BLOCK_S):
                x, _ = _load_tile(x_ptr, x_stride_c, c, s, K, S, COMPUTE, BLOCK_C, BLOCK_S)
                dy, _ = _load_tile(dy_ptr, dy_stride_c, c, s, K, S, COMPUTE, BLOCK_C, BLOCK_S)
                xhat = (x - mean) * rstd
                dx = rstd * (dy * weight[:, None] - level_all - xhat * along_all)
                _store_tile(dx_ptr, c, s, K, S, dx, BLOCK_C, BLOCK_S)


def _group_norm_config(K: int, S: int) -> dict:
    """8192 elements for sixteen warps, for a group is large and there are few of them."""
    block_s = min(8192, next_power_of_2(S))
    block_c = min(8192 // block_s, next_power_of_2(K))
    return {
        "BLOCK_C": block_c,
        "BLOCK_S": block_s,
        "num_warps": max(1, min(16, block_c * block_s // 512)),
    }


def _dense_positions(x: Tensor) -> Tensor:
    """View x (..., C, S) as (B, C, S) with unit stride along S; copy only if no view can do it."""
    x = x.reshape(-1, *x.shape[-2:])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def group_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = dense_like(x)
    mean = x.new_empty((*x.shape[:-2], num_groups), dtype=accumulator(x.dtype))
    rstd = torch.empty_like(mean)

    if has_work(y):
        x, weight, bias = _dense_positions(x), unit_stride(weight), unit_stride(bias)
        B, C, S = x.shape
        K = C // num_groups
        launch(
            _group_norm_fwd_kernel, (B * num_groups,),
            x, weight, bias, y, mean, rstd, x.stride(0), x.stride(1), num_groups, K, S,
            EPS=eps, COMPUTE=triton_dtype(mean.dtype), **_group_norm_config(K, S),
        )  # fmt: skip
    return y, mean, rstd


def group_norm_bwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dy: Tensor,
    num_groups: int,
    eps: float,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dx = dense_like(x) if need_dx else None
    like = [weight if need_dweight else None, bias if need_dbias else None]
    if not has_work(x):
        dweight, dbias = (None if t is None else dense_like(t).zero_() for t in like)
        return dx, dweight, dbias

    x, dy, weight = _dense_positions(x), _dense_positions(dy), unit_stride(weight)
    B, C, S = x.shape
    K = C // num_groups
    parts = [None if t is None else x.new_empty((B, C), dtype=mean.dtype) for t in like]
    launch(
        _group_norm_bwd_kernel, (B * num_groups,),
        x, weight, unit_stride(mean), unit_stride(rstd), dy, dx, *parts,
        x.stride(0), x.stride(1), dy.stride(0), dy.stride(1), num_groups, K, S,
        COMPUTE=triton_dtype(mean.dtype), **_group_norm_config(K, S),
    )  # fmt: skip
    dweight, dbias = sums_of_parts(parts, like)
    return dx, dweight, dbias


_group_norm = custom_vjp(
    "group_norm",
    reference=_reference,
    fwd=group_norm_fwd,
    bwd=group_norm_bwd,
    results="y",
    residuals="mean rstd",
    grads="x weight bias",
    rows="x y mean rstd",
    core_dims=2,
)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise groups of channels to mean 0 and variance 1, then scale and shift each channel.

        y = (x − mean) / √(var + eps) · weight + bias

    Args:
        x: (B, C, ...), floating point, any strides; positions that are dense in memory are read
            without a copy.
        num_groups: how many groups; divides C.
        weight: (C,), floating point, may be of another dtype than x; None: 1.
        bias: (C,), floating point, may be of another dtype than x; None: 0.
        eps: added to the variance, which is the mean square deviation.

    Returns:
        The shape and dtype of x, contiguous.

    Raises:
        TypeError: x, weight or bias is not a floating-point tensor, num_groups or eps is no number.
        ValueError: x has less than two dimensions, num_groups does not divide C, weight or bias
            does not have shape (C,), or lies on another device.

    Precision: mean, then the squares of what is left, products, dweight and dbias in float32
        (float64 for float64 inputs); every output is rounded once.
    Memory: x, weight, bias and 8 bytes a group live until the backward pass.
    Source: Wu and He, "Group Normalization", 2018.
    """
    op = "group_norm"
    check.floating(op, "x", x)
    if x.dim() < 2:
        check.fail(op, "x", "have at least two dimensions", f"shape {check.spell(x.shape)}")
    C = x.shape[1]
    whole = isinstance(num_groups, (int, torch.SymInt))
    check.number(op, "num_groups", num_groups, "be an integer", whole)
    if num_groups < 1 or C % num_groups:
        check.fail(op, "num_groups", f"divide {C}, the second size of `x`", num_groups)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            check.floating(op, name, t)
            check.shape(op, name, t, (C,), "the second size of `x`")
            check.device(op, name, t, x, "x")
    check.number(op, "eps", eps, "be a number", True)
    y = _group_norm(_channels_and_positions(x), weight, bias, num_groups, eps)
    return y.reshape(x.shape)
