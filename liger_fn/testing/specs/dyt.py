"""Facts about dyt."""

import inspect

import torch
import triton.language as tl

from liger_fn.functional import dyt
from liger_fn.functional.norm import dyt as room
from liger_fn.testing.spec import BadCall, Benchmark, Case, Compilation, OpSpec


def case(
    *shape: int, weight: bool = True, bias: bool = True, scale: float = 1.0, id: str = ""
) -> Case:
    def make(draw):
        return {
            "x": draw.normal(*shape, scale=scale),
            "alpha": draw.uniform(1) + 0.5,
            "weight": draw.normal(shape[-1]) if weight else None,
            "bias": draw.normal(shape[-1]) if bias else None,
        }

    return Case(id or "x".join(map(str, shape)), make)


def as_models_write_it(x, alpha, weight=None, bias=None):
    """The paper's module, in the dtype of x."""
    y = torch.tanh(alpha.to(x.dtype) * x)
    y = y if weight is None else y * weight.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def kernels() -> list[Compilation]:
    out = []
    computed = {"COMPUTE": tl.float32, "FAST": True}
    for D in (96, 4096):
        for passed, config in (
            ("fwd", room._dyt_fwd_config(D, 2)),
            ("bwd", room._dyt_bwd_config(D)),
            ("sums", room.add_parts_config(D)),
        ):
            kernel = getattr(room, f"_dyt_{passed}_kernel")
            warps = config.pop("num_warps")
            constants = config if passed == "sums" else {**computed, **config}
            runtime = [n for n in inspect.signature(kernel.fn).parameters if n not in constants]
            signature = {
                n: "*fp32" if "part" in n else "*bf16" if n.endswith("_ptr") else "i32"
                for n in runtime
            }
            out.append(Compilation(f"{passed}-{D}", kernel, signature, constants, warps))
    return out


def benchmark(N: int, D: int) -> Benchmark:
    def make(draw):
        return {
            "x": draw.normal(N, D),
            "alpha": draw.uniform(1) + 0.5,
            "weight": draw.normal(D),
            "bias": draw.normal(D),
        }

    return Benchmark(f"{N}x{D}", make, bytes_fwd=4 * N * D, bytes_bwd=6 * N * D)


def bad(id: str, change, error: type[Exception], sentence: str) -> BadCall:
    def make(draw):
        return {"x": draw.normal(4, 8), "alpha": draw.normal(1)} | change(draw)

    return BadCall(id, make, error, f"dyt: {sentence}")


SPEC = OpSpec(
    op=dyt,
    reference=room.reference,
    baseline=as_models_write_it,
    grads=("x", "alpha", "weight", "bias"),
    rows=("x",),
    cases=(
        case(4, 8),
        case(2, 3, 5, bias=False, id="no-bias"),
        case(3, 7, weight=False, bias=False, id="bare"),
        Case(
            "scalar-alpha",
            lambda d: {"x": d.normal(3, 5), "alpha": d.normal(), "bias": d.normal(5)},
        ),
    ),
    sizes=(
        case(1, 1),
        case(0, 16),
        case(3, 0),
        case(5, 1),
        case(7),
        case(2, 7, 64),
        case(70, 33),
        case(3, 5000),
        case(4, 64, scale=100.0, id="large"),
        case(4, 64, scale=1e-3, id="tiny"),
        Case(
            "weight-in-float32",
            lambda d: {
                "x": d.normal(5, 64),
                "alpha": d.normal(1, dtype=torch.float32),
                "weight": d.normal(64, dtype=torch.float32),
                "bias": d.normal(64, dtype=torch.float32),
            },
        ),
    ),
    errors=(
        bad("x integer", lambda d: {"x": d.integers(3, 4, 8)}, TypeError,
            "`x` must have a floating-point dtype"),
        bad("x scalar", lambda d: {"x": d.normal()}, ValueError,
            "`x` must have at least one dimension"),
        bad("alpha integer", lambda d: {"alpha": d.integers(3, 1)}, TypeError,
            "`alpha` must have a floating-point dtype"),
        bad("alpha shape", lambda d: {"alpha": d.normal(8)}, ValueError,
            "`alpha` must have shape () or (1,); got (8,)."),
        bad("alpha device", lambda d: {"alpha": torch.ones(1, device="meta")}, ValueError,
            "`alpha` must be on the device of `x`"),
        *(
            bad(f"{name} shape", lambda d, name=name: {name: d.normal(7)}, ValueError,
                f"`{name}` must have shape (8,), the last size of `x`; got (7,).")
            for name in ("weight", "bias")
        ),
    ),
    kernels=kernels,
    benchmarks=tuple(benchmark(*s) for s in ((8192, 4096), (16384, 2048), (8192, 8192))),
    huge=Case(
        "532480x4096",
        lambda d: {
            "x": d.normal(8192, 4096).repeat(65, 1),
            "alpha": d.normal(1),
            "weight": d.normal(4096),
        },
    ),
)  # fmt: skip
