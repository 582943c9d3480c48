"""RMSNorm with a scale and a shift for each sample (adaptive norm). Kernels: rows.py.

    x̂ = x · rstd      rstd = 1 / √(mean(x²) + ε)      y = x̂ · weight · (1 + scale_b) + shift_b

    g  = dy · weight · (1 + scale_b)                  dscale_b = Σ_tokens dy · x̂ · weight
    dx = rstd · (g − x̂ · mean(g · x̂))                 dshift_b = Σ_tokens dy

Memory traffic in bytes per element of a 2-byte x: 4 forward (read x, write y), 6 backward (read x
and dy, write dx); `rstd`, 4 bytes a row, is kept. A weight is multiplied into the scales, which are
few, beforehand.
"""

from collections.abc import Callable

from torch import Tensor

from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.launch import accumulator
from liger_fn.functional.norm.modulated import (
    by_sample,
    check_modulation,
    reference_samples,
    samples_of,
)
from liger_fn.functional.norm.rows import check_norm, norm_bwd, norm_fwd


def reference(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    return _modulated(_reference, x, scale, shift, weight, eps)


def _reference(x: Tensor, scale: Tensor, shift: Tensor | None, offset: float, eps: float) -> Tensor:
    return reference_samples(x, scale, shift, offset, eps, centred=False)


def _modulated(
    norm: Callable[..., Tensor],
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor | None,
    eps: float,
) -> Tensor:
    sizes, D = samples_of(x, scale), x.shape[-1]
    factor = scale.reshape(*sizes, D)
    shift = None if shift is None else shift.reshape(*sizes, D)
    if weight is not None:
        compute = accumulator(x.dtype)
        factor = weight.to(compute) * (1 + factor.to(compute))
    offset = 1.0 if weight is None else 0.0
    return norm(by_sample(x, sizes), factor, shift, offset, eps).reshape(x.shape)


def modulated_rms_norm_fwd(
    x: Tensor, scale: Tensor, shift: Tensor | None, offset: float, eps: float
) -> tuple[Tensor, Tensor]:
    y, _, _, rstd = norm_fwd(x, None, scale, shift, eps, offset, cast=False, centred=False)
    return y, rstd


def modulated_rms_norm_bwd(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    rstd: Tensor,
    dy: Tensor,
    offset: float,
    eps: float,
    need_dx: bool,
    need_dscale: bool,
    need_dshift: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return norm_bwd(
        x, scale, shift, None, rstd, dy, None, offset, need_dx, need_dscale, need_dshift
    )


_modulated_rms_norm = custom_vjp(
    "modulated_rms_norm",
    reference=_reference,
    fwd=modulated_rms_norm_fwd,
    bwd=modulated_rms_norm_bwd,
    results="y",
    residuals="rstd",
    grads="x scale shift",
    rows="x scale shift y rstd",
    core_dims=2,
)


def modulated_rms_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """Normalise by the root mean square, then scale and shift each sample by its own.

        y = x / √(mean(x²) + eps) · weight · (1 + scale) + shift

    Args:
        x: (..., D), floating point, any strides; (B, T, D) in diffusion transformers.
        scale: (B, D), or as many of the first sizes of x as it has a scale for each of, then D;
            ones between them do not matter: (B, 1, D) is the same. Floating point.
        shift: shape of scale, floating point; None: 0.
        weight: (D,), floating point, may be of another dtype than x; None: 1.
        eps: added to the mean square.

    Returns:
        The shape and dtype of x, contiguous.

    Raises:
        TypeError: a tensor is not floating point, or eps is no number.
        ValueError: a shape does not fit, or a tensor lies on another device.

    Precision: computed in float32 (float64 for float64 x), as are the sums dscale, dshift and
        dweight; every output is rounded once.
    Memory: x, scale and 4 bytes a row live until the backward pass.
    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023; Zhang and
        Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    check_norm("modulated_rms_norm", x, eps, weight=weight)
    check_modulation("modulated_rms_norm", x, scale, shift)
    return _modulated(_modulated_rms_norm, x, scale, shift, weight, eps)
