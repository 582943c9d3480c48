"""RMSNorm over the last dimension, statistics in float32. Kernels: rows.py.

    x̂ = x · rstd          rstd = 1 / √(mean(x²) + ε)          y = x̂ · (offset + weight)

    g  = dy · (offset + weight)
    dx = rstd · (g − x̂ · mean(g · x̂))                         dweight = Σ_rows dy · x̂

Memory traffic in bytes per element of a 2-byte x: 4 forward (read x, write y), 6 backward (read x
and dy, write dx); `rstd`, 4 bytes a row, is kept.
"""

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.launch import accumulator
from liger_fn.functional.norm.rows import check_norm, norm_bwd, norm_fwd


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


def rms_norm_fwd(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, cast_before_weight: bool
) -> tuple[Tensor, Tensor]:
    y, _, _, rstd = norm_fwd(x, None, weight, None, eps, offset, cast_before_weight, centred=False)
    return y, rstd


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
    dx, dweight, _ = norm_bwd(
        x, weight, None, None, rstd, dy, None, offset, need_dx, need_dweight, need_dbias=False
    )
    return dx, dweight


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
    check_norm("rms_norm", x, eps, weight=weight)
    check.number("rms_norm", "offset", offset, "be a number", True)
    return _rms_norm(x, weight, eps, offset, cast_before_weight)
