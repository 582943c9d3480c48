"""Facts about rms_norm."""

import torch
import torch.nn.functional as F

from liger_fn.functional import rms_norm
from liger_fn.functional.norm import rms_norm as room
from liger_fn.testing.spec import BadCall, Case, OpSpec
from liger_fn.testing.specs.norm import benchmarks, compilations, feature_errors, launches


def case(*shape: int, weight: bool = True, id: str = "", **options) -> Case:
    def make(draw):
        w = draw.normal(shape[-1]) if weight else None
        return {"x": draw.normal(*shape), "weight": w, **options}

    return Case(id or "x".join(map(str, shape)), make)


def as_hugging_face(x, weight=None, *, eps=1e-6, offset=0.0, cast_before_weight=False):
    """The norm as models write it: float32 inside, rounded where the option says."""
    if weight is None or (offset == 0.0 and not cast_before_weight and weight.dtype == x.dtype):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return room.reference(x, weight, eps=eps, offset=offset, cast_before_weight=cast_before_weight)


def huge() -> Case:
    def make(draw):
        # Drawn once and repeated: to draw 2^31 numbers takes minutes.
        return {"x": draw.normal(8192, 4096).repeat(65, 1), "weight": draw.normal(4096)}

    return Case("532480x4096", make)


SPEC = OpSpec(
    op=rms_norm,
    reference=room.reference,
    baseline=as_hugging_face,
    grads=("x", "weight"),
    rows=("x",),
    cases=(
        case(4, 8),
        case(2, 3, 8, offset=1.0, id="gemma"),
        case(3, 6, cast_before_weight=True, id="llama"),
        case(3, 7, weight=False, id="no-weight"),
        case(3, 7, eps=0.5, id="large-eps"),
    ),
    sizes=(
        case(1, 1),
        case(0, 16),
        case(5, 1),
        case(2, 7, 64),
        case(9, 130),
        case(70, 1152, offset=1.0),
        case(3, 5120),
        case(5, 10000, id="wide-bwd"),
        case(3, 20000, cast_before_weight=True, id="wide-both"),
        Case(
            "weight-in-float32",
            lambda d: {"x": d.normal(5, 64), "weight": d.normal(64, dtype=torch.float32)},
        ),
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
        BadCall("x no tensor", lambda d: {"x": 3.0}, TypeError, "`x` must be a tensor; got float"),
        *feature_errors("rms_norm", "weight"),
        BadCall(
            "eps none",
            lambda d: {"x": d.normal(4, 8), "eps": None},
            TypeError,
            "`eps` must be a number; got NoneType.",
        ),
        BadCall(
            "offset tensor",
            lambda d: {"x": d.normal(4, 8), "offset": d.normal()},
            TypeError,
            "`offset` must be a number; got Tensor.",
        ),
    ),
    kernels=compilations(),
    launches=launches(),
    benchmarks=benchmarks(lambda d, N, D: {"x": d.normal(N, D), "weight": d.normal(D)}, 4, 6),
    huge=huge(),
)
