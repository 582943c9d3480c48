"""Facts about fused_moe."""

import inspect

import torch
import triton.language as tl

from liger_fn.functional import fused_moe
from liger_fn.functional.core.launch import interpreted
from liger_fn.functional.mlp import moe as room
from liger_fn.testing.spec import BadCall, Benchmark, Case, Compilation, OpSpec

PARAMETERS = ("gate_up", "down", "gate_up_bias", "down_bias")
GPT_OSS = {"alpha": 1.702, "limit": 7.0, "up_offset": 1.0, "interleaved": True}


def arguments(draw, rows, D: int, F: int, E: int, K: int, bias: bool = False) -> dict:
    """Experts by a random order, so that a token has each at most once; weights are a softmax."""
    scores = draw.uniform(*rows, max(E, K), dtype=torch.float32)
    given = {
        "x": draw.normal(*rows, D),
        "indices": scores.argsort(-1)[..., :K],
        "weights": draw.normal(*rows, K, dtype=torch.float32).softmax(-1).to(draw.dtype),
        "gate_up": draw.normal(E, 2 * F, D, scale=max(D, 1) ** -0.5),
        "down": draw.normal(E, D, F, scale=F**-0.5),
    }
    if bias:
        given |= {"gate_up_bias": draw.normal(E, 2 * F), "down_bias": draw.normal(E, D)}
    return given


def case(
    *rows: int, D: int, F: int, E: int, K: int, id: str, bias: bool = False, change=None, **options
) -> Case:
    def make(draw):
        given = arguments(draw, rows, D, F, E, K, bias)
        if change:
            given |= change(given)
        return given | options

    return Case(id, make)


def _some_elsewhere(given: dict) -> dict:
    """Experts of other processes, as expert parallelism marks them."""
    indices = given["indices"].clone()
    indices.view(-1)[::3] = given["gate_up"].shape[0]
    indices.view(-1)[1::5] = -1
    return {"indices": indices}


def _all_of_one(given: dict) -> dict:
    """Every token twice the same expert; the others have none."""
    return {"indices": torch.full_like(given["indices"], 1)}


def benchmark(id: str, T: int, D: int, F: int, E: int, K: int, bias: bool = False, **options):
    work = 2 * T * K * 3 * D * F
    return Benchmark(
        f"{id}-{T}",
        lambda draw: arguments(draw, (T,), D, F, E, K, bias) | options,
        flops_fwd=work,
        flops_bwd=2 * work,
    )


def kernels() -> list[Compilation]:
    def compiled(id: str, kernel, pointers: dict | None = None, **constants) -> Compilation:
        warps = constants.pop("num_warps", 4)
        types = {
            "ends_ptr": "*i32",
            "order_ptr": "*i64",
            "place_ptr": "*i64",
            "experts_ptr": "*i64",
        }
        runtime = [n for n in inspect.signature(kernel.fn).parameters if n not in constants]
        signature = {n: types.get(n, "*bf16" if n.endswith("_ptr") else "i32") for n in runtime}
        return Compilation(id, kernel, signature | (pointers or {}), constants, warps)

    def product(dtype: torch.dtype, without: str = "") -> dict:
        config = room._product_config(dtype)
        return config | {"COMPUTE": room.triton_dtype(room.accumulator(dtype))}

    found = []
    for name, dtype in {
        "bf16": torch.bfloat16,
        "fp32": torch.float32,
        "fp64": torch.float64,
    }.items():
        inputs = dict.fromkeys(("rows_ptr", "weight_ptr", "bias_ptr", "out_ptr"), f"*{name}")
        found.append(
            compiled(
                f"rows-{name}",
                room._fused_moe_rows_kernel,
                inputs,
                BLOCK_E=128,
                HAS_BIAS=True,
                **product(dtype),
            )
        )
        inputs = dict.fromkeys(("left_ptr", "right_ptr", "out_ptr"), f"*{name}")
        found.append(
            compiled(f"outer-{name}", room._fused_moe_outer_kernel, inputs, **product(dtype))
        )
    wide = {"COMPUTE": tl.float32, "num_warps": 4}
    return [
        *found,
        compiled("sums", room._fused_moe_sums_kernel, WEIGHTED=True, BLOCK_N=32, BLOCK_F=64,
                 **wide),
        compiled("combine", room._fused_moe_combine_kernel, K=8, WEIGHTED=True, HAS_BIAS=True,
                 BLOCK_D=1024, **wide),
        compiled("weigh", room._fused_moe_weigh_kernel, HAS_BIAS=True, BLOCK=1024, **wide),
        compiled("finish", room._fused_moe_finish_kernel, HAS_BIAS=True, BLOCK_F=1024, **wide),
        compiled("clear", room._fused_moe_finish_kernel, HAS_BIAS=False, BLOCK_F=1024, **wide),
    ]  # fmt: skip


def bad(id: str, change, error: type[Exception], sentence: str) -> BadCall:
    def make(draw):
        return arguments(draw, (4,), 6, 5, 3, 2) | change(draw)

    return BadCall(id, make, error, f"fused_moe: {sentence}")


SPEC = OpSpec(
    op=fused_moe,
    reference=room.reference,
    grads=("x", "weights", *PARAMETERS),
    rows=("x", "indices", "weights"),
    autocast=("x", *PARAMETERS),
    # The interpreter cuts bfloat16 off where the chip rounds it: errors of the up to five results
    # of products and units that follow each other then have one sign and add up, to eight times
    # those of roundings.
    slack={torch.bfloat16: 8.0} if interpreted() else {},
    cases=(
        case(4, D=5, F=3, E=3, K=2, id="top-2-of-3"),
        case(2, 3, D=4, F=3, E=4, K=2, bias=True, id="gpt-oss", **{**GPT_OSS, "limit": 0.8}),
        case(17, D=8, F=6, E=3, K=2, bias=True, change=_some_elsewhere, activation="gelu",
             id="some-elsewhere"),
        case(4, D=3, F=2, E=3, K=2, change=_all_of_one, activation="relu2", id="all-of-one"),
        case(D=4, F=3, E=4, K=3, id="a-token"),
    ),
    sizes=(
        case(0, D=4, F=3, E=4, K=2, bias=True, id="no-tokens"),
        case(3, D=0, F=2, E=2, K=1, bias=True, id="no-features"),
        case(3, D=1, F=1, E=1, K=1, id="one-of-all"),
        case(40, D=48, F=40, E=8, K=2, bias=True, id="ragged"),
        case(150, D=40, F=24, E=2, K=2, id="beyond-one-tile"),
        case(9, D=24, F=16, E=70, K=4, id="more-experts-than-pairs"),
    ),
    errors=(
        bad("x integer", lambda d: {"x": d.integers(3, 4, 6)}, TypeError,
            "`x` must have a floating-point dtype"),
        bad("indices float", lambda d: {"indices": d.normal(4, 2)}, TypeError,
            "`indices` must have an integer dtype"),
        bad("indices rows", lambda d: {"indices": d.integers(3, 5, 2)}, ValueError,
            "`indices` must have shape (4, 2), that of `x` but for its last size; got (5, 2)."),
        bad("no experts", lambda d: {"indices": d.integers(3, 4, 0)}, ValueError,
            "`indices` must name at least one expert a token; got a last size of 0."),
        bad("weights shape", lambda d: {"weights": d.normal(4, 3)}, ValueError,
            "`weights` must have shape (4, 2), the shape of `indices`; got (4, 3)."),
        bad("gate_up dtype", lambda d: {"gate_up": d.normal(3, 10, 6).half()}, TypeError,
            "`gate_up` must have the dtype of `x`, torch.float32; got torch.float16."),
        bad("gate_up odd", lambda d: {"gate_up": d.normal(3, 9, 6)}, ValueError,
            "`gate_up` must have shape (E, 2F, D) with experts that have a width; got (3, 9, 6)."),
        bad("gate_up width", lambda d: {"gate_up": d.normal(3, 10, 5)}, ValueError,
            "`gate_up` must have shape (3, 10, 6), (E, 2F, D) with the last size of `x`; got"),
        bad("down shape", lambda d: {"down": d.normal(3, 5, 6)}, ValueError,
            "`down` must have shape (3, 6, 5), (E, D, F) with the sizes of `gate_up`; got"),
        bad("down device", lambda d: {"down": torch.ones(3, 6, 5, device="meta")}, ValueError,
            "`down` must be on the device of `x`"),
        bad("bias shape", lambda d: {"down_bias": d.normal(3, 5)}, ValueError,
            "`down_bias` must have shape (3, 6), (E, D); got (3, 5)."),
        bad("activation", lambda d: {"activation": "tan"}, ValueError,
            "`activation` must be one of"),
        bad("limit", lambda d: {"limit": -1.0}, ValueError,
            "`limit` must be positive, or None; got -1.0."),
    ),
    kernels=kernels,
    benchmarks=(
        benchmark("qwen3-30b-a3b", 4096, 2048, 768, 128, 8),
        benchmark("mixtral-8x7b", 4096, 4096, 14336, 8, 2),
        benchmark("gpt-oss-20b", 4096, 2880, 2880, 32, 4, bias=True, **GPT_OSS),
    ),
)  # fmt: skip
