"""Facts about poly_norm."""

import inspect
from itertools import product

import torch
import triton.language as tl

from liger_fn.functional import poly_norm
from liger_fn.functional.norm import poly_norm as room
from liger_fn.testing.spec import BadCall, Case, Compilation, OpSpec
from liger_fn.testing.specs.norm import benchmarks


def case(*shape: int, scale: float = 1.0, id: str = "", **options) -> Case:
    def make(draw):
        x = draw.normal(*shape, scale=scale)
        return {"x": x, "weight": draw.normal(3), "bias": draw.normal(1), **options}

    return Case(id or "x".join(map(str, shape)), make)


def kernels() -> list[Compilation]:
    out = []
    for D, passed in product((128, 4096, 8192, 16384, 32768), ("fwd", "bwd")):
        constants = {"COMPUTE": tl.float32, **getattr(room, f"_poly_norm_{passed}_config")(D, 2)}
        constants |= {"EPS": 1e-6} if passed == "fwd" else {}
        constants.pop("per_sm", None)
        warps = constants.pop("num_warps")
        wide = "" if "PIECES" in constants else "_wide"
        kernel = getattr(room, f"_poly_norm_{passed}{wide}_kernel")
        runtime = [n for n in inspect.signature(kernel.fn).parameters if n not in constants]
        floats = ("rstd_ptr", "dweight_part_ptr", "dbias_part_ptr")
        signature = {
            n: "*fp32" if n in floats else "*bf16" if n.endswith("_ptr") else "i32" for n in runtime
        }
        out.append(Compilation(f"{passed}-{D}", kernel, signature, constants, warps))
    return out


def bad(id: str, change, error: type[Exception], sentence: str) -> BadCall:
    def make(draw):
        call = {"x": draw.normal(4, 8), "weight": draw.normal(3), "bias": draw.normal(1)}
        return call | change(draw)

    return BadCall(id, make, error, f"poly_norm: {sentence}")


SPEC = OpSpec(
    op=poly_norm,
    reference=room.reference,
    grads=("x", "weight", "bias"),
    rows=("x",),
    cases=(
        case(4, 8),
        case(2, 3, 6, eps=0.5, id="large-eps"),
        Case(
            "scalar-bias",
            lambda d: {"x": d.normal(3, 5), "weight": d.normal(3), "bias": d.normal()},
        ),
    ),
    sizes=(
        case(1, 1),
        case(0, 16),
        case(3, 0),
        case(5, 1),
        case(7),
        case(2, 7, 64),
        case(70, 130, id="strips"),
        case(3, 5000),
        case(4, 64, scale=100.0, id="large"),
        case(4, 64, scale=1e-2, id="small"),
    ),
    errors=(
        bad("x integer", lambda d: {"x": d.integers(3, 4, 8)}, TypeError,
            "`x` must have a floating-point dtype"),
        bad("x scalar", lambda d: {"x": d.normal()}, ValueError,
            "`x` must have at least one dimension"),
        bad("weight shape", lambda d: {"weight": d.normal(8)}, ValueError,
            "`weight` must have shape (3,), one weight per power; got (8,)."),
        bad("weight device", lambda d: {"weight": torch.ones(3, device="meta")}, ValueError,
            "`weight` must be on the device of `x`"),
        bad("bias shape", lambda d: {"bias": d.normal(3)}, ValueError,
            "`bias` must have shape () or (1,); got (3,)."),
        bad("eps", lambda d: {"eps": None}, TypeError, "`eps` must be a number; got NoneType."),
    ),
    kernels=kernels,
    benchmarks=benchmarks(
        lambda d, N, D: {"x": d.normal(N, D), "weight": d.normal(3), "bias": d.normal(1)}, 4, 6
    ),
    huge=Case(
        "532480x4096",
        lambda d: {
            "x": d.normal(8192, 4096).repeat(65, 1),
            "weight": d.normal(3),
            "bias": d.normal(1),
        },
    ),
)  # fmt: skip
