"""What the specs of the divergences of two heads share."""

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
import triton.language as tl

from liger_fn.functional.linear_loss import divergence as room
from liger_fn.testing.spec import (
    Arguments,
    BadCall,
    Benchmark,
    Case,
    Compilation,
    Draw,
    Launch,
    OpSpec,
    around,
)

FACTORS = ("weight", "x", "teacher_weight", "teacher_x", "bias", "teacher_bias")


def case(
    *shape: int, id: str = "", K: int = 5, bias: bool = False, labelled: bool = False, **options
) -> Case:
    """A case of x (..., H), a weight (V, H) and a teacher of width K; the shape is (..., H, V)."""
    *rows, H, V = shape

    def make(draw):
        arguments = {
            "weight": draw.normal(V, H, scale=max(1, H) ** -0.5),
            "x": draw.normal(*rows, H),
            "teacher_weight": draw.normal(V, K, scale=K**-0.5),
            "teacher_x": draw.normal(*rows, K),
            **options,
        }
        if labelled:
            labels = draw.integers(V, *rows)
            labels.view(-1)[1::3] = options.get("ignore_index", -100)
            arguments["labels"] = labels
        if bias:
            arguments |= {"bias": draw.normal(V), "teacher_bias": draw.normal(V)}
        return arguments

    return Case(id or "x".join(map(str, shape)), make)


def of_distributions(terms: Callable) -> Callable:
    """The loss of rows of both logits: a sum of `terms`, of log probabilities, over the classes."""

    def rows(z, y, temperature=1.0, **options):
        log_q, log_p = ((t / temperature).log_softmax(-1) for t in (z, y))
        return terms(log_q, log_p, **options).sum(-1)

    return rows


def baseline(rows: Callable) -> Callable:
    """The op with its logits, as trainers write it; `rows` gives the loss of rows of both.

    Its arithmetic on the logits is in float32, whatever their dtype.
    """

    def call(
        weight, x, teacher_weight, teacher_x, labels=None, chunk_size=None, *, bias=None,
        teacher_bias=None, hard_weight=0.0, ignore_index=-100, reduction="mean", num_items=None,
        memory_budget=None, **options,
    ):  # fmt: skip
        compute = room.compute_dtype(x, teacher_x)
        z = F.linear(x, weight, bias).to(compute)
        y = F.linear(teacher_x, teacher_weight, teacher_bias).to(compute)
        loss = rows(z, y, **options)
        count = max(loss.numel(), 1)
        if labels is not None:
            live = labels != ignore_index
            count = live.sum().clamp(min=1)
            loss = torch.where(live, loss, 0.0)
            if hard_weight:
                hard = F.cross_entropy(
                    z.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="none"
                )
                loss = loss + hard_weight * hard.view(loss.shape)
        if reduction == "none":
            return loss
        return loss.sum() if reduction == "sum" else loss.sum() / (num_items or count)

    return call


def sizes(**options) -> tuple[Case, ...]:
    return (
        case(6, 9, id="single-row", **options),
        case(0, 6, 9, **options),
        case(0, 6, 9, labelled=True, hard_weight=0.5, id="no-rows-labelled", **options),
        case(3, 5, 1, **options),
        case(3, 0, 5, bias=True, id="no-features", **options),
        case(3, 0, 5, reduction="none", id="no-features-rows", **options),
        case(2, 7, 16, 130, chunk_size=4, K=24, labelled=True, **options),
        case(40, 64, 1000, chunk_size=16, K=32, temperature=2.0, **options),
        case(37, 64, 1000, chunk_size=16, K=32, reduction="none", id="37-rows", **options),
        case(3, 32, 20000, chunk_size=2, K=16, hard_weight=0.3, labelled=True,
             id="beyond-one-block", **options),
        case(5, 16, 64, chunk_size=100, id="chunk-larger-than-all", **options),
    )  # fmt: skip


def heads(draw: Draw, N: int, H: int, K: int, V: int, apart: bool = False) -> Arguments:
    """Two heads of logits of size 1; `apart`, each prefers a half of the vocabulary of its own.

    Near q_v = p_v the gradient of tvd jumps: whatever rounds its logits differently is far off.
    """
    arguments = {
        "weight": draw.normal(V, H, scale=H**-0.5),
        "x": draw.normal(N, H),
        "teacher_weight": draw.normal(V, K, scale=K**-0.5),
        "teacher_x": draw.normal(N, K),
        "labels": draw.integers(V, N),
    }
    if apart:
        arguments["weight"][: V // 2, 0] = arguments["teacher_weight"][V // 2 :, 0] = 1.0
        arguments["x"][:, 0] = arguments["teacher_x"][:, 0] = 8.0
    return arguments


def benchmark(N: int, H: int, K: int, V: int, apart: bool = False, **options) -> Benchmark:
    return Benchmark(
        "-".join([f"{N}x{H}x{V}-teacher-{K}", *(f"{n}-{v}" for n, v in options.items())]),
        lambda draw: heads(draw, N, H, K, V, apart) | options,
        flops_fwd=2 * N * (H + K) * V,
        flops_bwd=4 * N * H * V,
    )


# Llama 3.2 1B and 3.1 8B; Qwen 3 1.7B and 8B.
SHAPES = ((8192, 2048, 4096, 128256), (8192, 2048, 4096, 151936))


def compilations(kind: str, beta: float = 0.0) -> list[Compilation]:
    def compiled(name: str, V: int, **changes) -> Compilation:
        constants: dict[str, Any] = {
            "KIND": kind, "BETA": beta, "SCALE": 1.0, "HARD": 0.0,
            "HAS_LABELS": False, "HAS_DLOSS": True, "NEED_LOSS": True, "NEED_DLOGITS": True,
            "UNIT": 1.0, "LOWEST": torch.finfo(torch.float32).min / 2, "SHORTEST": 1e-8,
            "COMPUTE": tl.float32,
            **room._fused_linear_divergence_config(V), **changes,
        }  # fmt: skip
        warps = constants.pop("num_warps")
        types = {
            "logits_ptr": "*bf16", "teacher_ptr": "*bf16", "labels_ptr": "*i64",
            "dloss_ptr": "*fp32", "loss_ptr": "*fp32",
        }  # fmt: skip
        runtime = ("stride_n", "dloss_stride_n", "V", "width", "ignore_index")
        signature = types | dict.fromkeys(runtime, "i32")
        kernel = room._fused_linear_divergence_kernel
        return Compilation(f"{name}-{kind}-{V}", kernel, signature, constants, warps)

    return [
        compilation
        for V in (1000, 151936)
        for compilation in (
            compiled("loss", V, NEED_DLOGITS=False),
            compiled("both", V),
            compiled("gradient", V, NEED_LOSS=False),
            compiled("every-option", V, HAS_LABELS=True, HARD=0.5, SCALE=0.5),
        )
    ]


def good(draw) -> dict:
    return {
        "weight": draw.normal(8, 6),
        "x": draw.normal(4, 6),
        "teacher_weight": draw.normal(8, 5),
        "teacher_x": draw.normal(4, 5),
    }


def errors(op: str) -> tuple[BadCall, ...]:
    def bad(id: str, change, error: type[Exception], sentence: str) -> BadCall:
        return BadCall(id, lambda draw: good(draw) | change(draw), error, f"{op}: {sentence}")

    return (
        bad("x integer", lambda d: {"x": d.integers(3, 4, 6)}, TypeError,
            "`x` must have a floating-point dtype"),
        bad("x scalar", lambda d: {"x": d.normal()}, ValueError,
            "`x` must have at least one dimension"),
        bad("weight dtype", lambda d: {"weight": d.normal(8, 6, dtype=torch.float64)}, TypeError,
            "`weight` must have the dtype of `x`, torch.float32; got torch.float64."),
        bad("weight device", lambda d: {"weight": torch.ones(8, 6, device="meta")}, ValueError,
            "`weight` must be on the device of `x`"),
        bad("no classes", lambda d: {"weight": d.normal(0, 6)}, ValueError,
            "`weight` must have shape (V, H) with at least one class; got (0, 6)."),
        bad("weight shape", lambda d: {"weight": d.normal(8, 5)}, ValueError,
            "`weight` must have shape (8, 6), (V, H) with the last size of `x`; got (8, 5)."),
        bad("bias shape", lambda d: {"bias": d.normal(7)}, ValueError,
            "`bias` must have shape (8,), one per class; got (7,)."),
        bad("teacher integer", lambda d: {"teacher_x": d.integers(3, 4, 5)}, TypeError,
            "`teacher_x` must have a floating-point dtype"),
        bad("teacher classes", lambda d: {"teacher_weight": d.normal(9, 5)}, ValueError,
            "`teacher_weight` must have shape (8, 5), one row per class of `weight`; got (9, 5)."),
        bad("teacher rows", lambda d: {"teacher_x": d.normal(5, 5)}, ValueError,
            "`teacher_x` must have shape (4, 5), the shape of `x` but for its last size; "
            "got (5, 5)."),
        bad("teacher bias", lambda d: {"teacher_bias": d.normal(8).half()}, TypeError,
            "`teacher_bias` must have the dtype of `teacher_x`, torch.float32; got torch.float16."),
        bad("labels float", lambda d: {"labels": d.normal(4)}, TypeError,
            "`labels` must have an integer dtype"),
        bad("labels shape", lambda d: {"labels": d.integers(8, 5)}, ValueError,
            "`labels` must have shape (4,), that of `x` without its last dimension; got (5,)."),
        bad("no labels", lambda d: {"hard_weight": 0.5}, ValueError,
            "`hard_weight` must be 0 unless `labels` are given; got 0.5."),
        bad("temperature", lambda d: {"temperature": 0.0}, ValueError,
            "`temperature` must be positive; got 0.0."),
        bad("reduction", lambda d: {"reduction": "average"}, ValueError,
            "`reduction` must be one of"),
        bad("chunk_size", lambda d: {"chunk_size": 0}, ValueError,
            "`chunk_size` must be a positive integer, or None; got 0."),
        bad("memory_budget", lambda d: {"memory_budget": 0.5}, ValueError,
            "`memory_budget` must be a positive integer, or None; got 0.5."),
        bad("num_items of a sum", lambda d: {"num_items": 3, "reduction": "sum"}, ValueError,
            '`num_items` must be None unless `reduction` is "mean"; got 3.'),
        bad("num_items", lambda d: {"num_items": 0}, ValueError,
            "`num_items` must be positive; got 0."),
        bad("num_items vector", lambda d: {"num_items": torch.ones(2)}, ValueError,
            "`num_items` must have shape (), one number; got (2,)."),
        bad("ignore_index", lambda d: {"ignore_index": 0.5}, ValueError,
            "`ignore_index` must be an integer; got 0.5."),
    )  # fmt: skip


def spec(
    op: Callable,
    module: ModuleType,
    rows: Callable,
    cases: Sequence[Case],
    more_sizes: Sequence[Case] = (),
    more_errors: Sequence[BadCall] = (),
    kinds: Sequence[tuple[str, float]] = (),
    benchmarks: Sequence[Benchmark] = (),
    slack: Mapping[torch.dtype, float] | None = None,
) -> OpSpec:
    return OpSpec(
        op=op,
        reference=module.reference,
        baseline=baseline(rows),
        grads=("weight", "x", "bias"),
        rows=("x", "teacher_x", "labels"),
        autocast=FACTORS,
        # The logits, as rounded, err alike; how sums and exp are computed changes a little of it.
        slack={torch.bfloat16: 1.01, torch.float16: 1.01, **(slack or {})},
        cases=tuple(cases),
        sizes=(*sizes(), *more_sizes),
        errors=(*errors(op.__name__), *more_errors),
        kernels=lambda: [c for kind, beta in kinds for c in compilations(kind, beta)],
        benchmarks=tuple(benchmarks),
        launches=(
            Launch(
                room,
                "_fused_linear_divergence_config",
                "fwd",
                around(BLOCK_V=(2048, 4096, 8192, 16384), num_warps=(4, 8, 16, 32)),
            ),
        ),
    )
