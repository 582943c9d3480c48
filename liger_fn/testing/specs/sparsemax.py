"""Facts about sparsemax."""

import inspect

import torch
import triton.language as tl

from liger_fn.functional import sparsemax
from liger_fn.functional.activation import sparsemax as room
from liger_fn.testing.spec import BadCall, Benchmark, Case, Compilation, OpSpec


def case(*shape: int, scale: float = 1.0, id: str = "", **options) -> Case:
    def make(draw):
        return {"x": draw.normal(*shape, scale=scale), **options}

    return Case(id or "x".join(map(str, shape)), make)


def by_sorting(x, dim=-1):
    """The paper's algorithm, of x read as float32."""
    z = x.to(room.accumulator(x.dtype)).movedim(dim, -1)
    highest = z.sort(-1, descending=True).values
    rank = torch.arange(1, z.shape[-1] + 1, device=z.device)
    sums = highest.cumsum(-1)
    size = (1 + rank * highest > sums).sum(-1, keepdim=True)
    tau = (sums.gather(-1, size - 1) - 1) / size
    return (z - tau).clamp(min=0).movedim(-1, dim).to(x.dtype)


def kernels() -> list[Compilation]:
    out = []
    for D in (128, 4096, 16384, 32768):
        wide = "_wide" if D > room._WIDEST else ""
        for passed in ("fwd", "bwd"):
            kernel = getattr(room, f"_sparsemax_{passed}{wide}_kernel")
            constants = {"COMPUTE": tl.float32, **room._sparsemax_config(D)}
            if passed == "fwd":
                constants["LEAST"] = 0.0
                constants["CAUSAL"] = False
            warps = constants.pop("num_warps")
            runtime = [n for n in inspect.signature(kernel.fn).parameters if n not in constants]
            signature = {n: "*bf16" if n.endswith("_ptr") else "i32" for n in runtime}
            out.append(Compilation(f"{passed}-{D}", kernel, signature, constants, warps))
    return out


def benchmark(N: int, D: int) -> Benchmark:
    return Benchmark(
        f"{N}x{D}",
        lambda draw: {"x": draw.normal(N, D)},
        bytes_fwd=4 * N * D,
        bytes_bwd=6 * N * D,
    )


def bad(id: str, make, error: type[Exception], sentence: str) -> BadCall:
    return BadCall(id, make, error, f"sparsemax: {sentence}")


SPEC = OpSpec(
    op=sparsemax,
    reference=room.reference,
    baseline=by_sorting,
    grads=("x",),
    rows=("x",),
    cases=(
        case(4, 6),
        case(2, 3, 5, dim=1, id="middle"),
        case(9),
        case(3, 7, scale=0.1, id="full"),
    ),
    sizes=(
        case(1, 1),
        case(0, 16),
        case(5, 1),
        case(2, 7, 64),
        case(70, 33),
        case(9, 1000, scale=1e-3, id="wide-support"),
        case(3, 5000),
        case(2, 20000, id="wide"),
        case(2, 17000, scale=1e-4, id="wide-with-wide-support"),
        case(4, 64, scale=100.0, id="large"),
        Case("equal", lambda d: {"x": d.normal(5, 1).expand(5, 12).clone()}),
        Case("shifted", lambda d: {"x": d.normal(5, 300) + 100.0}),
    ),
    errors=(
        bad("x integer", lambda d: {"x": d.integers(3, 4, 8)}, TypeError,
            "`x` must have a floating-point dtype"),
        bad("x scalar", lambda d: {"x": d.normal()}, ValueError,
            "`x` must have at least one dimension"),
        bad("x empty", lambda d: {"x": d.normal(4, 0)}, ValueError,
            "`x` must have at least one element along `dim`; got none."),
        bad("dim", lambda d: {"x": d.normal(4, 3), "dim": 2}, ValueError,
            "`dim` must be between -2 and 1; got 2."),
    ),
    kernels=kernels,
    benchmarks=tuple(
        benchmark(*s) for s in ((32768, 1024), (32768, 4096), (8192, 16384), (4096, 32768))
    ),
    huge=Case("135168x16384", lambda d: {"x": d.normal(4096, 16384).repeat(33, 1)}),
)  # fmt: skip
