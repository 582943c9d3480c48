"""What the specs of the gated linear units share."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from liger_fn.functional.activation import glu
from liger_fn.testing.spec import BadCall, Benchmark, Case, Compilation, Launch, around


def case(*shape: int, scale: float = 1.0, id: str = "", **options) -> Case:
    def make(draw):
        gate, up = draw.normal(*shape, scale=scale), draw.normal(*shape)
        return {"gate": gate, "up": up, **options}

    return Case(id or "x".join(map(str, shape)), make)


def packed_case(*shape: int, id: str, **options) -> Case:
    """Gate and up in one tensor (..., 2F)."""

    def make(draw):
        return {"gate": draw.normal(*shape[:-1], 2 * shape[-1]), "up": None, **options}

    return Case(id, make)


def views_case(*shape: int, id: str, **options) -> Case:
    """Gate and up as views of one tensor (..., 2F)."""

    def make(draw):
        gate, up = draw.normal(*shape[:-1], 2 * shape[-1]).chunk(2, -1)
        return {"gate": gate, "up": up, **options}

    return Case(id, make)


def sizes(**options) -> tuple[Case, ...]:
    return (
        case(1, 1, **options),
        case(0, 16, **options),
        case(3, 0, **options),
        case(5, 1, **options),
        case(2, 7, 64, **options),
        case(70, 33, **options),
        case(3, 2500, **options),
        case(7, **options),
        packed_case(0, 8, id="packed-empty", **options),
        packed_case(3, 1300, id="packed-wide", **options),
        views_case(2, 3, 40, id="views-3d", **options),
        case(4, 64, scale=100.0, id="large", **options),
        case(4, 64, scale=1e-3, id="tiny", **options),
    )


def huge(**options) -> Case:
    def make(draw):
        # Drawn once and repeated: to draw 2^31 numbers takes minutes.
        gate, up = (draw.normal(4096, 16384).repeat(33, 1) for _ in range(2))
        return {"gate": gate, "up": up, **options}

    return Case("135168x16384", make)


def errors(op: str) -> tuple[BadCall, ...]:
    def bad(id, make, error, sentence):
        return BadCall(id, make, error, f"{op}: {sentence}")

    floating = "must have a floating-point dtype"
    return (
        bad(
            "gate integer", lambda d: {"gate": d.integers(3, 4, 8)}, TypeError, f"`gate` {floating}"
        ),
        bad(
            "gate no tensor",
            lambda d: {"gate": 3.0},
            TypeError,
            "`gate` must be a tensor; got float",
        ),
        bad(
            "gate scalar",
            lambda d: {"gate": d.normal()},
            ValueError,
            "`gate` must have at least one dimension",
        ),
        bad(
            "gate odd",
            lambda d: {"gate": d.normal(4, 7)},
            ValueError,
            "`gate` must have an even last size when `up` is None; got 7.",
        ),
        bad(
            "up shape",
            lambda d: {"gate": d.normal(4, 8), "up": d.normal(4, 1)},
            ValueError,
            "`up` must have shape (4, 8), the shape of `gate`; got (4, 1).",
        ),
        bad(
            "up integer",
            lambda d: {"gate": d.normal(4, 8), "up": d.integers(3, 4, 8)},
            TypeError,
            f"`up` {floating}",
        ),
        bad(
            "up dtype",
            lambda d: {"gate": d.normal(4, 8), "up": d.normal(4, 8, dtype=torch.float16)},
            TypeError,
            "`up` must have the dtype of `gate`, torch.float32",
        ),
        bad(
            "up device",
            lambda d: {"gate": d.normal(4, 8), "up": torch.ones(4, 8, device="meta")},
            ValueError,
            "`up` must be on the device of `gate`",
        ),
    )


def kernels(*units: glu.Gating) -> list[Compilation]:
    """Both passes of units: narrow and packed, and wide."""
    return [
        compilation(unit, F, passed) for unit in units for F in (96, 14336) for passed in PASSES
    ]


PASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "fwd": (glu._glu_fwd_kernel, {}),
    "bwd": (glu._glu_bwd_kernel, {"NEED_DGATE": True, "NEED_DUP": True}),
}


def compilation(unit: glu.Gating, F: int, passed: str) -> Compilation:
    kernel, needs = PASSES[passed]
    packed = F == 96 or unit.interleaved
    compute = {"PACKED": packed, "COMPUTE": tl.float32}
    constants = unit.constants() | compute | needs | glu._glu_config(F)
    warps = constants.pop("num_warps")
    runtime = [n for n in inspect.signature(kernel.fn).parameters if n not in constants]
    signature = {n: "*bf16" if n.endswith("_ptr") else "i32" for n in runtime}
    turns = "-interleaved" if unit.interleaved else ""
    name = f"{passed}-{unit.activation}{turns}-{F}"
    return Compilation(name, kernel, signature, constants, warps)


def launches() -> tuple[Launch, ...]:
    candidates = around(BLOCK_N=(1, 2, 4), BLOCK_F=(512, 1024, 2048), num_warps=(1, 2, 4, 8))
    return tuple(Launch(glu, "_glu_config", mode, candidates) for mode in ("fwd", "bwd"))


def benchmarks(**options) -> tuple[Benchmark, ...]:
    return tuple(
        _benchmark(8192, F, packed, options)
        for packed in (False, True)
        for F in (8192, 11008, 14336, 18944, 28672)
    )


def _benchmark(N: int, F: int, packed: bool, options: dict) -> Benchmark:
    def make(draw):
        if packed:
            return {"gate": draw.normal(N, 2 * F), "up": None, **options}
        return {"gate": draw.normal(N, F), "up": draw.normal(N, F), **options}

    return Benchmark(
        f"{N}x{F}" + ("-packed" if packed else ""),
        make,
        bytes_fwd=6 * N * F,
        bytes_bwd=10 * N * F,
    )


def in_own_dtype(activation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The unit as models write it, in the dtype of the gate."""

    def unit(gate, up=None, **options):
        gate, up = gate.chunk(2, -1) if up is None else (gate, up)
        return activation(gate, **options) * up

    return unit
