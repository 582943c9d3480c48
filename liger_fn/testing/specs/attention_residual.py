"""Facts about attention_residual."""

import inspect
from itertools import product

import torch
import triton.language as tl

from liger_fn.functional import attention_residual
from liger_fn.functional.residual import attention_residual as room
from liger_fn.testing.spec import (
    BadCall,
    Benchmark,
    Case,
    Compilation,
    Config,
    Launch,
    OpSpec,
    around,
)


def arguments(draw, *shape: int, weight: bool = True, scale: float = 1.0) -> dict:
    D = max(shape[-1], 1)
    return {
        "values": draw.normal(*shape, scale=scale),
        # Scores of size 1: the softmax is neither flat nor one-hot.
        "query": draw.normal(shape[-1], scale=D**-0.5),
        "weight": draw.normal(shape[-1]) if weight else None,
    }


def case(*shape: int, weight: bool = True, scale: float = 1.0, id: str = "", **options) -> Case:
    def make(draw):
        return arguments(draw, *shape, weight=weight, scale=scale) | options

    return Case(id or "x".join(map(str, shape)), make)


def as_models_write_it(values, query, weight=None, *, dim=0, eps=1e-6):
    """Keys rounded to the dtype of the values, as a norm module returns them."""
    keys = torch.nn.functional.rms_norm(values, values.shape[-1:], weight, eps)
    alpha = (keys * query).sum(-1).softmax(dim)
    return (alpha[..., None] * values).sum(dim)


def kernels() -> list[Compilation]:
    out = []
    shapes = (8, 4096), (16, 2048), (9, 7168), (24, 5120), (64, 4096), (12, 128)
    hopper, ampere = ((90, 100), 1 << 18), ((80,), 166912)
    # A query times a weight is in float32; one alone is as it was given.
    variants = [(q, chips, True) for q in ("*fp32", "*bf16") for chips in (hopper, ampere)]
    variants.append(("*bf16", hopper, False))
    for (L, D), passed, (query, (own, shared), in_vectors) in product(
        shapes, ("fwd", "bwd"), variants
    ):
        config = room._attention_residual_config(L, D, 2, shared, passed == "bwd")
        wide = "" if config.pop("per_sm", None) else "_wide"
        kernel = getattr(room, f"_attention_residual_{passed}{wide}_kernel")
        constants = {
            "COMPUTE": tl.float32,
            "IN_VECTORS": in_vectors,
            **({"EPS": 1e-6} if passed == "fwd" else {}),
            **config,
        }
        warps = constants.pop("num_warps")
        runtime = [n for n in inspect.signature(kernel.fn).parameters if n not in constants]
        types = {"query_ptr": query} | dict.fromkeys(
            ("score_ptr", "rstd_ptr", "dquery_part_ptr"), "*fp32"
        )
        signature = {n: types.get(n, "*bf16" if n.endswith("_ptr") else "i32") for n in runtime}
        id = f"{passed}-{L}x{D}-{query.removeprefix('*')}{'' if in_vectors else '-apart'}"
        out.append(Compilation(id, kernel, signature, constants, warps, chips=own))
    return out


def bad(id: str, change, error: type[Exception], sentence: str) -> BadCall:
    def make(draw):
        return arguments(draw, 3, 4, 8) | change(draw)

    return BadCall(id, make, error, f"attention_residual: {sentence}")


def candidates(current: Config) -> list[Config]:
    """A token that is held has one width; a wide one is cut at any."""
    if "per_sm" in current:
        tried = around(
            per_thread=(16, 256), BLOCK_N=(1, 2), num_warps=(4, 8, 16), STAGES=(2, 3), per_sm=(1, 2)
        )
    else:
        tried = around(
            ("BLOCK_L", "BLOCK_D"),
            per_thread=(16, 256),
            BLOCK_D=(256, 512, 1024, 2048),
            num_warps=(2, 4, 8),
        )
    return tried(current)


def benchmark(L: int, T: int, D: int) -> Benchmark:
    return Benchmark(
        f"{L}x{T}x{D}",
        lambda draw: arguments(draw, L, 1, T, D),
        bytes_fwd=2 * T * D * (L + 1),
        bytes_bwd=2 * T * D * (2 * L + 1),
    )


SPEC = OpSpec(
    op=attention_residual,
    reference=room.reference,
    baseline=as_models_write_it,
    grads=("values", "query", "weight"),
    rows=("values",),
    cases=(
        # Depth behind the tokens, so that the first size is free.
        case(4, 3, 8, dim=1),
        case(3, 2, 4, 5, id="depth-first"),
        case(2, 3, 4, 6, weight=False, dim=-2, eps=0.5, id="depth-last"),
        case(1, 4, 3, id="one-block"),
    ),
    sizes=(
        case(5, 7),
        case(3, 0, 16),
        case(3, 4, 0),
        case(2, 3, 1),
        case(40, 5, 33, id="forty-blocks"),
        case(3, 70, 130, id="strips"),
        case(3, 2, 5000, id="wide"),
        case(5, 4, 64, scale=100.0, id="large"),
        case(5, 4, 64, scale=1e-3, id="tiny"),
    ),
    errors=(
        bad("values integer", lambda d: {"values": d.integers(3, 3, 4, 8)}, TypeError,
            "`values` must have a floating-point dtype"),
        bad("values empty list", lambda d: {"values": []}, TypeError,
            "`values` must be a tensor; got list."),
        bad("values of two shapes", lambda d: {"values": [d.normal(4, 8), d.normal(3, 8)]},
            ValueError, "`values` must have shape (4, 8), that of `values[0]`; got (3, 8)."),
        bad("dim past a list", lambda d: {"values": [d.normal(4, 8)] * 2, "dim": 3}, ValueError,
            "`dim` must name a dimension of `values` but the last; got 3."),
        bad("values row", lambda d: {"values": d.normal(8)}, ValueError,
            "`values` must have shape (L, ..., D); got shape (8,)."),
        bad("no blocks", lambda d: {"values": d.normal(0, 4, 8)}, ValueError,
            "`values` must be of at least one block; got shape (0, 4, 8)."),
        bad("query shape", lambda d: {"query": d.normal(7)}, ValueError,
            "`query` must have shape (8,), the last size of `values`; got (7,)."),
        bad("query integer", lambda d: {"query": d.integers(3, 8)}, TypeError,
            "`query` must have a floating-point dtype"),
        bad("query device", lambda d: {"query": torch.ones(8, device="meta")}, ValueError,
            "`query` must be on the device of `values`"),
        bad("weight shape", lambda d: {"weight": d.normal(4, 8)}, ValueError,
            "`weight` must have shape (8,), the last size of `values`; got (4, 8)."),
        bad("dim last", lambda d: {"dim": 2}, ValueError,
            "`dim` must name a dimension of `values` but the last; got 2."),
        bad("dim -1", lambda d: {"dim": -1}, ValueError,
            "`dim` must name a dimension of `values` but the last; got -1."),
        bad("dim None", lambda d: {"dim": None}, TypeError, "`dim` must be a number"),
        bad("eps", lambda d: {"eps": None}, TypeError, "`eps` must be a number; got NoneType."),
    ),
    kernels=kernels,
    benchmarks=(benchmark(8, 8192, 4096), benchmark(9, 4096, 7168), benchmark(16, 8192, 2048)),
    launches=tuple(
        Launch(room, "_attention_residual_config", mode, candidates) for mode in ("fwd", "bwd")
    ),
    huge=Case(
        "65x8x8192x512",
        lambda d: arguments(d, 8192, 8, 512) | {
            "values": d.normal(8192, 8, 512).repeat(65, 1, 1), "dim": 1
        },
    ),
)  # fmt: skip
