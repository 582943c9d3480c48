"""RMSNorm over the last dimension, statistics in float32.

    x̂ = x · rstd          rstd = 1 / √(mean(x²) + ε)          y = x̂ · (offset + weight)

    g  = dy · (offset + weight)
    dx = rstd · (g − x̂ · mean(g · x̂))                         dweight = Σ_rows dy · x̂

Memory traffic in bytes per element of a 2-byte x: 4 forward (read x, write y), 6 backward (read x
and dy, write dx); `rstd`, 4 bytes a row, is kept. The backward pass is one persistent launch, each
program walking a strip of rows with its share of dweight in registers, and one small launch that
adds the shares in a fixed order.
"""

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.launch import (
    accumulator,
    as_rows,
    cdiv,
    has_work,
    next_power_of_2,
    sm_count,
    tl,
    triton,
    triton_dtype,
    unit_stride,
)


def reference(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    cast_before_weight: bool = False,
) -> Tensor:
    h = x.to(accumulator(x.dtype))
    xhat = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if cast_before_weight:
        xhat = xhat.to(x.dtype).to(h.dtype)
    y = xhat if weight is None else xhat * (weight.to(h.dtype) + offset)
    return y.to(x.dtype)


# A row of at most this many elements stays in registers between the reduction and its use.
_WIDEST_FWD = 16384
_WIDEST_BWD = 8192


@triton.jit
def _scale(
    xhat,
    weight_ptr,
    col,
    in_d,
    OFFSET: tl.constexpr,
    DTYPE: tl.constexpr,
    CAST: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    if CAST:
        xhat = xhat.to(DTYPE).to(xhat.dtype)
    if HAS_WEIGHT:
        xhat *= (tl.load(weight_ptr + col, mask=in_d, other=0.0).to(xhat.dtype) + OFFSET)[None, :]
    return xhat


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr, weight_ptr, y_ptr, rstd_ptr, x_stride_n, N, D,
    EPS: tl.constexpr, OFFSET: tl.constexpr, CAST: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_D)
    in_n, in_d = row < N, col < D
    inside = in_n[:, None] & in_d[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride_n + col[None, :], mask=inside, other=0.0).to(
        COMPUTE
    )

    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + EPS)
    y = _scale(
        x * rstd[:, None], weight_ptr, col, in_d, OFFSET, y_ptr.dtype.element_ty, CAST, HAS_WEIGHT
    )

    tl.store(y_ptr + row[:, None] * D + col[None, :], y, mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=in_n)


@triton.jit
def _rms_norm_fwd_wide_kernel(
    x_ptr, weight_ptr, y_ptr, rstd_ptr, x_stride_n, D,
    EPS: tl.constexpr, OFFSET: tl.constexpr, CAST: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((1, BLOCK_D), COMPUTE)
    for start in range(0, D, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + row * x_stride_n + col, mask=col < D, other=0.0).to(COMPUTE)[None, :]
        squares += x * x

    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / D + EPS)
    tl.store(rstd_ptr + row + tl.arange(0, 1), rstd)

    for start in range(0, D, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + row * x_stride_n + col, mask=col < D, other=0.0).to(COMPUTE)[None, :]
        y = _scale(
            x * rstd[:, None],
            weight_ptr,
            col,
            col < D,
            OFFSET,
            y_ptr.dtype.element_ty,
            CAST,
            HAS_WEIGHT,
        )
        tl.store(y_ptr + row * D + col[None, :], y, mask=(col < D)[None, :])


def _rms_norm_fwd_config(D: int) -> dict:
    """About 4096 elements a program: each thread of four warps has four 16-byte loads in flight."""
    if D > _WIDEST_FWD:
        return {"BLOCK_D": 8192, "num_warps": 16}
    block_d = next_power_of_2(D)
    block_n = max(1, 4096 // block_d)
    return {"BLOCK_D": block_d, "BLOCK_N": min(block_n, 32), "num_warps": max(4, block_d // 1024)}


def rms_norm_fwd(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, cast_before_weight: bool
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape)
    rstd = x.new_empty(x.shape[:-1], dtype=accumulator(x.dtype))

    if has_work(y):
        rows, weight = as_rows(x), unit_stride(weight)
        N, D = rows.shape
        options = {
            "EPS": eps,
            "OFFSET": offset,
            "CAST": cast_before_weight,
            "HAS_WEIGHT": weight is not None,
            "COMPUTE": triton_dtype(rstd.dtype),
            **_rms_norm_fwd_config(D),
        }
        if D > _WIDEST_FWD:
            _rms_norm_fwd_wide_kernel[(N,)](rows, weight, y, rstd, rows.stride(0), D, **options)
        else:
            _rms_norm_fwd_kernel[(cdiv(N, options["BLOCK_N"]),)](
                rows, weight, y, rstd, rows.stride(0), N, D, **options
            )
    return y, rstd


@triton.jit
def _rms_norm_bwd_kernel(
    x_ptr, weight_ptr, rstd_ptr, dy_ptr, dx_ptr, part_ptr,
    x_stride_n, dy_stride_n, N, D, strip,
    OFFSET: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_DWEIGHT: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_D)
    in_d = col < D
    scale = tl.full((BLOCK_D,), 1.0, COMPUTE)
    if HAS_WEIGHT:
        scale = tl.load(weight_ptr + col, mask=in_d, other=0.0).to(COMPUTE) + OFFSET
    dweight = tl.zeros((BLOCK_D,), COMPUTE)

    for step in range(0, strip, BLOCK_N):
        row = program * strip + step + tl.arange(0, BLOCK_N)
        in_n = (row < N) & (step + tl.arange(0, BLOCK_N) < strip)
        inside = in_n[:, None] & in_d[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride_n + col[None, :], mask=inside, other=0.0).to(
            COMPUTE
        )
        dy = tl.load(dy_ptr + row[:, None] * dy_stride_n + col[None, :], mask=inside, other=0.0).to(
            COMPUTE
        )
        rstd = tl.load(rstd_ptr + row, mask=in_n, other=0.0)[:, None]

        xhat = x * rstd
        if NEED_DX:
            g = dy * scale[None, :]
            dx = rstd * (g - xhat * (tl.sum(g * xhat, axis=1) / D)[:, None])
            tl.store(dx_ptr + row[:, None] * D + col[None, :], dx, mask=inside)
        if NEED_DWEIGHT:
            dweight += tl.sum(dy * xhat, axis=0)

    if NEED_DWEIGHT:
        tl.store(part_ptr + program * D + col, dweight, mask=in_d)


@triton.jit
def _rms_norm_bwd_wide_dx_kernel(
    x_ptr, weight_ptr, rstd_ptr, dy_ptr, dx_ptr, x_stride_n, dy_stride_n, D,
    OFFSET: tl.constexpr, HAS_WEIGHT: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_ptr + row)
    dots = tl.zeros((BLOCK_D,), COMPUTE)
    for start in range(0, D, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + row * x_stride_n + col, mask=col < D, other=0.0).to(COMPUTE)
        g = tl.load(dy_ptr + row * dy_stride_n + col, mask=col < D, other=0.0).to(COMPUTE)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + col, mask=col < D, other=0.0).to(COMPUTE) + OFFSET
        dots += g * x * rstd

    mean = tl.sum(dots, axis=0) / D

    for start in range(0, D, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + row * x_stride_n + col, mask=col < D, other=0.0).to(COMPUTE)
        g = tl.load(dy_ptr + row * dy_stride_n + col, mask=col < D, other=0.0).to(COMPUTE)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + col, mask=col < D, other=0.0).to(COMPUTE) + OFFSET
        tl.store(dx_ptr + row * D + col, rstd * (g - x * rstd * mean), mask=col < D)


@triton.jit
def _rms_norm_bwd_wide_dweight_kernel(
    x_ptr, rstd_ptr, dy_ptr, part_ptr, x_stride_n, dy_stride_n, N, D, strip,
    COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(1).to(tl.int64)
    col = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = col < D
    dweight = tl.zeros((BLOCK_D,), COMPUTE)

    for step in range(0, strip, BLOCK_N):
        row = program * strip + step + tl.arange(0, BLOCK_N)
        in_n = (row < N) & (step + tl.arange(0, BLOCK_N) < strip)
        inside = in_n[:, None] & in_d[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride_n + col[None, :], mask=inside, other=0.0).to(
            COMPUTE
        )
        dy = tl.load(dy_ptr + row[:, None] * dy_stride_n + col[None, :], mask=inside, other=0.0).to(
            COMPUTE
        )
        rstd = tl.load(rstd_ptr + row, mask=in_n, other=0.0)[:, None]
        dweight += tl.sum(dy * x * rstd, axis=0)

    tl.store(part_ptr + program * D + col, dweight, mask=in_d)


@triton.jit
def _sum_parts_kernel(
    part_ptr, out_ptr, P, D, COMPUTE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    col = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_P, BLOCK_D), part_ptr.dtype.element_ty)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < P)[:, None] & (col < D)[None, :]
        total += tl.load(
            part_ptr + p[:, None].to(tl.int64) * D + col[None, :], mask=inside, other=0.0
        )

    # By way of float32: Triton's interpreter cannot round float64 to bfloat16.
    tl.store(out_ptr + col, tl.sum(total, axis=0).to(COMPUTE), mask=col < D)


def _sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Add parts (P, D) in a fixed order and round once."""
    P, D = parts.shape
    out = parts.new_empty(D, dtype=dtype)
    compute = triton_dtype(accumulator(dtype))
    _sum_parts_kernel[(cdiv(D, 32),)](
        parts, out, P, D, COMPUTE=compute, BLOCK_P=64, BLOCK_D=32, num_warps=4
    )
    return out


def _rms_norm_bwd_config(D: int) -> dict:
    """Tiles of about 2048 elements: four tensors of this size are live in registers at once."""
    block_d = next_power_of_2(D)
    block_n = min(32, max(1, 2048 // block_d))
    return {"BLOCK_D": block_d, "BLOCK_N": block_n, "num_warps": min(16, max(4, block_d // 512))}


def _rms_norm_bwd_programs(N: int, D: int, sms: int) -> int:
    """Persistent programs: enough to hide latency, few enough that the parts stay small."""
    per_sm = 16 if D <= 256 else 8 if D <= 1024 else 4 if D <= 2048 else 2 if D <= 4096 else 1
    return max(1, min(N, sms * per_sm))


def rms_norm_bwd(
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dy: Tensor,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    dx = x.new_empty(x.shape) if need_dx else None
    if not has_work(x):
        return dx, torch.zeros_like(weight) if need_dweight else None

    x, dy, weight, rstd = as_rows(x), as_rows(dy), unit_stride(weight), unit_stride(rstd)
    N, D = x.shape
    programs = _rms_norm_bwd_programs(N, D, sm_count(x.device))
    strip = cdiv(N, programs)
    programs = cdiv(N, strip)
    parts = x.new_empty((programs, D), dtype=rstd.dtype) if need_dweight else None
    strides, compute = (x.stride(0), dy.stride(0)), triton_dtype(rstd.dtype)

    if D <= _WIDEST_BWD:
        _rms_norm_bwd_kernel[(programs,)](
            x, weight, rstd, dy, dx, parts, *strides, N, D, strip,
            OFFSET=offset, HAS_WEIGHT=weight is not None,
            NEED_DX=need_dx, NEED_DWEIGHT=need_dweight, COMPUTE=compute, **_rms_norm_bwd_config(D),
        )  # fmt: skip
    else:
        if need_dx:
            _rms_norm_bwd_wide_dx_kernel[(N,)](
                x, weight, rstd, dy, dx, *strides, D, OFFSET=offset,
                HAS_WEIGHT=weight is not None, COMPUTE=compute, BLOCK_D=4096, num_warps=8,
            )  # fmt: skip
        if need_dweight:
            _rms_norm_bwd_wide_dweight_kernel[(cdiv(D, 256), programs)](
                x, rstd, dy, parts, *strides, N, D, strip,
                COMPUTE=compute, BLOCK_N=8, BLOCK_D=256, num_warps=4,
            )  # fmt: skip
    return dx, _sum_parts(parts, weight.dtype) if need_dweight else None


_rms_norm = custom_vjp(
    "rms_norm",
    reference=reference,
    fwd=rms_norm_fwd,
    bwd=rms_norm_bwd,
    results="y",
    residuals="rstd",
    grads="x weight",
    rows="x y rstd",
)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    cast_before_weight: bool = False,
) -> Tensor:
    """Normalise the last dimension by its root mean square.

        y = x / √(mean(x²) + eps) · (offset + weight)

    Args:
        x: (..., D), floating point, any strides.
        weight: (D,), floating point, may be of another dtype than x; None: no weight, and no
            offset.
        eps: added to the mean square.
        offset: added to the weight in float32: 1 is Gemma's convention, 0 everybody else's.
        cast_before_weight: round the normalised value to x.dtype before the weight multiplies it,
            as Hugging Face's LlamaRMSNorm does; False multiplies in float32 and rounds once, as
            OLMo-2, Gemma and torch.nn.RMSNorm do.

    Returns:
        (..., D), dtype of x, contiguous.

    Raises:
        TypeError: x or weight is not a floating-point tensor, eps or offset is no number.
        ValueError: weight does not have shape (D,), or lies on another device.

    Precision: statistics, products and dweight in float32 (float64 for float64 inputs); every
        output is rounded once (twice in y with `cast_before_weight`).
    Memory: x, weight and 4 bytes a row live until the backward pass.
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    check.floating("rms_norm", "x", x)
    check.at_least_1d("rms_norm", "x", x)
    if weight is not None:
        check.floating("rms_norm", "weight", weight)
        check.shape("rms_norm", "weight", weight, x.shape[-1:], "the last size of `x`")
        check.device("rms_norm", "weight", weight, x, "x")
    check.number("rms_norm", "eps", eps, "be a number", True)
    check.number("rms_norm", "offset", offset, "be a number", True)
    return _rms_norm(x, weight, eps, offset, cast_before_weight)
