"""The residual addition of a transformer block and the RMSNorm after it. Kernels: rows.py.

    s  = x + residual          ŝ = s · rstd          rstd = 1 / √(mean(s²) + ε)
    y  = ŝ · (offset + weight)

    g  = dy · (offset + weight)
    dx = rstd · (g − ŝ · mean(g · ŝ)) + ds          dresidual = dx          dweight = Σ_rows dy · ŝ

s is rounded to the dtype of x before it is normalised, as it is when the two steps are apart.
Memory traffic in bytes per element of a 2-byte x: 8 forward (read x and residual, write s and y), 8
backward (read s, dy and ds, write dx): the gradient of x is residual's too, one tensor. s, which
the next block adds to, and `rstd`, 4 bytes a row, are kept; x and residual are not.
"""

from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.launch import dense_like
from liger_fn.functional.norm import rms_norm
from liger_fn.functional.norm.rows import check_norm, norm_bwd, norm_fwd


def reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    s = x + residual
    y = rms_norm.reference(s, weight, eps=eps, offset=offset, cast_before_weight=cast_before_weight)
    return y, s


def fused_add_rms_norm_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    cast_before_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, s, _, rstd = norm_fwd(
        x, residual, weight, None, eps, offset, cast_before_weight, centred=False
    )
    return y, s, rstd


def fused_add_rms_norm_bwd(
    s: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dy: Tensor | None,
    ds: Tensor | None,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    if dy is None:
        # The gradient must not be the cotangent itself.
        dx = dense_like(s).copy_(ds) if need_dx else None
        return dx, dense_like(weight).zero_() if need_dweight else None
    dx, dweight, _ = norm_bwd(
        s, weight, None, None, rstd, dy, ds, offset, need_dx, need_dweight, need_dbias=False
    )
    return dx, dweight


_fused_add_rms_norm = custom_vjp(
    "fused_add_rms_norm",
    reference=reference,
    fwd=fused_add_rms_norm_fwd,
    bwd=fused_add_rms_norm_bwd,
    results="y s",
    residuals="rstd",
    grads="x weight",
    total="s x residual",
    unused=True,
    rows="x residual y s rstd",
)


def fused_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """Add a residual and normalise the sum by its root mean square.

        s = x + residual        y = s / √(mean(s²) + eps) · (offset + weight)

    Args:
        x: (..., D), floating point, any strides.
        residual: shape and dtype of x, any strides.
        weight: (D,), floating point, may be of another dtype than x; None: no weight, and no
            offset.
        eps: added to the mean square.
        offset: added to the weight in float32: 1 is Gemma's convention, 0 everybody else's.
        cast_before_weight: round the normalised value to x.dtype before the weight multiplies it,
            as Hugging Face's LlamaRMSNorm does; False multiplies in float32 and rounds once.

    Returns:
        y, and s for the next residual: both (..., D), dtype of x, contiguous.

    Raises:
        TypeError: x, residual or weight is not a floating-point tensor, x and residual have
            different dtypes, or eps or offset is no number.
        ValueError: residual does not have the shape of x, or weight not shape (D,), or one of them
            lies on another device.

    Precision: s is rounded to x.dtype first, as in `x + residual`; then as rms_norm. dx, which
        includes the gradient by way of s, is rounded once.
    Memory: s, weight and 4 bytes a row live until the backward pass; x and residual do not. Their
        gradients are one tensor, as those of PyTorch's own sum are.
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    op = "fused_add_rms_norm"
    check_norm(op, x, eps, weight=weight)
    check.floating(op, "residual", residual)
    check.dtype(op, "residual", residual, x, "x")
    check.shape(op, "residual", residual, x.shape, "the shape of `x`")
    check.device(op, "residual", residual, x, "x")
    check.number(op, "offset", offset, "be a number", True)
    return _fused_add_rms_norm(x, residual, weight, eps, offset, cast_before_weight)
