"""LayerNorm over the last dimension, statistics in float32. Kernels: rows.py.

    x̂ = (x − mean(x)) · rstd      rstd = 1 / √(mean((x − mean(x))²) + ε)      y = x̂ · weight + bias

    g  = dy · weight
    dx = rstd · (g − mean(g) − x̂ · mean(g · x̂))     dweight = Σ_rows dy · x̂     dbias = Σ_rows dy

The squares are those of the row in registers after its mean is known, so that nothing cancels.
Memory traffic in bytes per element of a 2-byte x: 4 forward (read x, write y), 6 backward (read x
and dy, write dx), or 8 beyond 12288 columns, where dbias takes another read of dy; the mean and
`rstd`, 8 bytes a row, are kept. Rows wider than 16384 columns are read more often backward.
"""

import torch
from torch import Tensor

from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.launch import accumulator
from liger_fn.functional.norm.rows import check_norm, norm_bwd, norm_fwd


def reference(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    h = x.to(accumulator(x.dtype))
    h = h - h.mean(-1, keepdim=True)
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(h.dtype)
    if bias is not None:
        y = y + bias.to(h.dtype)
    return y.to(x.dtype)


def layer_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = norm_fwd(x, None, weight, bias, eps, None, cast=False, centred=True)
    return y, mean, rstd


def layer_norm_bwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dy: Tensor,
    eps: float,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return norm_bwd(x, weight, bias, mean, rstd, dy, None, None, need_dx, need_dweight, need_dbias)


_layer_norm = custom_vjp(
    "layer_norm",
    reference=reference,
    fwd=layer_norm_fwd,
    bwd=layer_norm_bwd,
    results="y",
    residuals="mean rstd",
    grads="x weight bias",
    rows="x y mean rstd",
)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """Normalise the last dimension to mean 0 and variance 1, then scale and shift it.

        y = (x − mean(x)) / √(var(x) + eps) · weight + bias

    Args:
        x: (..., D), floating point, any strides.
        weight: (D,), floating point, may be of another dtype than x; None: 1.
        bias: (D,), floating point, may be of another dtype than x; None: 0.
        eps: added to the variance, which is the mean square deviation (divided by D).

    Returns:
        (..., D), dtype of x, contiguous.

    Raises:
        TypeError: x, weight or bias is not a floating-point tensor, or eps is no number.
        ValueError: weight or bias does not have shape (D,), or lies on another device.

    Precision: mean, then the squares of what is left, products, dweight and dbias in float32
        (float64 for float64 inputs); every output is rounded once.
    Memory: x, weight, bias and 8 bytes a row live until the backward pass.
    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """
    check_norm("layer_norm", x, eps, weight=weight, bias=bias)
    return _layer_norm(x, weight, bias, eps)
