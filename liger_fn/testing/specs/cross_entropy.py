"""Facts about cross_entropy."""

import torch
import torch.nn.functional as F
import triton.language as tl

from liger_fn.functional import cross_entropy
from liger_fn.functional.loss import cross_entropy as room
from liger_fn.testing.spec import (
    BadCall,
    Benchmark,
    Case,
    Compilation,
    Draw,
    Launch,
    OpSpec,
    around,
)


def targets(draw: Draw, V: int, *shape: int, ignore_index: int = -100) -> torch.Tensor:
    """Classes, with every third row ignored."""
    t = draw.integers(V, *shape)
    t.view(-1)[1::3] = ignore_index
    return t


def case(*shape: int, id: str = "", scale: float = 1.0, weighted: bool = False, **options) -> Case:
    """Logits of this shape, the vocabulary last."""
    *rows, V = shape

    def make(draw):
        w = (
            {"class_weight": draw.uniform(V, dtype=room.accumulator(draw.dtype)) + 0.5}
            if weighted
            else {}
        )
        t = targets(draw, V, *rows, ignore_index=options.get("ignore_index", -100))
        return {"logits": draw.normal(*shape, scale=scale), "target": t, **w, **options}

    return Case(id or "x".join(map(str, shape)), make)


def with_target(id: str, target) -> Case:
    return Case(id, lambda draw: {"logits": draw.normal(5, 64), "target": target(draw)})


def as_torch(
    logits,
    target,
    *,
    class_weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    logit_scale=1.0,
):
    """The loss by PyTorch's own, with all that models add to it, of logits read as float32."""
    z = logits.to(room.accumulator(logits.dtype)).reshape(-1, logits.shape[-1]) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    w = None if class_weight is None else class_weight.to(z.dtype)
    t = target.long().reshape(-1)
    loss = F.cross_entropy(
        z, t, weight=w, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    loss = loss + z_loss * torch.where(t == ignore_index, 0.0, z.logsumexp(-1).square())
    return room.reduced(loss.reshape(target.shape), target, class_weight, ignore_index, reduction)


def benchmark(N: int, V: int) -> Benchmark:
    return Benchmark(
        f"{N}x{V}",
        lambda draw: {"logits": draw.normal(N, V), "target": draw.integers(V, N)},
        bytes_fwd=2 * N * V,
        bytes_bwd=4 * N * V,
    )


def compilation(
    id: str, V: int, loss: bool, dlogits: bool, dtype: str = "*bf16", **options
) -> Compilation:
    wide = dtype == "*fp64"
    heavy = wide or "CAP" in options or "SMOOTHING" in options
    config = room._cross_entropy_config(V, loss and dlogits, heavy)
    warps = config.pop("num_warps")
    acc = "*fp64" if wide else "*fp32"
    signature = {
        "logits_ptr": dtype,
        "target_ptr": "*i64",
        "class_weight_ptr": acc,
        "total_weight_ptr": acc,
        "loss_ptr": acc,
        "lse_ptr": acc,
        "dloss_ptr": acc,
        "dlogits_ptr": dtype,
    } | dict.fromkeys(
        (
            "logits_stride_b",
            "logits_stride_t",
            "dlogits_stride_n",
            "dloss_stride_n",
            "T",
            "V",
            "width",
            "slab",
            "ignore_index",
        ),
        "i32",
    )
    constants = {
        "SMOOTHING": 0.0,
        "Z_LOSS": 0.0,
        "CAP": None,
        "SCALE": 1.0,
        "HAS_CLASS_WEIGHT": False,
        "HAS_DLOSS": dlogits and not loss,
        "NEED_LOSS": loss,
        "NEED_DLOGITS": dlogits,
        "PADDED": False,
        "UNIT": 1.0,
        "LOWEST": torch.finfo(torch.float64 if wide else torch.float32).min,
        "COMPUTE": tl.float64 if wide else tl.float32,
    }
    return Compilation(
        id, room._cross_entropy_kernel, signature, constants | config | options, warps
    )


EVERY_OPTION = {
    "SMOOTHING": 0.1,
    "Z_LOSS": 1e-4,
    "CAP": 30.0,
    "SCALE": 0.5,
    "HAS_CLASS_WEIGHT": True,
}


def mean_of_rows(N: int, weighted: bool) -> Compilation:
    kernel, config = room._mean_kernel, room._mean_config(N)
    warps = config.pop("num_warps")
    types = {"target_ptr": "*i64"} | dict.fromkeys(("N", "V", "ignore_index"), "i32")
    constants = config if weighted else config | {"class_weight_ptr": None}
    signature = {n: types.get(n, "*fp32") for n in kernel.arg_names if n not in constants}
    return Compilation(f"mean-{N}{'-weighted' * weighted}", kernel, signature, constants, warps)


def kernels() -> list[Compilation]:
    passes = {"fwd": (True, False), "bwd": (False, True), "both": (True, True)}
    plain = [
        compilation(f"{name}-{V}", V, *which)
        for name, which in passes.items()
        for V in (1000, 32000, 128256)
    ]
    special = [
        compilation(f"{name}-{label}", 128256, *which, **options)
        for name, which in passes.items()
        for label, options in {
            "softcap": {"CAP": 30.0},
            "every-option": EVERY_OPTION,
            "float32": {"dtype": "*fp32"},
            "float64": {"dtype": "*fp64"},
        }.items()
    ]
    means = [mean_of_rows(N, weighted) for N in (100, 8192) for weighted in (False, True)]
    return plain + special + means


def huge() -> Case:
    """More than 2^31 logits: a few rows, repeated on the device."""
    V, period, N = 1 << 17, 64, (1 << 14) + 64

    def make(draw):
        logits = draw.normal(period, V).repeat(N // period, 1)
        return {"logits": logits, "target": draw.integers(V, N), "reduction": "none"}

    return Case("2^31", make)


def bad(id: str, change, error: type[Exception], sentence: str) -> BadCall:
    """A good call but for `change`."""

    def make(draw):
        return {"logits": draw.normal(4, 8), "target": draw.integers(8, 4)} | change(draw)

    return BadCall(id, make, error, sentence)


SPEC = OpSpec(
    op=cross_entropy,
    reference=room.reference,
    baseline=as_torch,
    grads=("logits",),
    rows=("logits", "target"),
    cases=(
        case(4, 7),
        case(2, 3, 9, reduction="none", id="rows"),
        case(4, 7, reduction="sum", z_loss=1e-2, id="sum-z-loss"),
        case(4, 7, label_smoothing=0.1, id="smoothing"),
        case(4, 7, label_smoothing=0.2, weighted=True, id="weighted-smoothing"),
        case(4, 7, weighted=True, id="weighted"),
        case(4, 7, softcap=2.0, id="softcap"),
        case(
            4, 7, softcap=3.0, logit_scale=0.5, ignore_index=2, reduction="none",
            id="scaled-softcap",
        ),
    ),
    sizes=(
        case(3, 50, logit_scale=0.7, id="inexact-scale"),
        case(9),
        case(0, 16),
        case(5, 1),
        case(2, 7, 64),
        case(9, 130, scale=10.0, id="peaked"),
        case(7, 4096),
        case(3, 20000, label_smoothing=0.1, id="beyond-one-block"),
        case(2, 33000, z_loss=1e-3, reduction="none", id="beyond-one-slab"),
        case(5, 1000, scale=100.0, softcap=30.0, id="saturated-softcap"),
        case(5, 1000, scale=1e-2, softcap=30.0, id="small-under-softcap"),
        case(
            6, 50, weighted=True, label_smoothing=0.1, z_loss=1e-2, reduction="none",
            id="every-term",
        ),
        with_target("nothing-counts", lambda d: torch.full((5,), -100, device=d.device)),
        with_target("target-int32", lambda d: d.integers(64, 5).int()),
        with_target("target-uint8", lambda d: d.integers(64, 5).to(torch.uint8)),
    ),
    errors=(
        bad("logits integer", lambda d: {"logits": d.integers(3, 4, 8)}, TypeError,
            "cross_entropy: `logits` must have a floating-point dtype"),
        bad("logits scalar", lambda d: {"logits": d.normal()}, ValueError,
            "`logits` must have at least one dimension"),
        bad("no classes", lambda d: {"logits": d.normal(4, 0)}, ValueError,
            "`logits` must have at least one class; got a last size of 0."),
        bad("target float", lambda d: {"target": d.normal(4)}, TypeError,
            "`target` must have an integer dtype"),
        bad("target shape", lambda d: {"target": d.integers(8, 5)}, ValueError,
            "cross_entropy: `target` must have shape (4,), "
            "that of `logits` without its last dimension; got (5,)."),
        bad("target device", lambda d: {"target": d.integers(8, 4).to("meta")}, ValueError,
            "`target` must be on the device of `logits`"),
        bad("class_weight shape", lambda d: {"class_weight": d.normal(7)}, ValueError,
            "`class_weight` must have shape (8,), one weight per class; got (7,)."),
        bad("class_weight integer", lambda d: {"class_weight": d.integers(3, 8)}, TypeError,
            "`class_weight` must have a floating-point dtype"),
        bad("class_weight device", lambda d: {"class_weight": torch.ones(8, device="meta")},
            ValueError, "`class_weight` must be on the device of `logits`"),
        bad("reduction", lambda d: {"reduction": "average"}, ValueError,
            "`reduction` must be one of 'none', 'mean', 'sum'; got 'average'."),
        bad("ignore_index", lambda d: {"ignore_index": 0.5}, ValueError,
            "`ignore_index` must be an integer; got 0.5."),
        bad("label_smoothing", lambda d: {"label_smoothing": 1.5}, ValueError,
            "`label_smoothing` must be between 0 and 1; got 1.5."),
        bad("z_loss", lambda d: {"z_loss": None}, TypeError,
            "`z_loss` must be a number; got NoneType."),
        bad("label_smoothing None", lambda d: {"label_smoothing": None}, TypeError,
            "`label_smoothing` must be a number; got NoneType."),
        bad("softcap", lambda d: {"softcap": 0.0}, ValueError,
            "`softcap` must be positive, or None; got 0.0."),
        bad("logit_scale", lambda d: {"logit_scale": "1"}, TypeError,
            "`logit_scale` must be a number; got str."),
    ),
    huge=huge(),
    kernels=kernels,
    benchmarks=tuple(
        benchmark(*s) for s in ((4096, 128256), (16384, 32000), (4096, 151936), (4096, 262144))
    ),
    launches=tuple(
        Launch(
            room,
            "_cross_entropy_config",
            mode,
            around(
                tile=("BLOCK_V",),
                BLOCK_V=(1024, 2048, 4096, 8192, 16384),
                num_warps=(4, 8, 16, 32),
            ),
        )
        for mode in ("fwd", "bwd")
    ),
)  # fmt: skip
