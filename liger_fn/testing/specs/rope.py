"""Facts about rope."""

import torch
import triton.language as tl

from liger_fn.functional import rope
from liger_fn.functional.position import rope as room
from liger_fn.testing.spec import (
    BadCall,
    Benchmark,
    Case,
    Compilation,
    Launch,
    OpSpec,
    around,
)


def case(
    B: int,
    H: int,
    K: int,
    T: int,
    C: int,
    *,
    once: bool = False,
    batch: int | None = None,
    tables: torch.dtype | None = None,
    view: bool = False,
    id: str = "",
    **options,
) -> Case:
    """One call; K = 0: no keys.

    `once` gives each angle once, `batch` the first size of cos and sin (None: they have no such
    dimension), `tables` their dtype, `view` q and k as transposed views of one projection.
    """

    def make(draw):
        q, k = _heads(draw, B, H, K, T, C, options.get("layout", "bhtc"), view)
        R = options.get("rotary_dim") or C
        shape = (T, R // 2) if batch is None else (batch, T, R // 2)
        cos, sin = _tables(draw, shape, once, options.get("interleaved", False), tables)
        return {"q": q, "k": k, "cos": cos, "sin": sin, **options}

    return Case(id or f"{B}x{T}-{H}+{K}-{C}", make)


def _heads(draw, B, H, K, T, C, layout, view):
    if view:
        projection = draw.normal(B, T, H + K, C)
        q, k = projection.split((H, K), 2)
    else:
        q, k = draw.normal(B, T, H, C), draw.normal(B, T, K, C)
    if layout == "bhtc":
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if not view:
            q, k = q.contiguous(), k.contiguous()
    return q, k if K else None


def _tables(draw, shape, once, interleaved, dtype):
    angle = draw.uniform(*shape, high=6.28, dtype=torch.float32)
    if not once:
        angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
    return (t.to(dtype or draw.dtype) for t in (angle.cos(), angle.sin()))


def as_hugging_face(q, k, cos, sin, *, rotary_dim=None, interleaved=False, layout="bhtc"):
    """apply_rotary_pos_emb as models write it, in the dtype of q."""
    R = rotary_dim or q.shape[-1]
    cos, sin = (t.to(q.dtype) for t in (cos, sin))
    if cos.shape[-1] != R:
        cos, sin = (
            t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1) for t in (cos, sin)
        )
    cos, sin = (t.unsqueeze(-3 if layout == "bhtc" else -2) for t in (cos, sin))

    def rotated(x):
        if interleaved:
            return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1)

    def turn(x):
        x, rest = x[..., :R], x[..., R:]
        y = x * cos + rotated(x) * sin
        return torch.cat((y, rest), -1) if rest.shape[-1] else y

    return turn(q) if k is None else (turn(q), turn(k))


def kernels() -> list[Compilation]:
    tensors = ("q_ptr", "k_ptr", "cos_ptr", "sin_ptr", "q_out_ptr", "k_out_ptr")
    strides = (f"{x}_stride_{d}" for x in "qk" for d in "bht")
    tables = ("cos_stride_b", "cos_stride_t", "sin_stride_b", "sin_stride_t")
    sizes = (*strides, *tables, "H", "K", "T", "q_tiles", "k_tiles")
    signature = dict.fromkeys(tensors, "*bf16") | dict.fromkeys(sizes, "i32")
    out = []
    for C, half, interleaved in (
        (64, 32, False),
        (128, 64, False),
        (128, 64, True),
        (256, 128, False),
        (96, 48, False),
        (128, 32, False),
    ):
        config = room._rope_config(C, half)
        warps = config.pop("num_warps")
        constants = {
            "C": C,
            "HALF": half,
            "EACH_TWICE": interleaved,
            "HAS_K": True,
            "Q_HEADS_FIRST": False,
            "K_HEADS_FIRST": False,
            "INTERLEAVED": interleaved,
            "BACK": False,
            "COMPUTE": tl.float32,
            **config,
        }
        name = f"{C}-{2 * half}" + ("-interleaved" if interleaved else "")
        out.append(Compilation(name, room._rope_kernel, signature, constants, warps))
    return out


def benchmark(B: int, T: int, H: int, K: int, C: int) -> Benchmark:
    """q and k as Llama has them: each a transposed view of its projection; cos and sin in bf16."""
    heads, tables = 4 * B * T * (H + K) * C, 2 * 2 * T * C

    def make(draw):
        cos, sin = _tables(draw, (1, T, C // 2), False, False, None)
        q, k = (draw.normal(B, T, heads, C).transpose(1, 2) for heads in (H, K))
        return {"q": q, "k": k, "cos": cos, "sin": sin}

    return Benchmark(
        f"{B}x{T}-{H}+{K}-{C}", make, bytes_fwd=heads + tables, bytes_bwd=heads + tables
    )


def huge() -> Case:
    def make(draw):
        # Drawn once and repeated: to draw 2^31 numbers takes minutes.
        B, repeats = 8, 33
        arguments = case(B, 32, 1, 2048, 128, batch=B).make(draw)
        return {n: t.repeat(repeats, *(1,) * (t.dim() - 1)) for n, t in arguments.items()}

    return Case("264x2048-32+1-128", make)


FLOATING = "have a floating-point dtype"


def on_meta(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device="meta")


def bad(id: str, change, error: type[Exception], sentence: str) -> BadCall:
    """A good call, q (2, 4, 3, 8) and k (2, 2, 3, 8), with one argument changed."""
    argument = id.split()[0]

    def make(draw):
        good = case(2, 4, 2, 3, 8).make(draw)
        return {**good, argument: change(draw)}

    return BadCall(id, make, error, f"rope: `{argument}` must {sentence}")


SPEC = OpSpec(
    op=rope,
    reference=room.reference,
    baseline=as_hugging_face,
    grads=("q", "k"),
    rows=("q", "k", "cos", "sin"),
    cases=(
        # No size but the batch is 4, 7 or 9: the compiler takes equal sizes for one.
        case(2, 2, 1, 3, 6, batch=2, id="each-its-positions"),
        case(2, 3, 2, 3, 4, batch=1, id="one-for-all"),
        case(2, 2, 1, 3, 4, once=True, view=True, id="once-views"),
        case(2, 3, 1, 2, 4, interleaved=True, layout="bthc", id="interleaved-bthc"),
        case(2, 2, 1, 3, 6, interleaved=True, rotary_dim=4, once=True, id="interleaved-partial"),
        case(2, 2, 1, 3, 6, rotary_dim=4, layout="bthc", batch=2, view=True, id="partial-bthc"),
        case(2, 2, 0, 3, 4, batch=2, id="no-keys"),
    ),
    sizes=(
        case(1, 1, 1, 1, 2),
        case(0, 2, 1, 3, 8),
        case(2, 2, 1, 0, 8),
        case(2, 28, 4, 5, 128, batch=1, view=True),
        case(1, 8, 4, 7, 256, batch=1, tables=torch.float32, id="tables-in-float32"),
        case(1, 5, 5, 3, 96, batch=1),
        case(1, 3, 1, 5, 80, rotary_dim=20, batch=1, id="quarter"),
        case(1, 2, 1, 2, 1300, batch=1, id="wide"),
        case(1, 2, 1, 2, 2600, rotary_dim=6, interleaved=True, id="wide-tail"),
        case(1, 40, 8, 3, 64, batch=1, layout="bthc", tables=torch.float32, id="bthc"),
    ),
    errors=(
        bad("q integer", lambda d: d.integers(3, 2, 4, 3, 8), TypeError, FLOATING),
        bad("q none", lambda d: None, TypeError, "be a tensor; got NoneType."),
        bad(
            "q dimensions",
            lambda d: d.normal(4, 3, 8),
            ValueError,
            "have four dimensions, as `layout` says; got shape (4, 3, 8).",
        ),
        bad("k integer", lambda d: d.integers(3, 2, 2, 3, 8), TypeError, FLOATING),
        bad(
            "k dtype",
            lambda d: d.normal(2, 2, 3, 8, dtype=torch.float16),
            TypeError,
            "have the dtype of `q`, torch.float32",
        ),
        bad("k device", lambda d: on_meta(2, 2, 3, 8), ValueError, "be on the device of `q`"),
        bad(
            "k tokens",
            lambda d: d.normal(2, 2, 4, 8),
            ValueError,
            "have shape (2, 2, 3, 8), that of `q` but for the heads; got (2, 2, 4, 8).",
        ),
        bad("k dimensions", lambda d: d.normal(3, 8), ValueError, "have shape"),
        bad(
            "cos width",
            lambda d: d.normal(3, 6),
            ValueError,
            "have shape (3, R), (1, 3, R) or (2, 3, R) with R 8 or 4; got (3, 6).",
        ),
        bad("cos batch", lambda d: d.normal(4, 3, 8), ValueError, "have shape"),
        bad("cos tokens", lambda d: d.normal(5, 8), ValueError, "have shape"),
        bad("cos dimensions", lambda d: d.normal(8), ValueError, "have shape"),
        bad("cos integer", lambda d: d.integers(3, 3, 8), TypeError, FLOATING),
        bad("cos device", lambda d: on_meta(3, 8), ValueError, "be on the device of `q`"),
        bad(
            "sin shape",
            lambda d: d.normal(3, 4),
            ValueError,
            "have shape (3, 8), the shape of `cos`; got (3, 4).",
        ),
        bad("sin integer", lambda d: d.integers(3, 3, 8), TypeError, FLOATING),
        bad("sin device", lambda d: on_meta(3, 8), ValueError, "be on the device of `q`"),
        bad(
            "rotary_dim odd", lambda d: 3, ValueError, "be even, at least 2 and at most 8, the head"
        ),
        bad(
            "rotary_dim large",
            lambda d: 10,
            ValueError,
            "be even, at least 2 and at most 8, the head",
        ),
        bad(
            "rotary_dim zero",
            lambda d: 0,
            ValueError,
            "be even, at least 2 and at most 8, the head",
        ),
        bad("rotary_dim text", lambda d: "8", TypeError, "be a number; got str."),
        bad("layout unknown", lambda d: "thc", ValueError, "be one of 'bhtc', 'bthc'; got 'thc'."),
    ),
    kernels=kernels,
    benchmarks=tuple(
        benchmark(*s)
        for s in (
            (4, 2048, 32, 8, 128),
            (1, 16384, 64, 8, 128),
            (4, 2048, 28, 4, 128),
            (8, 1024, 8, 4, 256),
            (4, 4096, 32, 8, 64),
        )
    ),
    launches=tuple(
        Launch(
            room, "_rope_config", mode, around(BLOCK_M=(4, 8, 16, 32, 64), num_warps=(1, 2, 4, 8))
        )
        for mode in ("fwd", "bwd")
    ),
    huge=huge(),
)
