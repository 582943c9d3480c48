"""Facts about fused_add_rms_norm."""

import torch

from liger_fn.functional import fused_add_rms_norm
from liger_fn.functional.norm import fused_add_rms_norm as room
from liger_fn.testing.spec import BadCall, Case, OpSpec
from liger_fn.testing.specs.norm import benchmarks, compilations, feature_errors, launches
from liger_fn.testing.specs.rms_norm import as_hugging_face


def case(*shape: int, weight: bool = True, id: str = "", **options) -> Case:
    def make(draw):
        w = draw.normal(shape[-1]) if weight else None
        x, residual = draw.normal(*shape), draw.normal(*shape)
        return {"x": x, "residual": residual, "weight": w, **options}

    return Case(id or "x".join(map(str, shape)), make)


def as_two_ops(x, residual, weight=None, **options):
    s = x + residual
    return as_hugging_face(s, weight, **options), s


def both(draw, N: int, D: int):
    return {"x": draw.normal(N, D), "residual": draw.normal(N, D), "weight": draw.normal(D)}


SPEC = OpSpec(
    op=fused_add_rms_norm,
    reference=room.reference,
    baseline=as_two_ops,
    grads=("x", "residual", "weight"),
    rows=("x", "residual"),
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
        case(5, 17000, id="wide-bwd"),
        case(3, 33000, cast_before_weight=True, id="wide-both"),
        Case(
            "weight-in-float32",
            lambda d: {
                "x": d.normal(5, 64),
                "residual": d.normal(5, 64),
                "weight": d.normal(64, dtype=torch.float32),
            },
        ),
        Case(
            "cancelling",
            lambda d: {"x": d.normal(4, 64), "residual": -d.normal(4, 64), "weight": d.normal(64)},
        ),
    ),
    errors=(
        BadCall(
            "x integer",
            lambda d: {"x": d.integers(3, 4, 8), "residual": d.normal(4, 8)},
            TypeError,
            "`x` must have a floating-point dtype",
        ),
        BadCall(
            "x scalar",
            lambda d: {"x": d.normal(), "residual": d.normal()},
            ValueError,
            "`x` must have at least one dimension",
        ),
        BadCall(
            "residual none",
            lambda d: {"x": d.normal(4, 8), "residual": None},
            TypeError,
            "`residual` must be a tensor; got NoneType.",
        ),
        BadCall(
            "residual shape",
            lambda d: {"x": d.normal(4, 8), "residual": d.normal(1, 8)},
            ValueError,
            "`residual` must have shape (4, 8), the shape of `x`; got (1, 8).",
        ),
        BadCall(
            "residual dtype",
            lambda d: {"x": d.normal(4, 8), "residual": d.normal(4, 8, dtype=torch.float16)},
            TypeError,
            "`residual` must have the dtype of `x`, torch.float32; got torch.float16.",
        ),
        BadCall(
            "residual device",
            lambda d: {"x": d.normal(4, 8), "residual": torch.ones(4, 8, device="meta")},
            ValueError,
            "`residual` must be on the device of `x`",
        ),
        *feature_errors("fused_add_rms_norm", "weight"),
        BadCall(
            "eps none",
            lambda d: {"x": d.normal(4, 8), "residual": d.normal(4, 8), "eps": None},
            TypeError,
            "`eps` must be a number; got NoneType.",
        ),
        BadCall(
            "offset tensor",
            lambda d: {"x": d.normal(4, 8), "residual": d.normal(4, 8), "offset": d.normal()},
            TypeError,
            "`offset` must be a number; got Tensor.",
        ),
    ),
    kernels=compilations(residual=True),
    launches=launches(),
    benchmarks=benchmarks(both, 8, 8),
    # Twice 2^31 elements must fit, and their sum, and its gradient.
    huge=Case(
        "532480x4096",
        lambda d: {
            "x": d.normal(8192, 4096).repeat(65, 1),
            "residual": d.normal(8192, 4096).repeat(65, 1),
            "weight": d.normal(4096),
        },
    ),
)
