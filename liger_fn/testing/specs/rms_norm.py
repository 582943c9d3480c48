"""Facts about rms_norm."""

import inspect

import torch
import torch.nn.functional as F
import triton.language as tl

from liger_fn.functional import rms_norm
from liger_fn.functional.norm import rms_norm as room
from liger_fn.testing.spec import BadCall, Benchmark, Case, Compilation, OpSpec


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


def benchmark(N: int, D: int) -> Benchmark:
    return Benchmark(
        f"{N}x{D}",
        lambda draw: {"x": draw.normal(N, D), "weight": draw.normal(D)},
        bytes_fwd=4 * N * D,
        bytes_bwd=6 * N * D,
    )


_FLOATS = {"rstd_ptr": "*fp32", "part_ptr": "*fp32"}


def compilation(id: str, kernel, num_warps: int, **constants) -> Compilation:
    """A kernel on bfloat16 tensors; sizes and strides fit 32 bits."""
    runtime = [n for n in inspect.signature(kernel.fn).parameters if n not in constants]
    signature = {n: _FLOATS.get(n, "*bf16" if n.endswith("_ptr") else "i32") for n in runtime}
    return Compilation(id, kernel, signature, constants, num_warps)


def kernels() -> list[Compilation]:
    compute, offset = {"COMPUTE": tl.float32}, {"OFFSET": 0.0}
    weighted = {"HAS_WEIGHT": True, **compute}
    out = []
    for D in (128, 2048, 4096, 5120, 8192, 16384, 65536):
        wide = D > room._WIDEST_FWD
        kernel = room._rms_norm_fwd_wide_kernel if wide else room._rms_norm_fwd_kernel
        config = {"EPS": 1e-6, "CAST": False, **offset, **weighted, **room._rms_norm_fwd_config(D)}
        out.append(compilation(f"fwd-{D}", kernel, **config))
    for D in (128, 2048, 4096, 5120, 8192):
        needs = {"NEED_DX": True, "NEED_DWEIGHT": True}
        config = {**needs, **offset, **weighted, **room._rms_norm_bwd_config(D)}
        out.append(compilation(f"bwd-{D}", room._rms_norm_bwd_kernel, **config))
    wide_dx, wide_dweight = (
        room._rms_norm_bwd_wide_dx_kernel,
        room._rms_norm_bwd_wide_dweight_kernel,
    )
    return [
        *out,
        compilation("bwd-wide-dx", wide_dx, 8, **offset, **weighted, BLOCK_D=4096),
        compilation("bwd-wide-dweight", wide_dweight, 4, **compute, BLOCK_N=8, BLOCK_D=256),
        compilation("sum-parts", room._sum_parts_kernel, 4, **compute, BLOCK_P=64, BLOCK_D=32),
    ]


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
        BadCall(
            "weight shape",
            lambda d: {"x": d.normal(4, 8), "weight": d.normal(7)},
            ValueError,
            "rms_norm: `weight` must have shape (8,), the last size of `x`; got (7,).",
        ),
        BadCall(
            "weight integer",
            lambda d: {"x": d.normal(4, 8), "weight": d.integers(3, 8)},
            TypeError,
            "`weight` must have a floating-point dtype",
        ),
        BadCall(
            "weight device",
            lambda d: {"x": d.normal(4, 8), "weight": torch.ones(8, device="meta")},
            ValueError,
            "`weight` must be on the device of `x`",
        ),
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
    kernels=kernels,
    benchmarks=tuple(
        benchmark(*s)
        for s in (
            (8192, 4096),
            (16384, 2048),
            (8192, 8192),
            (4096, 16384),
            (65536, 128),
            (8192, 3584),
            (8192, 5376),
        )
    ),
    huge=huge(),
)
