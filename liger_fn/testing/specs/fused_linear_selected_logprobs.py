"""Facts about fused_linear_selected_logprobs."""

import inspect

import torch
import torch.nn.functional as F
import triton.language as tl

from liger_fn.functional import fused_linear_selected_logprobs
from liger_fn.functional.linear_loss import selected_logprobs as room
from liger_fn.testing.spec import BadCall, Benchmark, Case, Compilation, OpSpec


def case(*shape: int, id: str = "", bias: bool = False, **options) -> Case:
    """A case of x (..., H), a weight (V, H) and K tokens a row; the shape is (..., H, V, K)."""
    *rows, H, V, K = shape

    def make(draw):
        indices = draw.integers(V, *rows, K)
        if "ignore_index" in options:
            indices.view(-1)[1::4] = options["ignore_index"]
        arguments = {
            "weight": draw.normal(V, H, scale=max(1, H) ** -0.5),
            "x": draw.normal(*rows, H),
            "indices": indices,
            **options,
        }
        return arguments | ({"bias": draw.normal(V)} if bias else {})

    return Case(id or "x".join(map(str, shape)), make)


def as_trainers_write_it(
    weight, x, indices, chunk_size=None, *, bias=None, temperature=1.0, logit_scale=1.0,
    softcap=None, ignore_index=-100,
):  # fmt: skip
    """log_softmax of logits read as float32, and a gather."""
    logits = F.linear(x, weight, bias)
    z = logits.to(room.accumulator(logits.dtype)) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    ignored = indices == ignore_index
    log_p = (z / temperature).log_softmax(-1)
    return log_p.gather(-1, indices.long().masked_fill(ignored, 0)).masked_fill(ignored, 0.0)


def benchmark(N: int, H: int, V: int, K: int) -> Benchmark:
    return Benchmark(
        f"{N}x{H}x{V}-{K}-tokens",
        lambda draw: {
            "weight": draw.normal(V, H, scale=H**-0.5),
            "x": draw.normal(N, H),
            "indices": draw.integers(V, N, K),
        },
        flops_fwd=2 * N * H * V,
        flops_bwd=6 * N * H * V,
    )


def kernels() -> list[Compilation]:
    def compiled(id: str, kernel, K: int) -> Compilation:
        constants = room._options(K, 30.0, 0.5, torch.float32)
        warps = constants.pop("num_warps")
        constants["COMPUTE"] = tl.float32
        types = {"logits_ptr": "*bf16", "dlogits_ptr": "*bf16", "indices_ptr": "*i64"}
        runtime = [n for n in inspect.signature(kernel.fn).parameters if n not in constants]
        signature = {n: types.get(n, "*fp32" if n.endswith("_ptr") else "i32") for n in runtime}
        return Compilation(f"{id}-{K}", kernel, signature, constants, warps)

    return [
        compilation
        for K in (1, 64, 1000)
        for compilation in (
            compiled("fwd", room._fused_linear_selected_logprobs_fwd_kernel, K),
            compiled("bwd", room._fused_linear_selected_logprobs_bwd_kernel, K),
        )
    ]


def bad(id: str, change, error: type[Exception], sentence: str) -> BadCall:
    def make(draw):
        good = {"weight": draw.normal(8, 6), "x": draw.normal(4, 6)}
        return good | {"indices": draw.integers(8, 4, 3)} | change(draw)

    return BadCall(id, make, error, f"fused_linear_selected_logprobs: {sentence}")


SPEC = OpSpec(
    op=fused_linear_selected_logprobs,
    reference=room.reference,
    baseline=as_trainers_write_it,
    grads=("weight", "x", "bias"),
    rows=("x", "indices"),
    autocast=True,
    cases=(
        case(4, 3, 7, 5, chunk_size=3, bias=True, id="chunks-of-3"),
        case(2, 3, 6, 9, 2, id="one-chunk"),
        case(4, 3, 7, 3, softcap=2.0, logit_scale=0.5, temperature=0.7, id="tempered"),
        case(5, 3, 7, 4, chunk_size=2, ignore_index=-100, id="ignore-index"),
    ),
    sizes=(
        case(6, 9, 3, id="single-row"),
        case(0, 6, 9, 2),
        case(3, 5, 1, 2),
        case(3, 0, 5, 2, bias=True, id="no-features"),
        case(40, 64, 1000, 64, chunk_size=16),
        case(3, 32, 20000, 300, chunk_size=2, ignore_index=3, id="beyond-one-slab"),
        case(5, 16, 64, 1, chunk_size=100, id="chunk-larger-than-all"),
    ),
    errors=(
        bad("x integer", lambda d: {"x": d.integers(3, 4, 6)}, TypeError,
            "`x` must have a floating-point dtype"),
        bad("weight shape", lambda d: {"weight": d.normal(8, 5)}, ValueError,
            "`weight` must have shape (8, 6), (V, H) with the last size of `x`; got (8, 5)."),
        bad("indices float", lambda d: {"indices": d.normal(4, 3)}, TypeError,
            "`indices` must have an integer dtype"),
        bad("indices rows", lambda d: {"indices": d.integers(8, 5, 3)}, ValueError,
            "`indices` must have shape (4, 3), that of `x` but for its last size; got (5, 3)."),
        bad("no indices", lambda d: {"indices": d.integers(8, 4, 0)}, ValueError,
            "`indices` must name at least one token a row; got a last size of 0."),
        bad("indices device", lambda d: {"indices": d.integers(8, 4, 3).to("meta")}, ValueError,
            "`indices` must be on the device of `x`"),
        bad("bias shape", lambda d: {"bias": d.normal(7)}, ValueError,
            "`bias` must have shape (8,), one per class; got (7,)."),
        bad("chunk_size", lambda d: {"chunk_size": 0}, ValueError,
            "`chunk_size` must be a positive integer, or None; got 0."),
        bad("temperature", lambda d: {"temperature": -1.0}, ValueError,
            "`temperature` must be positive; got -1.0."),
    ),
    kernels=kernels,
    benchmarks=(benchmark(8192, 2048, 128256, 64), benchmark(8192, 4096, 151936, 256)),
)  # fmt: skip
