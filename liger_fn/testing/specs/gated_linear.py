"""Facts about gated_linear, whose kernels are those of gated_activation."""

import torch

from liger_fn.functional import gated_linear
from liger_fn.functional.core.launch import interpreted
from liger_fn.functional.mlp import gated_linear as room
from liger_fn.testing.spec import BadCall, Benchmark, Case, OpSpec

GPT_OSS = {"alpha": 1.702, "limit": 7.0, "up_offset": 1.0, "interleaved": True}


def arguments(draw, rows, F: int, D: int, packed: bool = False, bias: bool = False) -> dict:
    return {
        "gate": draw.normal(*rows, 2 * F if packed else F),
        "up": None if packed else draw.normal(*rows, F),
        "weight": draw.normal(D, F, scale=F**-0.5),
        **({"bias": draw.normal(D)} if bias else {}),
    }


def case(
    *rows: int, F: int, D: int, id: str, packed: bool = False, bias: bool = False, **options
) -> Case:
    return Case(id, lambda draw: arguments(draw, rows, F, D, packed, bias) | options)


def benchmark(id: str, T: int, D: int, F: int) -> Benchmark:
    work = 2 * T * D * F
    return Benchmark(
        f"{id}-{T}",
        lambda draw: arguments(draw, (1, T), F, D),
        flops_fwd=work,
        flops_bwd=2 * work,
    )


def bad(id: str, change, error: type[Exception], sentence: str) -> BadCall:
    def make(draw):
        return arguments(draw, (4,), 6, 5) | change(draw)

    return BadCall(id, make, error, f"gated_linear: {sentence}")


SPEC = OpSpec(
    op=gated_linear,
    reference=room.reference,
    grads=("gate", "up", "weight", "bias"),
    rows=("gate", "up"),
    autocast=("gate", "up", "weight", "bias"),
    # The interpreter cuts bfloat16 off where the chip rounds it: errors of the activation have one
    # sign, and the products after it add them up.
    slack={torch.bfloat16: 8.0} if interpreted() else {},
    # PyTorch 2.11 can do that of no linear layer with a bias.
    symbolic=torch.__version__ >= (2, 12),
    cases=(
        case(4, F=5, D=3, id="swiglu"),
        case(2, 3, F=4, D=5, packed=True, bias=True, id="gpt-oss", **{**GPT_OSS, "limit": 0.8}),
        case(3, F=4, D=2, packed=True, activation="gelu_pytorch_tanh", id="geglu-packed"),
        case(F=4, D=3, bias=True, id="a-token"),
    ),
    sizes=(
        case(0, F=4, D=3, bias=True, id="no-tokens"),
        case(3, F=2, D=0, bias=True, id="no-outputs"),
        case(3, F=1, D=1, id="one-of-all"),
        case(70, F=48, D=40, packed=True, bias=True, id="ragged"),
        case(2, 5, F=1100, D=24, id="wide"),
    ),
    errors=(
        bad("gate integer", lambda d: {"gate": d.integers(3, 4, 6)}, TypeError,
            "`gate` must have a floating-point dtype"),
        bad("gate odd", lambda d: {"gate": d.normal(4, 9), "up": None}, ValueError,
            "`gate` must have an even last size when `up` is None; got 9."),
        bad("up shape", lambda d: {"up": d.normal(4, 5)}, ValueError,
            "`up` must have shape (4, 6), the shape of `gate`; got (4, 5)."),
        bad("weight dtype", lambda d: {"weight": d.normal(5, 6).half()}, TypeError,
            "`weight` must have the dtype of `gate`, torch.float32; got torch.float16."),
        bad("weight shape", lambda d: {"weight": d.normal(6, 5)}, ValueError,
            "`weight` must have shape (D, 6), (D, F) with the width of the unit, at least 1; "
            "got (6, 5)."),
        bad("weight device", lambda d: {"weight": torch.ones(5, 6, device="meta")}, ValueError,
            "`weight` must be on the device of `gate`"),
        bad("bias shape", lambda d: {"bias": d.normal(6)}, ValueError,
            "`bias` must have shape (5,), (D,); got (6,)."),
        bad("activation", lambda d: {"activation": "tan"}, ValueError,
            "`activation` must be one of"),
        bad("interleaved", lambda d: {"interleaved": True}, ValueError,
            "`interleaved` must be False unless `up` is None; got True."),
    ),
    benchmarks=(
        benchmark("llama-3-8b", 8192, 4096, 14336),
        benchmark("qwen3-4b", 8192, 2560, 9728),
        benchmark("llama-3.2-1b", 8192, 2048, 8192),
    ),
)  # fmt: skip
