"""Facts about fused_linear_logprobs."""

import torch
import torch.nn.functional as F

from liger_fn.functional import fused_linear_logprobs
from liger_fn.functional.linear_loss import logprobs as room
from liger_fn.testing.spec import BadCall, Benchmark, Case, Compilation, OpSpec
from liger_fn.testing.specs.cross_entropy import targets
from liger_fn.testing.specs.logprobs import (
    ALL,
    EVERYTHING_BWD,
    EVERYTHING_FWD,
    as_trainers_write_it,
    compilation_bwd,
    compilation_fwd,
)


def case(*shape: int, id: str = "", bias: bool = False, **options) -> Case:
    """A case of x (..., H) and a weight (V, H); the shape is (..., H, V)."""
    *rows, H, V = shape

    def make(draw):
        arguments = {
            "weight": draw.normal(V, H, scale=max(1, H) ** -0.5),
            "x": draw.normal(*rows, H),
            "y": targets(draw, V, *rows, ignore_index=options.get("ignore_index", -100)),
            **options,
        }
        if bias:
            arguments["bias"] = draw.normal(V)
        return arguments

    return Case(id or "x".join(map(str, shape)), make)


def as_models_write_it(
    weight, x, y, chunk_size=None, *, bias=None, max_valid=None, memory_budget=None,
    accum_dtype=None, **options,
):  # fmt: skip
    return as_trainers_write_it(F.linear(x, weight, bias), y, **options)


def benchmark(N: int, H: int, V: int, **options) -> Benchmark:
    return Benchmark(
        "-".join([f"{N}x{H}x{V}", *options]),
        lambda draw: {
            "weight": draw.normal(V, H, scale=H**-0.5),
            "x": draw.normal(N, H),
            "y": draw.integers(V, N),
            **options,
        },
        flops_fwd=2 * N * H * V,
        flops_bwd=6 * N * H * V,
    )


def kernels() -> list[Compilation]:
    return [
        compilation
        for V in (32000, 50257, 262144)
        for compilation in (
            compilation_fwd(f"chunk-{V}", V),
            compilation_fwd(f"chunk-{V}-everything", V, **EVERYTHING_FWD),
            compilation_bwd(f"chunk-{V}", V),
            compilation_bwd(f"chunk-{V}-everything", V, **EVERYTHING_BWD),
        )
    ]


def _good(draw) -> dict:
    return {"weight": draw.normal(8, 6), "x": draw.normal(4, 6), "y": draw.integers(8, 4)}


def bad(id: str, change, error: type[Exception], sentence: str) -> BadCall:
    return BadCall(id, lambda draw: _good(draw) | change(draw), error, sentence)


SPEC = OpSpec(
    op=fused_linear_logprobs,
    reference=room.reference,
    baseline=as_models_write_it,
    grads=("weight", "x", "bias"),
    rows=("x", "y"),
    autocast=True,
    # The product of a chunk may add up in another order than that of all rows, so that not the same
    # logits are rounded to 2 bytes: each error is a draw of its own.
    slack={torch.bfloat16: 1.1, torch.float16: 1.1},
    cases=(
        case(4, 3, 7, chunk_size=3, bias=True, lse=True, entropy=True, id="chunks-of-3"),
        case(2, 3, 5, 9, id="one-chunk"),
        case(5, 4, 7, chunk_size=2, bias=True, top1=True, id="top1"),
        case(4, 3, 7, softcap=2.0, logit_scale=0.5, temperature=0.7, entropy=True, id="tempered"),
        case(4, 3, 7, chunk_size=3, ignore_index=2, entropy=True, id="ignore-index"),
        case(6, 3, 7, memory_budget=64, max_valid=5, entropy=True, id="some-rows"),
    ),
    sizes=(
        case(6, 9, **ALL, id="single-row"),
        case(0, 6, 9, **ALL),
        case(3, 5, 1, **ALL),
        case(3, 0, 5, bias=True, entropy=True, id="no-features"),
        case(2, 7, 16, 130, chunk_size=4, entropy=True),
        case(40, 64, 1000, chunk_size=16),
        case(37, 64, 1000, chunk_size=16, entropy=True, id="37x64x1000-entropy"),
        case(3, 32, 20000, chunk_size=2, entropy=True, id="beyond-one-slab"),
        case(5, 16, 64, chunk_size=100, id="chunk-larger-than-all"),
    ),
    errors=(
        bad("x integer", lambda d: {"x": d.integers(3, 4, 6)}, TypeError,
            "`x` must have a floating-point dtype"),
        bad("x scalar", lambda d: {"x": d.normal()}, ValueError,
            "`x` must have at least one dimension"),
        bad("weight dtype", lambda d: {"weight": d.normal(8, 6, dtype=torch.float64)}, TypeError,
            "`weight` must have the dtype of `x`, torch.float32; got torch.float64."),
        bad("weight device", lambda d: {"weight": torch.ones(8, 6, device="meta")}, ValueError,
            "`weight` must be on the device of `x`"),
        bad("weight vector", lambda d: {"weight": d.normal(6)}, ValueError,
            "`weight` must have shape (V, H) with at least one class; got (6,)."),
        bad("weight shape", lambda d: {"weight": d.normal(8, 5)}, ValueError,
            "`weight` must have shape (8, 6), (V, H) with the last size of `x`; got (8, 5)."),
        bad("y float", lambda d: {"y": d.normal(4)}, TypeError, "`y` must have an integer dtype"),
        bad("y shape", lambda d: {"y": d.integers(8, 5)}, ValueError,
            "`y` must have shape (4,), that of `x` without its last dimension; got (5,)."),
        bad("bias shape", lambda d: {"bias": d.normal(7)}, ValueError,
            "`bias` must have shape (8,), one per class; got (7,)."),
        bad("bias dtype", lambda d: {"bias": d.normal(8, dtype=torch.bfloat16)}, TypeError,
            "`bias` must have the dtype of `x`"),
        bad("chunk_size zero", lambda d: {"chunk_size": 0}, ValueError,
            "`chunk_size` must be a positive integer, or None; got 0."),
        bad("temperature", lambda d: {"temperature": -1.0}, ValueError,
            "`temperature` must be positive; got -1.0."),
        bad("softcap", lambda d: {"softcap": -1.0}, ValueError,
            "`softcap` must be positive, or None; got -1.0."),
        bad("memory_budget zero", lambda d: {"memory_budget": 0}, ValueError,
            "`memory_budget` must be a positive number of bytes, or None; got 0."),
        bad("max_valid negative", lambda d: {"max_valid": -1}, ValueError,
            "`max_valid` must be a whole number of rows, or None; got -1."),
        bad("accum_dtype", lambda d: {"accum_dtype": torch.float16}, ValueError,
            "`accum_dtype` must be torch.float32 for `x` of torch.float32, or None; got"),
        bad("too many classes",
            lambda d: {
                "weight": torch.empty((1 << 24) + 1, 6, device="meta"),
                "x": torch.empty(4, 6, device="meta"),
                "y": torch.empty(4, dtype=torch.int64, device="meta"),
                "top1": True,
            },
            NotImplementedError,
            "`weight` must have at most 16777216 classes where top1 is asked for; got 16777217."),
    ),
    kernels=kernels,
    benchmarks=(
        *(benchmark(*s) for s in ((8192, 4096, 128256), (8192, 4096, 151936))),
        benchmark(8192, 4096, 151936, entropy=True),
        benchmark(8192, 4096, 151936, entropy=True, top1=True),
    ),
)  # fmt: skip
