"""Facts about gated_rms_norm."""

import inspect
from itertools import product

import torch
import triton.language as tl

from liger_fn.functional import gated_rms_norm
from liger_fn.functional.norm import gated_rms_norm as room
from liger_fn.testing.spec import BadCall, Case, Compilation, OpSpec
from liger_fn.testing.specs.norm import benchmarks


def case(*shape: int, weight: bool = True, scale: float = 1.0, id: str = "", **options) -> Case:
    def make(draw):
        return {
            "x": draw.normal(*shape, scale=scale),
            "gate": draw.normal(*shape),
            "weight": draw.normal(shape[-1]) if weight else None,
            **options,
        }

    return Case(id or "x".join(map(str, shape)), make)


def as_hugging_face(x, gate, weight=None, **options):
    """The gate in float32, the weight in the dtype of x, as the modules of these models do."""
    cast = options.pop("cast_before_weight", False)
    return room.reference(x, gate, weight, cast_before_weight=cast, **options)


def kernels() -> list[Compilation]:
    out = []
    for W, passed, gate_first in product(
        (128, 512, 4096, 8192, 16384), ("fwd", "bwd"), (False, True)
    ):
        constants = {
            "GATE_FIRST": gate_first,
            "ACTIVATION": "silu",
            "COMPUTE": tl.float32,
            "FAST": True,
        }
        if passed == "fwd":
            constants |= {"EPS": 1e-6, "CAST": False, **room._gated_rms_norm_fwd_config(W, 2)}
        else:
            constants |= room._gated_rms_norm_bwd_config(W, 2, gate_first)
            constants.pop("per_sm")
        warps = constants.pop("num_warps")
        wide = "" if "PIECES" in constants else "_wide"
        kernel = getattr(room, f"_gated_rms_norm_{passed}{wide}_kernel")
        runtime = [n for n in inspect.signature(kernel.fn).parameters if n not in constants]
        floats = ("rstd_ptr", "dweight_part_ptr")
        signature = {
            n: "*fp32" if n in floats else "*bf16" if n.endswith("_ptr") else "i32" for n in runtime
        }
        order = "before" if gate_first else "after"
        out.append(Compilation(f"{passed}-{order}-{W}", kernel, signature, constants, warps))
    return out


def bad(id: str, change, error: type[Exception], sentence: str) -> BadCall:
    def make(draw):
        return {"x": draw.normal(4, 8), "gate": draw.normal(4, 8)} | change(draw)

    return BadCall(id, make, error, f"gated_rms_norm: {sentence}")


SPEC = OpSpec(
    op=gated_rms_norm,
    reference=room.reference,
    baseline=as_hugging_face,
    grads=("x", "gate", "weight"),
    rows=("x", "gate"),
    cases=(
        case(4, 8),
        case(2, 3, 6, gate_first=True, id="gate-first"),
        case(3, 6, gate_first=True, groups=2, id="groups"),
        case(3, 6, groups=3, cast_before_weight=True, id="groups-gate-after"),
        case(3, 7, weight=False, activation="sigmoid", id="sigmoid-no-weight"),
        case(3, 7, gate_first=True, weight=False, eps=0.5, id="gate-first-no-weight"),
    ),
    sizes=(
        case(1, 1),
        case(0, 16),
        case(3, 0),
        case(5, 1),
        case(7),
        case(2, 7, 64),
        case(70, 130, gate_first=True, id="strips"),
        case(90, 33, id="strips-gate-after"),
        case(21, 3000, groups=3, id="wide-groups"),
        case(3, 20000, gate_first=True, id="wide"),
        case(3, 20000, id="wide-gate-after"),
        case(4, 64, scale=100.0, id="large"),
        case(4, 64, scale=1e-3, id="tiny"),
    ),
    errors=(
        bad("x integer", lambda d: {"x": d.integers(3, 4, 8)}, TypeError,
            "`x` must have a floating-point dtype"),
        bad("gate integer", lambda d: {"gate": d.integers(3, 4, 8)}, TypeError,
            "`gate` must have a floating-point dtype"),
        bad("gate dtype", lambda d: {"gate": d.normal(4, 8, dtype=torch.float16)}, TypeError,
            "`gate` must have the dtype of `x`, torch.float32"),
        bad("gate shape", lambda d: {"gate": d.normal(4, 1)}, ValueError,
            "`gate` must have shape (4, 8), the shape of `x`; got (4, 1)."),
        bad("gate device", lambda d: {"gate": torch.ones(4, 8, device="meta")}, ValueError,
            "`gate` must be on the device of `x`"),
        bad("weight shape", lambda d: {"weight": d.normal(7)}, ValueError,
            "`weight` must have shape (8,), the last size of `x`; got (7,)."),
        bad("groups", lambda d: {"groups": 3}, ValueError,
            "`groups` must divide 8, the last size of `x`; got 3."),
        bad("groups float", lambda d: {"groups": 2.0}, ValueError,
            "`groups` must be an integer; got 2.0."),
        bad("activation", lambda d: {"activation": "relu"}, ValueError,
            "`activation` must be one of 'silu', 'sigmoid'; got 'relu'."),
        bad("eps", lambda d: {"eps": None}, TypeError, "`eps` must be a number; got NoneType."),
    ),
    kernels=kernels,
    benchmarks=benchmarks(
        lambda d, N, D: {"x": d.normal(N, D), "gate": d.normal(N, D), "weight": d.normal(D)}, 6, 10
    ),
    huge=Case(
        "532480x4096",
        lambda d: {
            "x": d.normal(8192, 4096).repeat(65, 1),
            "gate": d.normal(8192, 4096).repeat(65, 1),
            "weight": d.normal(4096),
        },
    ),
)  # fmt: skip
