"""Dynamic tanh: a layer in the place of a norm, without statistics.

    t  = tanh(α · x)                      y = t · weight + bias

    g  = dy · weight · (1 − t²)           dweight = Σ_rows dy · t          dα = Σ g · x
    dx = α · g                            dbias   = Σ_rows dy

Memory traffic in bytes per element of a 2-byte x: 4 forward (read x, write y), 6 backward (read x
and dy, write dx); x is kept. Backward each program walks a strip of rows in a few columns with the
sums of these in registers; what the strips give is added in a fixed order.
"""

import torch
from torch import Tensor

from liger_fn.functional.activation.glu import tile
from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.direct import launch
from liger_fn.functional.core.launch import (
    accumulator,
    as_rows,
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
from liger_fn.functional.loss.cross_entropy import tanh_of
from liger_fn.functional.norm.rows import add_parts, add_parts_config, strips_of


def reference(
    x: Tensor, alpha: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    compute = accumulator(x.dtype)
    y = torch.tanh(alpha.to(compute) * x.to(compute))
    if weight is not None:
        y = y * weight.to(compute)
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(x.dtype)


@triton.jit
def _tanh(x, FAST: tl.constexpr):
    """Give tanh(x); FAST to some 17 bits: enough for what is rounded to two bytes."""
    if FAST:
        # The square root of 2/(1 + exp 2|x|): one instruction, where a division takes six.
        root = tl.math.rsqrt(0.5 + 0.5 * tl.exp2(2.885390081777926814720 * tl.abs(x)))
        far = 1.0 - root * root
        # Near zero that cancels, and the series is short.
        near = x * (1.0 - 0.3333333333333333333 * (x * x))
        t = tl.where(tl.abs(x) < 0.05, near, tl.where(x < 0, -far, far))
    else:
        t = tanh_of(x)
    return t


@triton.jit
def _dyt_fwd_kernel(
    x_ptr, alpha_ptr, weight_ptr, bias_ptr, y_ptr, x_stride_n, N, D,
    COMPUTE: tl.constexpr, FAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, col, inside = tile(N, D, BLOCK_N, BLOCK_D)
    x = tl.load(x_ptr + row * x_stride_n + col, mask=inside, other=0.0).to(COMPUTE)

    y = _tanh(tl.load(alpha_ptr).to(COMPUTE) * x, FAST)
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + col, mask=col < D, other=0.0).to(COMPUTE)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + col, mask=col < D, other=0.0).to(COMPUTE)

    tl.store(y_ptr + row * D + col, y, mask=inside)


@triton.jit(do_not_specialize=["N", "strip"])
def _dyt_bwd_kernel(
    x_ptr, alpha_ptr, weight_ptr, dy_ptr, dx_ptr,
    dalpha_part_ptr, dweight_part_ptr, dbias_part_ptr,
    x_stride_n, dy_stride_n, N, D, strip,
    COMPUTE: tl.constexpr, FAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(1).to(tl.int64)
    col = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = col < D
    alpha = tl.load(alpha_ptr).to(COMPUTE)
    weight = tl.full((BLOCK_D,), 1.0, COMPUTE)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + col, mask=in_d, other=0.0).to(COMPUTE)
    # What no pointer asks for, the compiler leaves out.
    dalpha = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    dweight = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    dbias = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)

    for step in tl.range(0, strip, BLOCK_N, num_stages=STAGES):
        at = step + tl.arange(0, BLOCK_N)
        row = program * strip + at
        inside = ((row < N) & (at < strip))[:, None] & in_d[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride_n + col[None, :], mask=inside, other=0.0)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride_n + col[None, :], mask=inside, other=0.0)
        x, dy = x.to(COMPUTE), dy.to(COMPUTE)

        t = _tanh(alpha * x, FAST)
        g = dy * weight[None, :] * (1.0 - t * t)
        dalpha += g * x
        dweight += dy * t
        dbias += dy

        if dx_ptr is not None:
            tl.store(dx_ptr + row[:, None] * D + col[None, :], alpha * g, mask=inside)

    if dalpha_part_ptr is not None:
        part = dalpha_part_ptr + program * tl.num_programs(0) + tl.program_id(0)
        tl.store(part, tl.sum(tl.sum(dalpha, axis=0), axis=0))
    if dweight_part_ptr is not None:
        tl.store(dweight_part_ptr + program * D + col, tl.sum(dweight, axis=0), mask=in_d)
    if dbias_part_ptr is not None:
        tl.store(dbias_part_ptr + program * D + col, tl.sum(dbias, axis=0), mask=in_d)


@triton.jit
def _add_any_parts(part_ptr, out_ptr, P, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    if part_ptr is not None:
        add_parts(part_ptr, out_ptr, P, D, BLOCK_P, BLOCK_D)


@triton.jit(do_not_specialize=["P", "tiles"])
def _dyt_sums_kernel(
    dalpha_part_ptr, dalpha_ptr, dweight_part_ptr, dweight_ptr, dbias_part_ptr, dbias_ptr,
    P, tiles, D,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(1)
    if which == 0:
        _add_any_parts(dweight_part_ptr, dweight_ptr, P, D, BLOCK_P, BLOCK_D)
    elif which == 1:
        _add_any_parts(dbias_part_ptr, dbias_ptr, P, D, BLOCK_P, BLOCK_D)
    elif tl.program_id(0) == 0:
        # One column, and as many parts as the backward pass had programs: most of them at once.
        _add_any_parts(dalpha_part_ptr, dalpha_ptr, P * tiles, 1, 1024, 1)


def _dyt_fwd_config(D: int, itemsize: int) -> dict:
    """8 KiB for four warps: four 16-byte loads a thread, of rows that share weight and bias."""
    block_d = min(1024, next_power_of_2(D))
    return {"BLOCK_D": block_d, "BLOCK_N": 8192 // itemsize // block_d, "num_warps": 4}


def _dyt_bwd_config(D: int) -> dict:
    """Lines of 512 bytes and more, and eight numbers a thread beside three sums of as many.

    A multiprocessor has registers for six such programs, and two steps ahead they have 48 KiB on
    their way: a seventh would wait until the others have walked all of their strips.
    """
    block_d = min(256, next_power_of_2(D))
    return {"BLOCK_D": block_d, "BLOCK_N": 1024 // block_d, "STAGES": 3, "num_warps": 4}


def dyt_fwd(x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor]:
    y = dense_like(x)

    if has_work(y):
        x, weight, bias = as_rows(x), unit_stride(weight), unit_stride(bias)
        N, D = x.shape
        config = _dyt_fwd_config(D, x.element_size())
        launch(
            _dyt_fwd_kernel, (cdiv(N, config["BLOCK_N"]) * cdiv(D, config["BLOCK_D"]),),
            x, alpha, weight, bias, y, x.stride(0), N, D,
            COMPUTE=triton_dtype(accumulator(x.dtype)), FAST=x.element_size() == 2, **config,
        )  # fmt: skip
    return (y,)


def dyt_bwd(
    x: Tensor,
    alpha: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dy: Tensor,
    need_dx: bool,
    need_dalpha: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    dx = dense_like(x) if need_dx else None
    like = [
        t if need else None
        for t, need in ((alpha, need_dalpha), (weight, need_dweight), (bias, need_dbias))
    ]
    if not has_work(x):
        dalpha, dweight, dbias = (None if t is None else dense_like(t).zero_() for t in like)
        return dx, dalpha, dweight, dbias

    x, dy, weight = as_rows(x), as_rows(dy), unit_stride(weight)
    N, D = x.shape
    config = _dyt_bwd_config(D)
    tiles, compute = cdiv(D, config["BLOCK_D"]), accumulator(x.dtype)
    programs, strip = strips_of(N, config["BLOCK_N"], max(1, 6 * sm_count(x.device) // tiles))
    widths = (tiles, D, D)
    parts = [
        None if t is None else x.new_empty((programs, width), dtype=compute)
        for t, width in zip(like, widths, strict=True)
    ]
    launch(
        _dyt_bwd_kernel, (tiles, programs),
        x, alpha, weight, dy, dx, *parts, x.stride(0), dy.stride(0), N, D, strip,
        COMPUTE=triton_dtype(compute), FAST=x.element_size() == 2, **config,
    )  # fmt: skip
    sums = [None if t is None else dense_like(t) for t in like]
    if any(t is not None for t in sums):
        adding = add_parts_config(D)
        pairs = [t for pair in zip(parts, sums, strict=True) for t in pair]
        launch(
            _dyt_sums_kernel, (cdiv(D, adding["BLOCK_D"]), 3),
            *pairs, programs, tiles, D, **adding,
        )  # fmt: skip
    dalpha, dweight, dbias = sums
    return dx, dalpha, dweight, dbias


_dyt = custom_vjp(
    "dyt",
    reference=reference,
    fwd=dyt_fwd,
    bwd=dyt_bwd,
    results="y",
    grads="x alpha weight bias",
    rows="x y",
)


def dyt(
    x: Tensor, alpha: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Squash by a tanh of learned slope, then scale and shift the last dimension.

        y = tanh(alpha · x) · weight + bias

    Args:
        x: (..., D), floating point, any strides.
        alpha: one element, () or (1,), floating point.
        weight: (D,), floating point, may be of another dtype than x; None: 1.
        bias: (D,), floating point, may be of another dtype than x; None: 0.

    Returns:
        (..., D), dtype of x, contiguous.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: alpha has more than one element, weight or bias does not have shape (D,), or one
            of them lies on another device.

    Precision: computed in float32 (float64 for float64 x), as are the sums dalpha, dweight and
        dbias; every output is rounded once. Where x has two bytes, the tanh is exact to some 17
        bits.
    Memory: x, alpha, weight and bias live until the backward pass, nothing else.
    Source: Zhu et al., "Transformers without Normalization", 2025.
    """
    check.floating("dyt", "x", x)
    check.at_least_1d("dyt", "x", x)
    check.floating("dyt", "alpha", alpha)
    if alpha.numel() != 1 or alpha.dim() > 1:
        check.fail("dyt", "alpha", "have shape () or (1,)", check.spell(alpha.shape))
    check.device("dyt", "alpha", alpha, x, "x")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            check.floating("dyt", name, t)
            check.shape("dyt", name, t, x.shape[-1:], "the last size of `x`")
            check.device("dyt", name, t, x, "x")
    return _dyt(x, alpha, weight, bias)
