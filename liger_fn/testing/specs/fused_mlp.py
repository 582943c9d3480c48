"""Facts about fused_mlp, whose kernels are those of gated_activation."""

import torch

from liger_fn.functional import fused_mlp
from liger_fn.functional.core.launch import interpreted
from liger_fn.functional.mlp import fused_mlp as room
from liger_fn.testing.spec import BadCall, Benchmark, Case, OpSpec

PARAMETERS = ("gate_up", "down", "gate_up_bias", "down_bias")
GPT_OSS = {"alpha": 1.702, "limit": 7.0, "up_offset": 1.0, "interleaved": True}


def arguments(draw, rows, D: int, F: int, bias: bool = False) -> dict:
    given = {
        "x": draw.normal(*rows, D),
        "gate_up": draw.normal(2 * F, D, scale=max(D, 1) ** -0.5),
        "down": draw.normal(D, F, scale=F**-0.5),
    }
    if bias:
        given |= {"gate_up_bias": draw.normal(2 * F), "down_bias": draw.normal(D)}
    return given


def case(*rows: int, D: int, F: int, id: str, bias: bool = False, **options) -> Case:
    return Case(id, lambda draw: arguments(draw, rows, D, F, bias) | options)


def benchmark(id: str, T: int, D: int, F: int) -> Benchmark:
    work = 6 * T * D * F
    return Benchmark(
        f"{id}-{T}",
        lambda draw: arguments(draw, (1, T), D, F),
        flops_fwd=work,
        flops_bwd=2 * work,
    )


def bad(id: str, change, error: type[Exception], sentence: str) -> BadCall:
    def make(draw):
        return arguments(draw, (4,), 6, 5) | change(draw)

    return BadCall(id, make, error, f"fused_mlp: {sentence}")


SPEC = OpSpec(
    op=fused_mlp,
    reference=room.reference,
    grads=("x", *PARAMETERS),
    rows=("x",),
    autocast=("x", *PARAMETERS),
    # The interpreter cuts bfloat16 off where the chip rounds it: errors of the activation and of
    # its gradient have one sign, and the products after them add them up.
    slack={torch.bfloat16: 8.0} if interpreted() else {},
    # PyTorch 2.11 can do that of no linear layer with a bias.
    symbolic=torch.__version__ >= (2, 12),
    cases=(
        case(4, D=5, F=3, id="swiglu"),
        case(2, 3, D=4, F=3, bias=True, recompute=False, id="gpt-oss", **{**GPT_OSS, "limit": 0.8}),
        case(3, D=4, F=2, activation="gelu_pytorch_tanh", recompute=False, id="geglu-kept"),
        case(D=4, F=3, bias=True, id="a-token"),
    ),
    sizes=(
        case(0, D=4, F=3, bias=True, id="no-tokens"),
        case(3, D=0, F=2, bias=True, recompute=False, id="no-features"),
        case(3, D=1, F=1, id="one-of-all"),
        case(70, D=48, F=40, bias=True, id="ragged"),
        case(2, 5, D=24, F=1100, id="wide"),
    ),
    errors=(
        bad("x integer", lambda d: {"x": d.integers(3, 4, 6)}, TypeError,
            "`x` must have a floating-point dtype"),
        bad("x scalar", lambda d: {"x": d.normal()}, ValueError,
            "`x` must have at least one dimension"),
        bad("gate_up dtype", lambda d: {"gate_up": d.normal(10, 6).half()}, TypeError,
            "`gate_up` must have the dtype of `x`, torch.float32; got torch.float16."),
        bad("gate_up odd", lambda d: {"gate_up": d.normal(9, 6)}, ValueError,
            "`gate_up` must have shape (2F, D) with a width F of at least 1; got (9, 6)."),
        bad("gate_up width", lambda d: {"gate_up": d.normal(10, 5)}, ValueError,
            "`gate_up` must have shape (10, 6), (2F, D) with the last size of `x`; got (10, 5)."),
        bad("down shape", lambda d: {"down": d.normal(5, 6)}, ValueError,
            "`down` must have shape (6, 5), (D, F) with the sizes of `gate_up`; got (5, 6)."),
        bad("down device", lambda d: {"down": torch.ones(6, 5, device="meta")}, ValueError,
            "`down` must be on the device of `x`"),
        bad("gate_up_bias shape", lambda d: {"gate_up_bias": d.normal(5)}, ValueError,
            "`gate_up_bias` must have shape (10,), (2F,); got (5,)."),
        bad("down_bias shape", lambda d: {"down_bias": d.normal(5)}, ValueError,
            "`down_bias` must have shape (6,), (D,); got (5,)."),
        bad("activation", lambda d: {"activation": "tan"}, ValueError,
            "`activation` must be one of"),
        bad("limit", lambda d: {"limit": -1.0}, ValueError,
            "`limit` must be positive, or None; got -1.0."),
    ),
    benchmarks=(
        benchmark("llama-3-8b", 8192, 4096, 14336),
        benchmark("qwen3-4b", 8192, 2560, 9728),
        benchmark("llama-3.2-1b", 8192, 2048, 8192),
    ),
)  # fmt: skip
