"""LayerNorm with a scale and a shift for each sample (adaLN). Kernels: rows.py.

    x̂ = (x − mean(x)) · rstd      rstd = 1 / √(var(x) + ε)    y = x̂ · (1 + scale_b) + shift_b

    g  = dy · (1 + scale_b)                                   dscale_b = Σ_tokens dy · x̂
    dx = rstd · (g − mean(g) − x̂ · mean(g · x̂))               dshift_b = Σ_tokens dy

Memory traffic in bytes per element of a 2-byte x: 4 forward (read x, write y), 6 backward (read x
and dy, write dx); the mean and `rstd`, 8 bytes a row, are kept.
"""

from collections.abc import Callable

from torch import Tensor

from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.norm.modulated import (
    by_sample,
    check_modulation,
    reference_samples,
    samples_of,
)
from liger_fn.functional.norm.rows import check_norm, norm_bwd, norm_fwd


def reference(
    x: Tensor, scale: Tensor, shift: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    return _modulated(_reference, x, scale, shift, eps)


def _reference(x: Tensor, scale: Tensor, shift: Tensor | None, eps: float) -> Tensor:
    return reference_samples(x, scale, shift, 1.0, eps, centred=True)


def _modulated(
    norm: Callable[..., Tensor], x: Tensor, scale: Tensor, shift: Tensor | None, eps: float
) -> Tensor:
    sizes, D = samples_of(x, scale), x.shape[-1]
    shift = None if shift is None else shift.reshape(*sizes, D)
    return norm(by_sample(x, sizes), scale.reshape(*sizes, D), shift, eps).reshape(x.shape)


def modulated_layer_norm_fwd(
    x: Tensor, scale: Tensor, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = norm_fwd(x, None, scale, shift, eps, 1.0, cast=False, centred=True)
    return y, mean, rstd


def modulated_layer_norm_bwd(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dy: Tensor,
    eps: float,
    need_dx: bool,
    need_dscale: bool,
    need_dshift: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return norm_bwd(x, scale, shift, mean, rstd, dy, None, 1.0, need_dx, need_dscale, need_dshift)


_modulated_layer_norm = custom_vjp(
    "modulated_layer_norm",
    reference=_reference,
    fwd=modulated_layer_norm_fwd,
    bwd=modulated_layer_norm_bwd,
    results="y",
    residuals="mean rstd",
    grads="x scale shift",
    rows="x scale shift y mean rstd",
    core_dims=2,
)


def modulated_layer_norm(
    x: Tensor, scale: Tensor, shift: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """Normalise to mean 0 and variance 1, then scale and shift each sample by its own (adaLN).

        y = (x − mean(x)) / √(var(x) + eps) · (1 + scale) + shift

    Args:
        x: (..., D), floating point, any strides; (B, T, D) in diffusion transformers.
        scale: (B, D), or as many of the first sizes of x as it has a scale for each of, then D;
            ones between them do not matter: (B, 1, D) is the same. Floating point.
        shift: shape of scale, floating point; None: 0.
        eps: added to the variance, which is the mean square deviation.

    Returns:
        The shape and dtype of x, contiguous.

    Raises:
        TypeError: a tensor is not floating point, or eps is no number.
        ValueError: a shape does not fit, or a tensor lies on another device.

    Precision: computed in float32 (float64 for float64 x), as are the sums dscale and dshift; every
        output is rounded once.
    Memory: x, scale and 8 bytes a row live until the backward pass.
    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023.
    """
    check_norm("modulated_layer_norm", x, eps)
    check_modulation("modulated_layer_norm", x, scale, shift)
    return _modulated(_modulated_layer_norm, x, scale, shift, eps)
