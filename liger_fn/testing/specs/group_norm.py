"""Facts about group_norm."""

import inspect

import torch
import torch.nn.functional as F
import triton.language as tl

from liger_fn.functional import group_norm
from liger_fn.functional.norm import group_norm as room
from liger_fn.testing.spec import BadCall, Benchmark, Case, Compilation, OpSpec


def case(
    *shape: int, groups: int, weight: bool = True, bias: bool = True, shift: float = 0.0,
    id: str = "", **options,
) -> Case:  # fmt: skip
    def make(draw):
        return {
            "x": draw.normal(*shape) + shift,
            "num_groups": groups,
            "weight": draw.normal(shape[1]) if weight else None,
            "bias": draw.normal(shape[1]) if bias else None,
            **options,
        }

    return Case(id or f"{'x'.join(map(str, shape))}-in-{groups}", make)


def as_torch(x, num_groups, weight=None, bias=None, *, eps=1e-5):
    """PyTorch's op, where it takes these dtypes; it has no gradients of a bias alone."""
    mixed = any(t is not None and t.dtype != x.dtype for t in (weight, bias))
    if mixed or (weight is None and bias is not None):
        return room.reference(x, num_groups, weight, bias, eps=eps)
    return F.group_norm(x, num_groups, weight, bias, eps)


def kernels() -> list[Compilation]:
    out = []
    for K, S in ((4, 16), (10, 4096), (16, 16384)):
        for passed in ("fwd", "bwd"):
            kernel = getattr(room, f"_group_norm_{passed}_kernel")
            constants = {"COMPUTE": tl.float32, **room._group_norm_config(K, S)}
            constants |= {"EPS": 1e-5} if passed == "fwd" else {}
            warps = constants.pop("num_warps")
            runtime = [n for n in inspect.signature(kernel.fn).parameters if n not in constants]
            floats = ("mean_ptr", "rstd_ptr", "dweight_part_ptr", "dbias_part_ptr")
            signature = {
                n: "*fp32" if n in floats else "*bf16" if n.endswith("_ptr") else "i32"
                for n in runtime
            }
            out.append(Compilation(f"{passed}-{K}x{S}", kernel, signature, constants, warps))
    return out


def benchmark(B: int, C: int, side: int) -> Benchmark:
    def make(draw):
        x = draw.normal(B, C, side, side)
        return {"x": x, "num_groups": 32, "weight": draw.normal(C), "bias": draw.normal(C)}

    n = B * C * side * side
    return Benchmark(f"{B}x{C}x{side}x{side}", make, bytes_fwd=4 * n, bytes_bwd=6 * n)


def bad(id: str, change, error: type[Exception], sentence: str) -> BadCall:
    def make(draw):
        return {"x": draw.normal(4, 8, 3), "num_groups": 2} | change(draw)

    return BadCall(id, make, error, f"group_norm: {sentence}")


SPEC = OpSpec(
    op=group_norm,
    reference=room.reference,
    baseline=as_torch,
    grads=("x", "weight", "bias"),
    rows=("x",),
    cases=(
        case(4, 6, 5, groups=2),
        case(2, 4, 3, 2, groups=4, bias=False, id="a-group-a-channel"),
        # Four channels a group: of two, whatever they are, the gradient is 0 but for rounding.
        case(3, 8, groups=2, weight=False, id="no-positions"),
        case(2, 3, 4, groups=1, weight=False, bias=False, eps=0.5, id="bare"),
    ),
    sizes=(
        case(0, 4, 3, groups=2),
        case(2, 4, 0, groups=2),
        case(5, 64, 7, groups=8),
        case(2, 40, 33, 33, groups=4, id="several-tiles"),
        case(2, 2, 20000, groups=1, id="wide"),
        # Deviations of 1 around 300: squares that are not centred would cost 90,000 roundings.
        case(2, 8, 500, groups=2, shift=300.0, id="far-from-zero"),
        Case(
            "weight-in-float32",
            lambda d: {
                "x": d.normal(3, 8, 5),
                "num_groups": 2,
                "weight": d.normal(8, dtype=torch.float32),
                "bias": d.normal(8, dtype=torch.float32),
            },
        ),
    ),
    errors=(
        bad("x integer", lambda d: {"x": d.integers(3, 4, 8)}, TypeError,
            "`x` must have a floating-point dtype"),
        bad("x vector", lambda d: {"x": d.normal(8)}, ValueError,
            "`x` must have at least two dimensions; got shape (8,)."),
        bad("num_groups", lambda d: {"num_groups": 3}, ValueError,
            "`num_groups` must divide 8, the second size of `x`; got 3."),
        bad("num_groups float", lambda d: {"num_groups": 2.0}, ValueError,
            "`num_groups` must be an integer; got 2.0."),
        *(
            bad(f"{name} shape", lambda d, name=name: {name: d.normal(3)}, ValueError,
                f"`{name}` must have shape (8,), the second size of `x`; got (3,).")
            for name in ("weight", "bias")
        ),
        bad("weight device", lambda d: {"weight": torch.ones(8, device="meta")}, ValueError,
            "`weight` must be on the device of `x`"),
        bad("eps", lambda d: {"eps": None}, TypeError, "`eps` must be a number; got NoneType."),
    ),
    kernels=kernels,
    # Of the U-Nets and decoders of image diffusion.
    benchmarks=(benchmark(16, 320, 64), benchmark(16, 640, 32), benchmark(4, 512, 256)),
    huge=Case(
        "80x8192x64x64",
        lambda d: {"x": d.normal(4, 8192, 64, 64).repeat(20, 1, 1, 1), "num_groups": 32},
    ),
)  # fmt: skip
