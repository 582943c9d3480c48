"""Facts about relu_squared."""

import torch
import triton.language as tl

from liger_fn.functional import relu_squared
from liger_fn.functional.activation import relu_squared as room
from liger_fn.testing.spec import BadCall, Benchmark, Case, Compilation, OpSpec


def case(*shape: int, scale: float = 1.0, id: str = "") -> Case:
    return Case(
        id or "x".join(map(str, shape)), lambda draw: {"x": draw.normal(*shape, scale=scale)}
    )


def in_own_dtype(x):
    return torch.relu(x).square()


def kernels() -> list[Compilation]:
    out = []
    for D in (96, 16384):
        constants = {"COMPUTE": tl.float32, **room._relu_squared_config(D)}
        warps = constants.pop("num_warps")
        strides = dict.fromkeys(("x_stride_n", "N", "D"), "i32")
        for name, kernel, more in (
            ("fwd", room._relu_squared_fwd_kernel, {"y_ptr": "*bf16"}),
            (
                "bwd",
                room._relu_squared_bwd_kernel,
                {"dy_ptr": "*bf16", "dx_ptr": "*bf16", "dy_stride_n": "i32"},
            ),
        ):
            signature = {"x_ptr": "*bf16", **more, **strides}
            out.append(Compilation(f"{name}-{D}", kernel, signature, constants, warps))
    return out


def benchmark(N: int, D: int) -> Benchmark:
    return Benchmark(
        f"{N}x{D}",
        lambda draw: {"x": draw.normal(N, D)},
        bytes_fwd=4 * N * D,
        bytes_bwd=6 * N * D,
    )


SPEC = OpSpec(
    op=relu_squared,
    reference=room.reference,
    baseline=in_own_dtype,
    grads=("x",),
    rows=("x",),
    cases=(case(4, 6), case(2, 3, 5), case(7)),
    sizes=(
        case(1, 1),
        case(0, 16),
        case(3, 0),
        case(5, 1),
        case(70, 33),
        case(3, 5000),
        case(4, 64, scale=100.0, id="large"),
        case(4, 64, scale=1e-3, id="tiny"),
    ),
    errors=(
        BadCall(
            "x integer",
            lambda d: {"x": d.integers(3, 4, 8)},
            TypeError,
            "relu_squared: `x` must have a floating-point dtype",
        ),
        BadCall("x no tensor", lambda d: {"x": 3.0}, TypeError, "`x` must be a tensor; got float."),
        BadCall(
            "x scalar",
            lambda d: {"x": d.normal()},
            ValueError,
            "`x` must have at least one dimension; got a scalar.",
        ),
    ),
    kernels=kernels,
    # Of Nemotron-4 15B, Arcee 4.5B and Nemotron-H 8B.
    benchmarks=tuple(benchmark(8192, D) for D in (24576, 18432, 21504)),
    huge=Case("135168x16384", lambda d: {"x": d.normal(4096, 16384).repeat(33, 1)}),
)
