"""The nearest distribution to a row: a softmax that gives exact zeros.

    y  = max(x − τ, 0)                               τ such that Σ y = 1
    dx = dy − mean of dy over {y > 0} where y > 0, and 0 elsewhere

τ is found without sorting, by Newton's method on Σ max(x − τ, 0) − 1, which is convex and piecewise
linear: from τ = max x − 1 on, let τ be the one that is right for the elements above it, until these
become no fewer. That takes a handful of sums over a row in registers.

Memory traffic in bytes per element of a 2-byte x: 4 forward (read x, write y), 6 backward (read y
and dy, write dx); y is kept. Rows too wide for registers are read again for each step, from the
caches.
"""

import torch
from torch import Tensor

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
    tl,
    triton,
    triton_dtype,
)


def reference(x: Tensor, dim: int = -1) -> Tensor:
    return _reference(x.movedim(dim, -1)).movedim(-1, dim)


def _reference(x: Tensor) -> Tensor:
    z = x.to(accumulator(x.dtype))
    z = z - z.detach().amax(-1, keepdim=True)
    highest = z.detach().sort(-1, descending=True).values
    rank = torch.arange(1, z.shape[-1] + 1, device=z.device)
    size = (1 + rank * highest > highest.cumsum(-1)).sum(-1, keepdim=True)
    smallest = highest.gather(-1, (size - 1).clamp(min=0))
    outside = z.detach() < smallest
    tau = (z.masked_fill(outside, 0.0).sum(-1, keepdim=True) - 1) / size
    return (z - tau).masked_fill(outside, 0.0).to(x.dtype)


# A row of at most this many elements stays in registers.
_WIDEST = 16384


@triton.jit
def _positive(gap, LEAST: tl.constexpr):
    """Give 0 outside the support, and inside no less than LEAST."""
    return tl.where(gap <= 0.0, 0.0, tl.where(gap < LEAST, LEAST, gap))


@triton.jit
def _threshold(total, size):
    """Give (total − 1) / size, exactly where float32 has that number.

    Numbers of 2 bytes lie on a grid, and one in twenty-five rows of theirs has an element at τ
    itself. It is outside, which `/` would not always see: of float32 it is not exact on a GPU. By a
    step of Newton's and not by `div_rn`, which takes registers for a subroutine.
    """
    total, size = total - 1.0, size.to(total.dtype)
    over = 1.0 / size
    tau = total * over
    return tl.fma(tl.fma(-tau, size, total), over, tau)


@triton.jit
def _sparsemax_fwd_kernel(
    x_ptr, y_ptr, x_stride_n, N, D,
    LEAST: tl.constexpr, CAUSAL: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_D)
    in_d = (col < D)[None, :]
    inside = (row < N)[:, None] & in_d
    if CAUSAL:
        in_d &= col[None, :] <= (row % D)[:, None]
    x = tl.load(x_ptr + row[:, None] * x_stride_n + col[None, :], mask=inside & in_d, other=0.0)
    x = tl.where(in_d, x.to(COMPUTE), float("-inf"))

    # Relative to the maximum, so that what all have in common costs no digits.
    z = tl.where(in_d, x - tl.max(x, axis=1)[:, None], float("-inf"))
    broken = tl.max((z != z).to(tl.int32), axis=1) > 0
    tau = tl.full((BLOCK_N,), -1.0, COMPUTE)
    size = tl.full((BLOCK_N,), BLOCK_D + 1, tl.int32)
    changed = 1
    while changed > 0:
        above = z > tau[:, None]
        fewer = tl.sum(above.to(tl.int32), axis=1)
        total = tl.sum(tl.where(above, z, 0.0), axis=1)
        shrank = fewer < size
        # A row whose answer is found keeps it, whatever its neighbours still have to do.
        tau = tl.where(shrank, _threshold(total, fewer), tau)
        size = tl.where(shrank, fewer, size)
        changed = tl.max(shrank.to(tl.int32), axis=0)
    gap = z - tl.where(broken, float("nan"), tau)[:, None]

    tl.store(y_ptr + row[:, None] * D + col[None, :], _positive(gap, LEAST), mask=inside)


@triton.jit
def _sparsemax_fwd_wide_kernel(
    x_ptr, y_ptr, x_stride_n, D,
    LEAST: tl.constexpr, CAUSAL: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    width = (row % D).to(tl.int32) + 1 if CAUSAL else D
    x_ptr += row * x_stride_n
    highest = tl.full((BLOCK_D,), float("-inf"), COMPUTE)
    broken = tl.zeros((BLOCK_D,), tl.int32)
    for start in range(0, width, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + col, mask=col < width, other=float("-inf")).to(COMPUTE)
        broken |= (x != x).to(tl.int32)
        highest = tl.maximum(highest, x)
    top = tl.max(highest, axis=0)
    broken_row = (tl.max(broken, axis=0) > 0) | (tl.abs(top) == float("inf"))

    tau = tl.full((), -1.0, COMPUTE)
    size = tl.full((), 0, tl.int32) + D + 1
    changed = 1
    while changed > 0:
        count = tl.zeros((BLOCK_D,), tl.int32)
        total = tl.zeros((BLOCK_D,), COMPUTE)
        for start in range(0, width, BLOCK_D):
            col = start + tl.arange(0, BLOCK_D)
            x = tl.load(x_ptr + col, mask=col < width, other=float("-inf")).to(COMPUTE)
            z = tl.where(broken_row, 0.0, x - top)
            above = z > tau
            count += above.to(tl.int32)
            total += tl.where(above, z, 0.0)
        fewer = tl.sum(count, axis=0)
        shrank = fewer < size
        tau = tl.where(shrank, _threshold(tl.sum(total, axis=0), fewer), tau)
        size = tl.where(shrank, fewer, size)
        changed = shrank.to(tl.int32)

    tau = tl.where(broken_row, float("nan"), tau)
    for start in range(0, D, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + col, mask=col < width, other=float("-inf")).to(COMPUTE)
        gap = (x - top) - tau
        tl.store(y_ptr + row * D + col, _positive(gap, LEAST), mask=col < D)


@triton.jit
def _sparsemax_bwd_kernel(
    y_ptr, dy_ptr, dx_ptr, y_stride_n, dy_stride_n, N, D,
    COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_D)
    inside = (row < N)[:, None] & (col < D)[None, :]
    y = tl.load(y_ptr + row[:, None] * y_stride_n + col[None, :], mask=inside, other=0.0)
    dy = tl.load(dy_ptr + row[:, None] * dy_stride_n + col[None, :], mask=inside, other=0.0)
    dy = dy.to(COMPUTE)

    support = y.to(COMPUTE) > 0.0
    size = tl.maximum(tl.sum(support.to(tl.int32), axis=1), 1).to(COMPUTE)
    mean = tl.sum(tl.where(support, dy, 0.0), axis=1) / size

    dx = tl.where(support, dy - mean[:, None], 0.0)
    tl.store(dx_ptr + row[:, None] * D + col[None, :], dx, mask=inside)


@triton.jit
def _sparsemax_bwd_wide_kernel(
    y_ptr, dy_ptr, dx_ptr, y_stride_n, dy_stride_n, D,
    COMPUTE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    count = tl.zeros((BLOCK_D,), tl.int32)
    total = tl.zeros((BLOCK_D,), COMPUTE)
    for start in range(0, D, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        y = tl.load(y_ptr + row * y_stride_n + col, mask=col < D, other=0.0).to(COMPUTE)
        dy = tl.load(dy_ptr + row * dy_stride_n + col, mask=col < D, other=0.0).to(COMPUTE)
        count += (y > 0.0).to(tl.int32)
        total += tl.where(y > 0.0, dy, 0.0)

    mean = tl.sum(total, axis=0) / tl.maximum(tl.sum(count, axis=0), 1).to(COMPUTE)

    for start in range(0, D, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        y = tl.load(y_ptr + row * y_stride_n + col, mask=col < D, other=0.0).to(COMPUTE)
        dy = tl.load(dy_ptr + row * dy_stride_n + col, mask=col < D, other=0.0).to(COMPUTE)
        tl.store(dx_ptr + row * D + col, tl.where(y > 0.0, dy - mean, 0.0), mask=col < D)


def _sparsemax_config(D: int) -> dict:
    """About 4096 elements a program, 32 a thread: four 16-byte loads are in flight."""
    if D > _WIDEST:
        return {"BLOCK_D": 8192, "num_warps": 16}
    block_d = next_power_of_2(D)
    block_n = min(32, max(1, 4096 // block_d))
    return {"BLOCK_D": block_d, "BLOCK_N": block_n, "num_warps": max(4, block_d // 1024)}


def _least(dtype: torch.dtype) -> float:
    """The least positive float16: rounded to 0, an element would leave the support.

    The other dtypes have numbers far smaller than any two of x are apart.
    """
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * (dtype is torch.float16)


def sparsemax_fwd(x: Tensor) -> tuple[Tensor]:
    return _forward(x, causal=False)


def causal_sparsemax_fwd(x: Tensor) -> tuple[Tensor]:
    """The same of square x (..., D, D), of which row i sees columns 0 to i."""
    return _forward(x, causal=True)


def _forward(x: Tensor, causal: bool) -> tuple[Tensor]:
    y = dense_like(x)

    if has_work(y):
        x = as_rows(x)
        N, D = x.shape
        options = {"COMPUTE": triton_dtype(accumulator(x.dtype)), **_sparsemax_config(D)}
        options["LEAST"] = _least(x.dtype)
        if D > _WIDEST:
            launch(
                _sparsemax_fwd_wide_kernel, (N,),
                x, y, x.stride(0), D, CAUSAL=causal, **options,
            )  # fmt: skip
        else:
            grid = (cdiv(N, options["BLOCK_N"]),)
            launch(
                _sparsemax_fwd_kernel, grid,
                x, y, x.stride(0), N, D, CAUSAL=causal, **options,
            )  # fmt: skip
    return (y,)


def sparsemax_bwd(x: Tensor, y: Tensor, dy: Tensor) -> tuple[Tensor]:
    dx = dense_like(x)

    if has_work(dx):
        y, dy = as_rows(y), as_rows(dy)
        N, D = y.shape
        options = {"COMPUTE": triton_dtype(accumulator(y.dtype)), **_sparsemax_config(D)}
        if D > _WIDEST:
            launch(
                _sparsemax_bwd_wide_kernel, (N,),
                y, dy, dx, y.stride(0), dy.stride(0), D, **options,
            )  # fmt: skip
        else:
            launch(
                _sparsemax_bwd_kernel, (cdiv(N, options["BLOCK_N"]),),
                y, dy, dx, y.stride(0), dy.stride(0), N, D, **options,
            )  # fmt: skip
    return (dx,)


_sparsemax = custom_vjp(
    "sparsemax",
    reference=_reference,
    fwd=sparsemax_fwd,
    bwd=sparsemax_bwd,
    results="y",
    grads="x",
    rows="x y",
)


def sparsemax(x: Tensor, dim: int = -1) -> Tensor:
    """Project onto distributions: like softmax, but with exact zeros.

        y = argmin over distributions p of ‖p − x‖² = max(x − τ, 0), Σ y = 1

    Args:
        x: floating point, any shape and strides, at least one element along dim.
        dim: the dimension that is a distribution; the last is read without a copy.

    Returns:
        The shape and dtype of x.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: x is a scalar, or has nothing along dim; dim is no dimension of x.

    Precision: computed in float32 (float64 for float64 x); every output is rounded once,
        in float16 to no less than 2⁻²⁴ inside the support, of which the gradient learns from y. A
        row with NaN, with +∞ or of nothing but −∞ is NaN, as in softmax.
    Memory: x and y live until the backward pass.
    Source: Martins and Astudillo, "From Softmax to Sparsemax", 2016; Michelot, "A Finite Algorithm
        for Finding the Projection of a Point onto the Canonical Simplex of Rⁿ", 1986.
    """
    check.floating("sparsemax", "x", x)
    check.at_least_1d("sparsemax", "x", x)
    if not -x.dim() <= dim < x.dim():
        check.fail("sparsemax", "dim", f"be between {-x.dim()} and {x.dim() - 1}", dim)
    if x.shape[dim] == 0:
        check.fail("sparsemax", "x", "have at least one element along `dim`", "none")
    return _sparsemax(x.movedim(dim, -1)).movedim(-1, dim)
