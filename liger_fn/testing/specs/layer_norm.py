"""Facts about layer_norm."""

import torch
import torch.nn.functional as F

from liger_fn.functional import layer_norm
from liger_fn.functional.norm import layer_norm as room
from liger_fn.testing.spec import BadCall, Case, OpSpec
from liger_fn.testing.specs.norm import benchmarks, compilations, feature_errors, launches


def case(*shape: int, weight: bool = True, bias: bool = True, id: str = "", **options) -> Case:
    def make(draw):
        return {
            "x": draw.normal(*shape),
            "weight": draw.normal(shape[-1]) if weight else None,
            "bias": draw.normal(shape[-1]) if bias else None,
            **options,
        }

    return Case(id or "x".join(map(str, shape)), make)


def far_from_zero(draw):
    """Deviations of 1 around 30: squares that are not centred would cost 900 roundings."""
    return {"x": draw.normal(4, 200) + 30.0, "weight": draw.normal(200), "bias": draw.normal(200)}


def as_torch(x, weight=None, bias=None, *, eps=1e-5):
    """PyTorch's op, where it takes these dtypes."""
    if any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
        return room.reference(x, weight, bias, eps=eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


SPEC = OpSpec(
    op=layer_norm,
    reference=room.reference,
    baseline=as_torch,
    grads=("x", "weight", "bias"),
    rows=("x",),
    cases=(
        case(4, 8),
        case(2, 3, 6, bias=False, id="no-bias"),
        case(3, 7, weight=False, id="no-weight"),
        case(3, 7, weight=False, bias=False, eps=0.5, id="bare"),
    ),
    sizes=(
        case(1, 1),
        case(0, 16),
        # One value is its own mean: a small eps would magnify the rounding of what cancels.
        case(5, 1, eps=1.0),
        case(2, 7, 64),
        case(9, 130),
        case(70, 1152),
        case(3, 5120),
        case(5, 10000, id="wide-bwd"),
        case(3, 13000, id="dbias-apart"),
        case(3, 20000, id="wide-both"),
        case(2, 33000, id="wide-in-16-bits"),
        Case(
            "weight-in-float32",
            lambda d: {
                "x": d.normal(5, 64),
                "weight": d.normal(64, dtype=torch.float32),
                "bias": d.normal(64, dtype=torch.float32),
            },
        ),
        Case("far-from-zero", far_from_zero),
        Case("tiny", lambda d: {"x": d.normal(4, 64, scale=1e-3), "weight": d.normal(64)}),
        Case("large", lambda d: {"x": d.normal(4, 64, scale=100.0), "weight": d.normal(64)}),
    ),
    errors=(
        BadCall(
            "x integer",
            lambda d: {"x": d.integers(3, 4, 8)},
            TypeError,
            "`x` must have a floating-point dtype",
        ),
        BadCall(
            "x scalar",
            lambda d: {"x": d.normal()},
            ValueError,
            "`x` must have at least one dimension",
        ),
        *feature_errors("layer_norm", "weight", "bias"),
        BadCall(
            "eps none",
            lambda d: {"x": d.normal(4, 8), "eps": None},
            TypeError,
            "`eps` must be a number; got NoneType.",
        ),
    ),
    kernels=compilations(centred=True),
    launches=launches(),
    benchmarks=benchmarks(
        lambda d, N, D: {"x": d.normal(N, D), "weight": d.normal(D), "bias": d.normal(D)}, 4, 6
    ),
    huge=Case(
        "532480x4096",
        # Drawn once and repeated: to draw 2^31 numbers takes minutes.
        lambda d: {
            "x": d.normal(8192, 4096).repeat(65, 1),
            "weight": d.normal(4096),
            "bias": d.normal(4096),
        },
    ),
)
