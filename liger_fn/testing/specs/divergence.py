"""What the specs of the divergences share."""

import inspect
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from liger_fn.functional.loss import divergence
from liger_fn.testing.spec import Arguments, BadCall, Benchmark, Case, Compilation, Draw


def log_probabilities(draw: Draw, *shape: int, scale: float = 1.0) -> Tensor:
    z = draw.normal(*shape, scale=scale, dtype=torch.float32)
    return z.log_softmax(-1).to(draw.dtype)


def probabilities(draw: Draw, *shape: int, scale: float = 1.0) -> Tensor:
    z = draw.normal(*shape, scale=scale, dtype=torch.float32)
    return z.softmax(-1).to(draw.dtype)


def labels(draw: Draw, *shape: int, ignore_index: int = -100) -> Tensor:
    """Rows that count, every third ignored."""
    t = draw.integers(7, *shape)
    t.view(-1)[1::3] = ignore_index
    return t


def case(*shape: int, make, id: str = "", ignored: bool = False, scale: float = 1.0, **options):
    """Input and target of this shape, both by `make(draw, *shape, scale=...)`."""

    def arguments(draw) -> Arguments:
        first, second = (make(draw, *shape, scale=scale) for _ in range(2))
        ignore_index = options.get("ignore_index", -100)
        given = {"labels": labels(draw, *shape[:-1], ignore_index=ignore_index)} if ignored else {}
        return {"input": first, "target": second, **given, **options}

    return Case(id or "x".join(map(str, shape)), arguments)


def sizes(make, **options) -> tuple[Case, ...]:
    return (
        case(9, make=make, **options),
        case(0, 16, make=make, **options),
        case(5, 1, make=make, **options),
        case(2, 7, 64, make=make, **options),
        case(7, 4096, make=make, **options),
        case(2, 20000, make=make, id="beyond-one-slab", **options),
        # No further, for the interpreter's bfloat16 has no subnormal numbers.
        case(9, 130, make=make, scale=10.0, id="peaked", **options),
    )


def benchmark(N: int, V: int, make, backward: int = 6, **options) -> Benchmark:
    return Benchmark(
        f"{N}x{V}",
        lambda d: {"input": make(d, N, V), "target": make(d, N, V), **options},
        bytes_fwd=4 * N * V,
        bytes_bwd=backward * N * V,
        # The teacher is a constant, to the peers too.
        grads=("input",),
    )


SHAPES = ((4096, 128256), (16384, 32000), (4096, 151936))


def compilations(kind: str, per_element: bool = False) -> list[Compilation]:
    flags = {
        "KIND": kind,
        "BETA": 0.5,
        "HAS_LABELS": False,
        "PER_ELEMENT": per_element,
        "COMPUTE": tl.float32,
    }
    loss = {} if per_element else {"loss_ptr": "*fp32", "dloss_ptr": "*fp32"}
    passes: dict[str, tuple[Any, dict]] = {
        "fwd": (divergence._divergence_fwd_kernel, {}),
        "bwd": (
            divergence._divergence_bwd_kernel,
            {"NEED_DINPUT": True, "NEED_DTARGET": False},
        ),
        "bwd-both": (
            divergence._divergence_bwd_kernel,
            {"NEED_DINPUT": True, "NEED_DTARGET": True, "HAS_LABELS": True},
        ),
    }
    return [
        compilation(f"{name}-{kind}-{V}", kernel, loss | {"labels_ptr": "*i64"}, flags | more, V)
        for name, (kernel, more) in passes.items()
        for V in (1000, 128256)
    ]


def compilation(id: str, kernel, pointers: dict, constants: dict, V: int) -> Compilation:
    """A kernel on bfloat16 tensors, but for `pointers`; sizes and strides fit 32 bits."""
    constants = {**constants, **divergence._divergence_config(V)}
    warps = constants.pop("num_warps")
    runtime = [n for n in inspect.signature(kernel.fn).parameters if n not in constants]
    signature = {n: pointers.get(n, "*bf16" if n.endswith("_ptr") else "i32") for n in runtime}
    return Compilation(id, kernel, signature, constants, warps)


def errors(op: str, make, has_labels: bool = True) -> tuple[BadCall, ...]:
    def bad(id, change, error, sentence):
        def arguments(draw):
            return {"input": make(draw, 4, 8), "target": make(draw, 4, 8)} | change(draw)

        return BadCall(id, arguments, error, f"{op}: {sentence}")

    pair = (
        bad("input integer", lambda d: {"input": d.integers(3, 4, 8)}, TypeError,
            "`input` must have a floating-point dtype"),
        bad("input scalar", lambda d: {"input": d.normal()}, ValueError,
            "`input` must have at least one dimension"),
        bad("no classes", lambda d: {"input": d.normal(4, 0)}, ValueError,
            "`input` must have at least one class; got a last size of 0."),
        bad("target integer", lambda d: {"target": d.integers(3, 4, 8)}, TypeError,
            "`target` must have a floating-point dtype"),
        bad("target shape", lambda d: {"target": d.normal(4, 1)}, ValueError,
            "`target` must have shape (4, 8), the shape of `input`; got (4, 1)."),
        bad("target device", lambda d: {"target": torch.ones(4, 8, device="meta")}, ValueError,
            "`target` must be on the device of `input`"),
        bad("reduction", lambda d: {"reduction": "average"}, ValueError,
            "`reduction` must be one of 'none'"),
    )  # fmt: skip
    if not has_labels:
        return pair
    return (
        *pair,
        bad("labels float", lambda d: {"labels": d.normal(4)}, TypeError,
            "`labels` must have an integer dtype"),
        bad("labels shape", lambda d: {"labels": d.integers(8, 5)}, ValueError,
            "`labels` must have shape (4,), that of `input` without its last dimension; got (5,)."),
        bad("labels device", lambda d: {"labels": d.integers(8, 4).to("meta")}, ValueError,
            "`labels` must be on the device of `input`"),
        bad("ignore_index", lambda d: {"ignore_index": 0.5}, ValueError,
            "`ignore_index` must be an integer; got 0.5."),
    )  # fmt: skip


def huge(make, **options) -> Case:
    """More than 2^31 elements a side: a few rows, repeated on the device."""
    V, period, N = 1 << 17, 64, (1 << 14) + 64

    def arguments(draw):
        first, second = (make(draw, period, V).repeat(N // period, 1) for _ in range(2))
        return {"input": first, "target": second, **options}

    return Case("2^31", arguments)
