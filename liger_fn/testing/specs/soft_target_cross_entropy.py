"""Facts about soft_target_cross_entropy."""

import torch
import torch.nn.functional as F
import triton.language as tl

from liger_fn.functional import soft_target_cross_entropy
from liger_fn.functional.loss import divergence as shared
from liger_fn.functional.loss import soft_target_cross_entropy as room
from liger_fn.testing.spec import BadCall, Benchmark, Case, Compilation, OpSpec
from liger_fn.testing.specs import divergence
from liger_fn.testing.specs.divergence import probabilities


def case(*shape: int, id: str = "", scale: float = 1.0, shift: float = 0.0, **options) -> Case:
    def make(draw):
        logits = draw.normal(*shape, scale=scale) + shift
        return {"logits": logits, "target": probabilities(draw, *shape), **options}

    return Case(id or "x".join(map(str, shape)), make)


def as_torch(logits, target, *, reduction="mean", label_smoothing=0.0, logit_scale=1.0):
    """PyTorch's own, of logits read as float32."""
    compute = shared.compute_dtype(logits, target)
    z, q = (t.to(compute).reshape(-1, t.shape[-1]) for t in (logits, target))
    loss = F.cross_entropy(z * logit_scale, q, reduction="none", label_smoothing=label_smoothing)
    return shared.reduced(loss.reshape(logits.shape[:-1]), None, 0, reduction)


def bad(id: str, change, error: type[Exception], sentence: str) -> BadCall:
    def make(draw):
        return {"logits": draw.normal(4, 8), "target": probabilities(draw, 4, 8)} | change(draw)

    return BadCall(id, make, error, f"soft_target_cross_entropy: {sentence}")


def kernels() -> list[Compilation]:
    rows = dict.fromkeys(("loss_ptr", "top_ptr", "log_sum_ptr", "mass_ptr", "dloss_ptr"), "*fp32")
    compute = {"COMPUTE": tl.float32}
    lowest = {"LOWEST": torch.finfo(torch.float32).min}
    needs = {"NEED_DLOGITS": True, "NEED_DTARGET": False}
    return [
        divergence.compilation(
            f"{name}-{smoothing}-{V}",
            kernel,
            rows,
            {"SMOOTHING": smoothing, "SCALE": 0.5, **compute, **more},
            V,
        )
        for V in (1000, 128256)
        for smoothing in (0.0, 0.1)
        for name, kernel, more in (
            ("fwd", room._soft_target_cross_entropy_fwd_kernel, lowest),
            ("bwd", room._soft_target_cross_entropy_bwd_kernel, needs),
        )
    ]


def benchmark(N: int, V: int) -> Benchmark:
    return Benchmark(
        f"{N}x{V}",
        lambda d: {"logits": d.normal(N, V), "target": probabilities(d, N, V)},
        bytes_fwd=4 * N * V,
        bytes_bwd=6 * N * V,
        grads=("logits",),
    )


def huge() -> Case:
    V, period, N = 1 << 17, 64, (1 << 14) + 64

    def make(draw):
        logits = draw.normal(period, V).repeat(N // period, 1)
        target = probabilities(draw, period, V).repeat(N // period, 1)
        return {"logits": logits, "target": target, "reduction": "none"}

    return Case("2^31", make)


SPEC = OpSpec(
    op=soft_target_cross_entropy,
    reference=room.reference,
    baseline=as_torch,
    grads=("logits", "target"),
    rows=("logits", "target"),
    cases=(
        case(4, 7, reduction="none"),
        case(2, 3, 5, label_smoothing=0.1, id="smoothing"),
        case(4, 7, logit_scale=0.5, reduction="sum", id="scaled"),
    ),
    sizes=(
        case(9),
        case(0, 16),
        case(5, 1),
        case(2, 7, 64),
        case(7, 4096),
        case(2, 20000, label_smoothing=0.1, id="beyond-one-slab"),
        case(9, 130, scale=20.0, id="peaked"),
        case(9, 5000, shift=300.0, reduction="none", id="shifted"),
    ),
    errors=(
        bad("logits integer", lambda d: {"logits": d.integers(3, 4, 8)}, TypeError,
            "`logits` must have a floating-point dtype"),
        bad("logits scalar", lambda d: {"logits": d.normal()}, ValueError,
            "`logits` must have at least one dimension"),
        bad("no classes", lambda d: {"logits": d.normal(4, 0)}, ValueError,
            "`logits` must have at least one class; got a last size of 0."),
        bad("target integer", lambda d: {"target": d.integers(3, 4, 8)}, TypeError,
            "`target` must have a floating-point dtype"),
        bad("target shape", lambda d: {"target": d.normal(4)}, ValueError,
            "`target` must have shape (4, 8), the shape of `logits`; got (4,)."),
        bad("target device", lambda d: {"target": torch.ones(4, 8, device="meta")}, ValueError,
            "`target` must be on the device of `logits`"),
        bad("reduction", lambda d: {"reduction": "average"}, ValueError,
            "`reduction` must be one of 'none', 'mean', 'sum'; got 'average'."),
        bad("label_smoothing", lambda d: {"label_smoothing": 1.5}, ValueError,
            "`label_smoothing` must be between 0 and 1; got 1.5."),
        bad("label_smoothing None", lambda d: {"label_smoothing": None}, TypeError,
            "`label_smoothing` must be a number; got NoneType."),
        bad("logit_scale", lambda d: {"logit_scale": "1"}, TypeError,
            "`logit_scale` must be a number; got str."),
    ),
    kernels=kernels,
    benchmarks=tuple(benchmark(*shape) for shape in divergence.SHAPES),
    huge=huge(),
)  # fmt: skip
