"""Facts about embedding."""

import inspect

import torch
import torch.nn.functional as F
import triton.language as tl

from liger_fn.functional import embedding
from liger_fn.functional.embedding import embedding as room
from liger_fn.testing.spec import BadCall, Benchmark, Case, Compilation, OpSpec


def case(*shape: int, V: int, D: int, id: str = "", **options) -> Case:
    def make(draw):
        return {"input": draw.integers(V, *shape), "weight": draw.normal(V, D), **options}

    return Case(id or f"{'x'.join(map(str, shape))}-of-{V}x{D}", make)


def as_torch(input, weight, *, padding_idx=None):
    if weight.shape[1] == 0:
        # On a GPU an illegal access was seen here, where no kernel of ours launches.
        return room.reference(input, weight, padding_idx=padding_idx)
    return F.embedding(input.long(), weight, padding_idx)


def kernels() -> list[Compilation]:
    sums = {"CHUNK": room._CHUNK, "COMPUTE": tl.float32}
    passes = {
        "fwd": (room._embedding_fwd_kernel, room._embedding_fwd_config, {}),
        "bwd": (room._embedding_bwd_kernel, room._embedding_bwd_config, sums),
        "bwd-parts": (room._embedding_bwd_parts_kernel, room._embedding_bwd_parts_config, sums),
        "bwd-long": (room._embedding_bwd_long_kernel, room._embedding_bwd_long_config, sums),
    }
    others = dict.fromkeys(("input_ptr", "order_ptr", "starts_ptr"), "*i64")
    others |= {"numbers_ptr": "*i32", "parts_ptr": "*fp32"}
    out = [
        Compilation(
            name,
            kernel,
            {
                n: others.get(n, "i32")
                for n in inspect.signature(kernel.fn).parameters
                if n != block
            },
            {block: 256},
        )
        for name, kernel, block in (
            ("numbers", room._embedding_numbers_kernel, "BLOCK_N"),
            ("starts", room._embedding_starts_kernel, "BLOCK_V"),
        )
    ]
    for name, (kernel, config, constants) in passes.items():
        for D in (96, 4096):
            options = {**constants, **config(D)}
            warps = options.pop("num_warps")
            runtime = [n for n in inspect.signature(kernel.fn).parameters if n not in options]
            signature = {
                n: others.get(n, "*bf16" if n.endswith("_ptr") else "i32") for n in runtime
            }
            out.append(Compilation(f"{name}-{D}", kernel, signature, options, warps))
    return out


def benchmark(N: int, V: int, D: int) -> Benchmark:
    return Benchmark(
        f"{N}-of-{V}x{D}",
        lambda d: {"input": d.integers(V, N), "weight": d.normal(V, D)},
        bytes_fwd=4 * N * D,
        bytes_bwd=2 * N * D + 2 * V * D,
    )


def bad(id: str, change, error: type[Exception], sentence: str) -> BadCall:
    def make(draw):
        return {"input": draw.integers(7, 4), "weight": draw.normal(7, 8)} | change(draw)

    return BadCall(id, make, error, f"embedding: {sentence}")


SPEC = OpSpec(
    op=embedding,
    reference=room.reference,
    baseline=as_torch,
    grads=("weight",),
    rows=("input",),
    cases=(
        case(5, V=6, D=3),
        case(2, 3, V=9, D=5, id="batch"),
        case(V=3, D=4, id="one-number"),
    ),
    sizes=(
        case(0, V=4, D=8),
        # Not among the cases: the row has a slope, and by decree no gradient.
        case(20, V=4, D=5, padding_idx=2, id="padding"),
        case(7, V=1, D=5),
        case(7, V=6, D=0),
        # Numbers that begin and end within chunks of 64 and at their ends, or fill several.
        case(100, V=3, D=33, id="much-repeated"),
        case(700, V=2, D=600, id="filling-chunks"),
        Case("two-chunks", lambda d: {"input": d.integers(1, 128), "weight": d.normal(3, 8)}),
        case(9, V=50, D=3000, padding_idx=-1, id="wide"),
        Case("int32", lambda d: {"input": d.integers(9, 5).int(), "weight": d.normal(9, 64)}),
        Case("uint8", lambda d: {"input": d.integers(9, 5).byte(), "weight": d.normal(9, 64)}),
    ),
    errors=(
        bad("input float", lambda d: {"input": d.normal(4)}, TypeError,
            "`input` must have an integer dtype"),
        bad("weight integer", lambda d: {"weight": d.integers(3, 7, 8)}, TypeError,
            "`weight` must have a floating-point dtype"),
        bad("weight vector", lambda d: {"weight": d.normal(7)}, ValueError,
            "`weight` must be a matrix; got shape (7,)."),
        bad("no rows", lambda d: {"weight": d.normal(0, 8)}, ValueError,
            "`weight` must have at least one row; got none."),
        bad("weight device", lambda d: {"weight": torch.ones(7, 8, device="meta")}, ValueError,
            "`weight` must be on the device of `input`"),
        bad("padding_idx", lambda d: {"padding_idx": 7}, ValueError,
            "`padding_idx` must be between -7 and 6; got 7."),
        bad("padding_idx float", lambda d: {"padding_idx": 0.5}, ValueError,
            "`padding_idx` must be an integer; got 0.5."),
    ),
    kernels=kernels,
    benchmarks=(benchmark(8192, 128256, 4096), benchmark(16384, 32000, 4096)),
    huge=Case(
        "2^31", lambda d: {"input": d.integers(64, (1 << 19) + 64), "weight": d.normal(64, 4096)}
    ),
)  # fmt: skip
