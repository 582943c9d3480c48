"""Facts about logprobs."""

import torch
import torch.nn.functional as F
import triton.language as tl

from liger_fn.functional import logprobs
from liger_fn.functional.loss import logprobs as room
from liger_fn.testing.spec import BadCall, Benchmark, Case, Compilation, OpSpec
from liger_fn.testing.specs.cross_entropy import targets

ALL = {"lse": True, "entropy": True, "top1": True}


def case(*shape: int, id: str = "", scale: float = 1.0, **options) -> Case:
    """Logits of this shape, the vocabulary last."""
    *rows, V = shape

    def make(draw):
        t = targets(draw, V, *rows, ignore_index=options.get("ignore_index", -100))
        return {"logits": draw.normal(*shape, scale=scale), "target": t, **options}

    return Case(id or "x".join(map(str, shape)), make)


def as_trainers_write_it(
    logits,
    target,
    *,
    temperature=1.0,
    logit_scale=1.0,
    softcap=None,
    ignore_index=-100,
    lse=False,
    entropy=False,
    top1=False,
):
    """log_softmax of logits read as float32, a gather, and the entropy of the whole row."""
    z = logits.to(room.accumulator(logits.dtype)) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    counts = target != ignore_index
    log_p = F.log_softmax(z, -1)
    logp = log_p.gather(-1, target.long().clamp(0)[..., None]).squeeze(-1)
    rows = (
        logp * counts,
        z.logsumexp(-1) * counts,
        -(log_p.exp() * log_p).sum(-1) * counts if entropy else None,
        z.argmax(-1).masked_fill(~counts, -1) if top1 else None,
    )
    return room.asked_for(rows, lse, entropy, top1)


def benchmark(N: int, V: int, **options) -> Benchmark:
    return Benchmark(
        "-".join([f"{N}x{V}", *options]),
        lambda draw: {"logits": draw.normal(N, V), "target": draw.integers(V, N), **options},
        bytes_fwd=2 * N * V,
        bytes_bwd=4 * N * V,
    )


def compilation_fwd(id: str, V: int, dtype: str = "*bf16", **options) -> Compilation:
    acc = "*fp64" if dtype == "*fp64" else "*fp32"
    signature = {
        "logits_ptr": dtype,
        "target_ptr": "*i64",
        "logp_ptr": acc,
        "lse_ptr": acc,
        "entropy_ptr": acc,
        "top1_ptr": acc,
        "highest_ptr": acc,
        "log_sum_ptr": acc,
    } | dict.fromkeys(
        ("logits_stride_b", "logits_stride_t", "T", "V", "width", "ignore_index"), "i32"
    )
    constants = {"CAP": None, "SCALE": 1.0, "ENTROPY": False, "TOP1": False, "PADDED": False}
    constants |= {"IN_VECTORS": True, "COMPUTE": tl.float32}
    constants |= {"LOWEST": torch.finfo(torch.float32).min}
    if dtype == "*fp64":
        constants |= {"LOWEST": torch.finfo(torch.float64).min, "COMPUTE": tl.float64}
    config = room._logprobs_config(V)
    warps = config.pop("num_warps")
    kernel = room._logprobs_fwd_kernel
    return Compilation(f"fwd-{id}", kernel, signature, constants | config | options, warps)


def compilation_bwd(id: str, V: int, dtype: str = "*bf16", **options) -> Compilation:
    acc = "*fp64" if dtype == "*fp64" else "*fp32"
    rows = ("highest_ptr", "log_sum_ptr", "entropy_ptr", "dlogp_ptr", "dlse_ptr", "dentropy_ptr")
    strides = ("logits_stride_b", "logits_stride_t", "dlogits_stride_n")
    strides += ("dlogp_stride_n", "dlse_stride_n", "dentropy_stride_n")
    signature = {
        "logits_ptr": dtype,
        "target_ptr": "*i64",
        **dict.fromkeys(rows, acc),
        "dlogits_ptr": dtype,
        **dict.fromkeys((*strides, "T", "V", "width", "slab", "ignore_index"), "i32"),
    }
    constants = {"CAP": None, "SCALE": 1.0}
    constants |= {"HAS_DLOGP": True, "HAS_DLSE": True, "HAS_DENTROPY": False}
    constants |= {"COMPUTE": tl.float64 if dtype == "*fp64" else tl.float32}
    config = room._logprobs_config(V)
    warps = config.pop("num_warps")
    kernel = room._logprobs_bwd_kernel
    return Compilation(f"bwd-{id}", kernel, signature, constants | config | options, warps)


EVERYTHING_FWD = {"ENTROPY": True, "TOP1": True, "CAP": 30.0, "SCALE": 0.5}
EVERYTHING_BWD = {"HAS_DENTROPY": True, "CAP": 30.0, "SCALE": 0.5}


def kernels() -> list[Compilation]:
    return [
        *(compilation_fwd(str(V), V) for V in (1000, 32000, 128256)),
        compilation_fwd("entropy", 128256, ENTROPY=True),
        compilation_fwd("entropy-apart", 128256, ENTROPY=True, IN_VECTORS=False),
        compilation_fwd("top1", 128256, TOP1=True),
        compilation_fwd("everything", 128256, **EVERYTHING_FWD),
        compilation_fwd("everything-float32", 128256, "*fp32", **EVERYTHING_FWD),
        compilation_fwd("everything-float64", 128256, "*fp64", **EVERYTHING_FWD),
        *(compilation_bwd(str(V), V) for V in (1000, 32000, 128256)),
        compilation_bwd("everything", 128256, **EVERYTHING_BWD),
        compilation_bwd("everything-float32", 128256, "*fp32", **EVERYTHING_BWD),
        compilation_bwd("everything-float64", 128256, "*fp64", **EVERYTHING_BWD),
    ]


def huge() -> Case:
    """More than 2^31 logits: a few rows, repeated on the device."""
    V, period, N = 1 << 17, 64, (1 << 14) + 64

    def make(draw):
        logits = draw.normal(period, V).repeat(N // period, 1)
        return {"logits": logits, "target": draw.integers(V, N), **ALL}

    return Case("2^31", make)


def bad(id: str, change, error: type[Exception], sentence: str) -> BadCall:
    """A good call but for `change`."""

    def make(draw):
        return {"logits": draw.normal(4, 8), "target": draw.integers(8, 4)} | change(draw)

    return BadCall(id, make, error, sentence)


SPEC = OpSpec(
    op=logprobs,
    reference=room.reference,
    baseline=as_trainers_write_it,
    grads=("logits",),
    rows=("logits", "target"),
    cases=(
        case(4, 7, **ALL, id="everything"),
        case(4, 7, id="logp"),
        case(2, 3, 9, lse=True, id="lse"),
        case(4, 7, entropy=True, temperature=0.7, id="tempered-entropy"),
        case(4, 7, softcap=2.0, id="softcap"),
        case(
            4, 7, softcap=3.0, logit_scale=0.5, temperature=1.5, ignore_index=2, **ALL,
            id="scaled-softcap",
        ),
    ),
    sizes=(
        case(9, **ALL),
        case(0, 16, **ALL),
        case(5, 1, **ALL),
        case(2, 7, 64, **ALL),
        case(9, 130, scale=10.0, **ALL, id="peaked"),
        case(7, 4096),
        case(3, 20000, **ALL, id="beyond-one-block"),
        case(2, 33000, **ALL, id="beyond-one-slab"),
        case(5, 1000, scale=100.0, softcap=30.0, entropy=True, id="saturated-softcap"),
        Case(
            "far-from-zero",
            lambda d: {"logits": d.normal(4, 500) + 1000.0, "target": d.integers(500, 4), **ALL},
        ),
        Case(
            "target-uint8",
            lambda d: {"logits": d.normal(5, 64), "target": d.integers(64, 5).to(torch.uint8)},
        ),
    ),
    errors=(
        bad("logits integer", lambda d: {"logits": d.integers(3, 4, 8)}, TypeError,
            "logprobs: `logits` must have a floating-point dtype"),
        bad("logits scalar", lambda d: {"logits": d.normal()}, ValueError,
            "`logits` must have at least one dimension"),
        bad("no classes", lambda d: {"logits": d.normal(4, 0)}, ValueError,
            "`logits` must have at least one class; got a last size of 0."),
        bad("target float", lambda d: {"target": d.normal(4)}, TypeError,
            "`target` must have an integer dtype"),
        bad("target shape", lambda d: {"target": d.integers(8, 5)}, ValueError,
            "logprobs: `target` must have shape (4,), "
            "that of `logits` without its last dimension; got (5,)."),
        bad("target device", lambda d: {"target": d.integers(8, 4).to("meta")}, ValueError,
            "`target` must be on the device of `logits`"),
        bad("temperature", lambda d: {"temperature": 0.0}, ValueError,
            "`temperature` must be positive; got 0.0."),
        bad("temperature None", lambda d: {"temperature": None}, TypeError,
            "`temperature` must be a number; got NoneType."),
        bad("logit_scale", lambda d: {"logit_scale": "1"}, TypeError,
            "`logit_scale` must be a number; got str."),
        bad("softcap", lambda d: {"softcap": 0.0}, ValueError,
            "`softcap` must be positive, or None; got 0.0."),
        bad("ignore_index", lambda d: {"ignore_index": 0.5}, ValueError,
            "`ignore_index` must be an integer; got 0.5."),
        bad("too many classes",
            lambda d: {
                "logits": torch.empty(4, (1 << 24) + 1, device="meta"),
                "target": torch.empty(4, dtype=torch.int64, device="meta"),
                "top1": True,
            },
            NotImplementedError,
            "`logits` must have at most 16777216 classes where top1 is asked for; got 16777217."),
    ),
    huge=huge(),
    kernels=kernels,
    benchmarks=(
        *(benchmark(*s) for s in ((4096, 128256), (16384, 32000), (8192, 151936))),
        benchmark(8192, 151936, entropy=True),
        benchmark(8192, 151936, entropy=True, top1=True),
    ),
)  # fmt: skip
