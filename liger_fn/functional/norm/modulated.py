"""The kernels of modulated norms: each sample has a scale and a shift of its own.

    x̂ = (x − mean) · rstd, or x · rstd           y = x̂ · (offset + scale_b) + shift_b

    g  = dy · (offset + scale_b)                 dscale_b = Σ_tokens dy · x̂
    dx = rstd · (g − mean(g) − x̂ · mean(g · x̂))  dshift_b = Σ_tokens dy

A pointer that is None leaves its term out: `mean` the centring, `shift`, or a gradient that nobody
wants. Memory traffic in bytes per element of a 2-byte x: 4 forward (read x, write y), 6 backward
(read x and dy, write dx); the mean and `rstd` are kept. A program goes over the columns of a few
tokens more than once, out of the cache after the first time. Backward it walks a strip of one
sample's tokens and keeps its share of both sums in memory of its own, which stays in the cache; the
shares are added in a fixed order, without atomics.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.core.direct import launch
from liger_fn.functional.core.launch import (
    accumulator,
    cdiv,
    dense_like,
    has_work,
    next_power_of_2,
    sm_count,
    tl,
    triton,
    triton_dtype,
    unit_stride,
)
from liger_fn.functional.loss.divergence import batches
from liger_fn.functional.norm.blocks import (
    PER_SM,
    add_to_part,
    block_config,
    load_block,
    load_features,
    store_block,
)
from liger_fn.functional.norm.rows import strips_of


def reference_samples(
    x: Tensor, scale: Tensor, shift: Tensor | None, offset: float, eps: float, centred: bool
) -> Tensor:
    """The norm of x (..., T, D), modulated by scale and shift (..., D)."""
    h = x.to(accumulator(x.dtype))
    if centred:
        h = h - h.mean(-1, keepdim=True)
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    y = y * (scale.to(h.dtype) + offset)[..., None, :]
    if shift is not None:
        y = y + shift.to(h.dtype)[..., None, :]
    return y.to(x.dtype)


@triton.jit
def _centred_block(
    x_ptr, row, stride_t, in_t, start, D, mean, COMPUTE: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Load a block less the mean; beyond D it is zero, which adds nothing to a sum of squares."""
    x = load_block(x_ptr, row, stride_t, in_t, start, D, COMPUTE, BLOCK_D)
    in_d = (start + tl.arange(0, BLOCK_D) < D)[None, :]
    return tl.where(in_d, x - mean[:, None], 0.0)


@triton.jit(do_not_specialize=["T"])
def _modulated_fwd_kernel(
    x_ptr, scale_ptr, shift_ptr, y_ptr, mean_ptr, rstd_ptr,
    x_stride_b, x_stride_t, T, D,
    OFFSET: tl.constexpr, EPS: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_N)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_t = row < T
    x_ptr += b * x_stride_b
    y_ptr += b * T * D
    scale_ptr += b * D
    if shift_ptr is not None:
        shift_ptr += b * D

    mean = tl.zeros((BLOCK_N,), COMPUTE)
    if mean_ptr is not None:
        sums = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
        for start in range(0, D, BLOCK_D):
            sums += load_block(x_ptr, row, x_stride_t, in_t, start, D, COMPUTE, BLOCK_D)
        mean = tl.sum(sums, axis=1) / D
        tl.store(mean_ptr + b * T + row, mean, mask=in_t)
    squares = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    for start in range(0, D, BLOCK_D):
        h = _centred_block(x_ptr, row, x_stride_t, in_t, start, D, mean, COMPUTE, BLOCK_D)
        squares += h * h
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / D + EPS)
    tl.store(rstd_ptr + b * T + row, rstd, mask=in_t)

    for start in range(0, D, BLOCK_D):
        h = _centred_block(x_ptr, row, x_stride_t, in_t, start, D, mean, COMPUTE, BLOCK_D)
        y = h * rstd[:, None] * (load_features(scale_ptr, start, D, COMPUTE, BLOCK_D) + OFFSET)
        if shift_ptr is not None:
            y += load_features(shift_ptr, start, D, COMPUTE, BLOCK_D)
        store_block(y_ptr, row, D, in_t, start, D, y, BLOCK_D)


@triton.jit(do_not_specialize=["T", "strip", "strips"])
def _modulated_bwd_kernel(
    x_ptr, scale_ptr, mean_ptr, rstd_ptr, dy_ptr, dx_ptr, dscale_part_ptr, dshift_part_ptr,
    x_stride_b, x_stride_t, dy_stride_b, dy_stride_t, T, D, strip, strips,
    OFFSET: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    b, first = program // strips, (program % strips) * strip
    x_ptr += b * x_stride_b
    dy_ptr += b * dy_stride_b
    scale_ptr += b * D
    if dx_ptr is not None:
        dx_ptr += b * T * D
    if dscale_part_ptr is not None:
        dscale_part_ptr += program * D
    if dshift_part_ptr is not None:
        dshift_part_ptr += program * D

    for step in range(0, strip, BLOCK_N):
        at = step + tl.arange(0, BLOCK_N)
        row = first + at
        in_t = (row < T) & (at < strip)
        rstd = tl.load(rstd_ptr + b * T + row, mask=in_t, other=0.0)[:, None]
        mean = tl.zeros((BLOCK_N,), COMPUTE)
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + b * T + row, mask=in_t, other=0.0)

        dots = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
        sums = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
        if dx_ptr is not None:
            for start in range(0, D, BLOCK_D):
                h = _centred_block(x_ptr, row, x_stride_t, in_t, start, D, mean, COMPUTE, BLOCK_D)
                dy = load_block(dy_ptr, row, dy_stride_t, in_t, start, D, COMPUTE, BLOCK_D)
                g = dy * (load_features(scale_ptr, start, D, COMPUTE, BLOCK_D) + OFFSET)
                dots += g * (h * rstd)
                sums += g
        along = (tl.sum(dots, axis=1) / D)[:, None]
        level = (tl.sum(sums, axis=1) / D)[:, None]

        for start in range(0, D, BLOCK_D):
            h = _centred_block(x_ptr, row, x_stride_t, in_t, start, D, mean, COMPUTE, BLOCK_D)
            dy = load_block(dy_ptr, row, dy_stride_t, in_t, start, D, COMPUTE, BLOCK_D)
            xhat = h * rstd
            if dx_ptr is not None:
                g = dy * (load_features(scale_ptr, start, D, COMPUTE, BLOCK_D) + OFFSET)
                dx = g - xhat * along
                if mean_ptr is not None:
                    dx -= level
                store_block(dx_ptr, row, D, in_t, start, D, rstd * dx, BLOCK_D)
            if dscale_part_ptr is not None:
                share = tl.sum(dy * xhat, axis=0)
                add_to_part(dscale_part_ptr, step, start, D, share, BLOCK_D)
            if dshift_part_ptr is not None:
                add_to_part(dshift_part_ptr, step, start, D, tl.sum(dy, axis=0), BLOCK_D)
        tl.debug_barrier()


def _modulated_config(T: int, D: int) -> dict:
    """Blocks of no more tokens than a sample has: they share its scale."""
    config = block_config(D)
    return config | {"BLOCK_N": min(config["BLOCK_N"], next_power_of_2(T))}


def modulated_fwd(
    x: Tensor, scale: Tensor, shift: Tensor | None, offset: float, eps: float, centred: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Give y, the mean if rows are centred, and rstd."""
    y = dense_like(x)
    rstd = x.new_empty(x.shape[:-1], dtype=accumulator(x.dtype))
    mean = torch.empty_like(rstd) if centred else None

    if has_work(y):
        x = batches(x)
        B, T, D = x.shape
        config = _modulated_config(T, D)
        launch(
            _modulated_fwd_kernel, (B * cdiv(T, config["BLOCK_N"]),),
            x, unit_stride(scale), unit_stride(shift), y, mean, rstd,
            x.stride(0), x.stride(1), T, D,
            OFFSET=offset, EPS=eps, COMPUTE=triton_dtype(rstd.dtype), **config,
        )  # fmt: skip
    return y, mean, rstd


def modulated_bwd(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dy: Tensor,
    offset: float,
    need_dx: bool,
    need_dscale: bool,
    need_dshift: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Give dx, dscale and dshift, each if it is needed."""
    dx = dense_like(x) if need_dx else None
    like = [scale if need_dscale else None, shift if need_dshift else None]
    if not has_work(x):
        dscale, dshift = (None if t is None else dense_like(t).zero_() for t in like)
        return dx, dscale, dshift

    x, dy = batches(x), batches(dy)
    B, T, D = x.shape
    config = _modulated_config(T, D)
    strips, strip = strips_of(T, config["BLOCK_N"], cdiv(PER_SM * sm_count(x.device), B))
    parts = [None if t is None else x.new_empty((B, strips, D), dtype=rstd.dtype) for t in like]
    launch(
        _modulated_bwd_kernel, (B * strips,),
        x, unit_stride(scale), unit_stride(mean), unit_stride(rstd), dy, dx, *parts,
        x.stride(0), x.stride(1), dy.stride(0), dy.stride(1), T, D, strip, strips,
        OFFSET=offset, COMPUTE=triton_dtype(rstd.dtype), **config,
    )  # fmt: skip
    dscale, dshift = (
        None if t is None or p is None else p.sum(1).reshape(t.shape).to(t.dtype)
        for p, t in zip(parts, like, strict=True)
    )
    return dx, dscale, dshift


def samples_of(x: Tensor, scale: Tensor) -> Sequence[int]:
    """The sizes of x that scale has too: its other rows share a sample's scale."""
    sizes = list(scale.shape[:-1])
    if scale.dim() == x.dim():
        while sizes and sizes[-1] == 1:
            sizes.pop()
    return sizes


def by_sample(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """View x (*sizes, ..., D) as (*sizes, T, D)."""
    return x.reshape(*sizes, math.prod(x.shape[len(sizes) : -1]), x.shape[-1])


def check_modulation(op: str, x: Tensor, scale: Tensor, shift: Tensor | None) -> None:
    check.floating(op, "scale", scale)
    check.at_least_1d(op, "scale", scale)
    sizes = samples_of(x, scale)
    fits = list(x.shape[: len(sizes)]) == sizes and len(sizes) < x.dim()
    if not fits or scale.shape[-1] != x.shape[-1]:
        contract = (
            f"have the last size of `x`, {x.shape[-1]}, after the first sizes of `x`, "
            f"{check.spell(x.shape[:-1])}, or some of them"
        )
        check.fail(op, "scale", contract, f"shape {check.spell(scale.shape)}")
    check.device(op, "scale", scale, x, "x")
    if shift is not None:
        check.floating(op, "shift", shift)
        check.shape(op, "shift", shift, scale.shape, "the shape of `scale`")
        check.device(op, "shift", shift, x, "x")
