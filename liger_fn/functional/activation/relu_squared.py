"""The square of the positive part.

    y  = relu(x)²
    dx = dy · 2 · relu(x)

Memory traffic in bytes per element of a 2-byte x: 4 forward (read x, write y), 6 backward (read x
and dy, write dx); x is kept.
"""

import torch
from torch import Tensor

from liger_fn.functional.activation.glu import activate, tile
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


def reference(x: Tensor) -> Tensor:
    return torch.relu(x.to(accumulator(x.dtype))).square().to(x.dtype)


@triton.jit
def _relu_squared_fwd_kernel(
    x_ptr, y_ptr, x_stride_n, N, D,
    COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, col, inside = tile(N, D, BLOCK_N, BLOCK_D)
    x = tl.load(x_ptr + row * x_stride_n + col, mask=inside, other=0.0).to(COMPUTE)

    y, _ = activate(x, "relu_squared", 1.0)

    tl.store(y_ptr + row * D + col, y, mask=inside)


@triton.jit
def _relu_squared_bwd_kernel(
    x_ptr, dy_ptr, dx_ptr, x_stride_n, dy_stride_n, N, D,
    COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, col, inside = tile(N, D, BLOCK_N, BLOCK_D)
    x = tl.load(x_ptr + row * x_stride_n + col, mask=inside, other=0.0).to(COMPUTE)
    dy = tl.load(dy_ptr + row * dy_stride_n + col, mask=inside, other=0.0).to(COMPUTE)

    _, slope = activate(x, "relu_squared", 1.0)

    tl.store(dx_ptr + row * D + col, dy * slope, mask=inside)


def _relu_squared_config(D: int) -> dict:
    """2048 elements for four warps: with one input, two 16-byte loads a thread are in flight."""
    block_d = min(2048, next_power_of_2(D))
    return {"BLOCK_D": block_d, "BLOCK_N": 2048 // block_d, "num_warps": 4}


def _grid(N: int, D: int, config: dict) -> tuple[int]:
    return (cdiv(N, config["BLOCK_N"]) * cdiv(D, config["BLOCK_D"]),)


def relu_squared_fwd(x: Tensor) -> tuple[Tensor]:
    y = dense_like(x)

    if has_work(y):
        x = as_rows(x)
        N, D = x.shape
        config = _relu_squared_config(D)
        launch(
            _relu_squared_fwd_kernel, _grid(N, D, config),
            x, y, x.stride(0), N, D, COMPUTE=triton_dtype(accumulator(x.dtype)), **config,
        )  # fmt: skip
    return (y,)


def relu_squared_bwd(x: Tensor, dy: Tensor) -> tuple[Tensor]:
    dx = dense_like(x)

    if has_work(dx):
        x, dy = as_rows(x), as_rows(dy)
        N, D = x.shape
        config = _relu_squared_config(D)
        launch(
            _relu_squared_bwd_kernel, _grid(N, D, config),
            x, dy, dx, x.stride(0), dy.stride(0), N, D,
            COMPUTE=triton_dtype(accumulator(x.dtype)), **config,
        )  # fmt: skip
    return (dx,)


_relu_squared = custom_vjp(
    "relu_squared",
    reference=reference,
    fwd=relu_squared_fwd,
    bwd=relu_squared_bwd,
    results="y",
    grads="x",
    rows="x y",
)


def relu_squared(x: Tensor) -> Tensor:
    """Square the positive part, as the MLPs of Nemotron, Arcee and Primer do ("relu2").

        y = relu(x)²

    Args:
        x: (..., D), floating point, any strides.

    Returns:
        The shape and dtype of x, contiguous.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: x is a scalar.

    Precision: computed in float32 (float64 for float64 x); every output is rounded once.
    Memory: x lives until the backward pass, nothing else.
    Source: So et al., "Primer: Searching for Efficient Transformers for Language Modeling", 2021.
    """
    check.floating("relu_squared", "x", x)
    check.at_least_1d("relu_squared", "x", x)
    return _relu_squared(x)
