"""Facts about multi_token_attention."""

import inspect

import torch
import torch.nn.functional as F
import triton.language as tl

from liger_fn.functional import multi_token_attention
from liger_fn.functional.activation import softmax, sparsemax
from liger_fn.functional.attention import causal_convolution
from liger_fn.functional.attention import multi_token_attention as room
from liger_fn.functional.core.launch import accumulator, next_power_of_2, triton_dtype
from liger_fn.testing.spec import BadCall, Benchmark, Case, Compilation, Config, Launch, OpSpec
from liger_fn.testing.specs.softmax import compilation
from liger_fn.testing.specs.sparsemax import by_sorting


def case(
    *leading: int,
    H: int = 2,
    T: int = 5,
    out: int = 2,
    window: tuple[int, int] = (3, 3),
    bias: bool = True,
    size: float = 1.0,
    id: str = "",
    **options,
) -> Case:
    def make(draw):
        shape = (out, H // options.get("groups", 1), *window)
        return {
            "scores": draw.normal(*leading, H, T, T, scale=size),
            "weight": draw.normal(*shape, scale=0.3),
            "bias": draw.normal(out) if bias else None,
            **options,
        }

    return Case(id or "x".join(map(str, (*leading, H, T))), make)


def as_torch(scores, weight, bias=None, *, padding=0, sparse=False, **options):
    """In PyTorch's own ops, the way the paper writes it."""
    T, (Q, K) = scores.shape[-1], weight.shape[-2:]
    past = torch.ones(T, T, dtype=torch.bool, device=scores.device).tril()
    z = scores.masked_fill(~past, -torch.inf)
    p = by_sorting(z) if sparse else torch.softmax(z, -1)
    p = p.reshape(-1, *p.shape[-3:])
    if padding == "causal":
        dilation = options.get("dilation", 1)
        side = (K - 1) * dilation // 2
        p, padding = F.pad(p, (side, side, (Q - 1) * dilation, 0)), 0
    y = F.conv2d(p, weight, bias, padding=padding, **options).tril()
    return y.reshape(*scores.shape[:-3], *y.shape[-3:])


def convolutions(
    dtype: torch.dtype, window: tuple[int, int], groups_of: int = 1, aligned: bool = True
) -> list[Compilation]:
    """The three kernels of a convolution with causal padding."""
    (Q, K), itemsize = window, dtype.itemsize
    constants = {
        "IN": groups_of, "OUT": groups_of, "WINDOW_Q": Q, "WINDOW_K": K, "DILATION_Q": 1,
        "DILATION_K": 1, "PADDING_Q": Q - 1, "PADDING_K": K // 2, "ALIGNED": aligned,
        "COMPUTE": triton_dtype(accumulator(dtype)),
    }  # fmt: skip
    y = constants | causal_convolution._conv_config(Q, K, itemsize, aligned) | {"REVERSED": False}
    dx = y | {"REVERSED": True, "PADDING_Q": 0, "bias_ptr": None}
    dweight = constants | causal_convolution._conv_bwd_dweight_config(Q, K, itemsize, aligned)
    del dweight["per_sm"]
    dweight["TAPS_UP"] = next_power_of_2(dweight["TAPS_Q"] * K)
    kind = f"{dtype}-{Q}x{K}-{groups_of}".removeprefix("torch.") + ("" if aligned else "-unaligned")
    return [
        convolution(f"y-{kind}", causal_convolution._conv_kernel, y, dtype),
        convolution(f"dx-{kind}", causal_convolution._conv_kernel, dx, dtype),
        convolution(f"dweight-{kind}", causal_convolution._conv_bwd_dweight_kernel, dweight, dtype),
    ]


def convolution(id: str, kernel, config: dict, dtype: torch.dtype) -> Compilation:
    constants = dict(config)
    warps = constants.pop("num_warps")
    kind, sums = (f"*{triton_dtype(t)}" for t in (dtype, accumulator(dtype)))
    signature = {
        n: sums if "part" in n else kind if n.endswith("_ptr") else "i32"
        for n in inspect.signature(kernel.fn).parameters
        if n not in constants
    }
    return Compilation(id, kernel, signature, constants, warps)


def candidates(current: Config) -> list[Config]:
    """Threads of more or fewer rows in tiles of other shapes."""
    return [
        current | {"ROWS": rows, "BLOCK_I": i, "BLOCK_J": j, "num_warps": i * j // 32}
        for rows, i, j in ((4, 16, 8), (4, 8, 16), (4, 8, 8), (4, 16, 16), (8, 8, 8), (2, 16, 16))
    ]


def square_candidates(current: Config) -> list[Config]:
    """Square tiles, of programs of which more or fewer are on a multiprocessor."""
    tiles = [
        (rows, current["COLS"] * j // rows, j, per_sm)
        for rows, j in ((4, 8), (4, 16), (8, 8), (2, 8))
        for per_sm in (1, 2, 3, 4, 6)
    ]
    return [
        current
        | {"ROWS": rows, "BLOCK_I": i, "BLOCK_J": j, "num_warps": i * j // 32, "per_sm": per_sm}
        for rows, i, j, per_sm in tiles
        if i * j >= 32
    ]


def kernels() -> list[Compilation]:
    """The causal kernels of softmax and sparsemax, and the convolution's."""
    out = [
        *convolutions(torch.bfloat16, (3, 3)),
        *convolutions(torch.bfloat16, (6, 11), groups_of=2),
        *convolutions(torch.bfloat16, (6, room.WIDEST), aligned=False),
        *convolutions(torch.float32, (6, 11)),
        *convolutions(torch.float64, (3, 3)),
    ]
    lowest = torch.finfo(torch.float32).min
    for T in (2048, 65536):
        config = softmax._softmax_fwd_config(T, holds=False)
        tile = "BLOCK_N" in config
        kernel = softmax._softmax_fwd_kernel if tile else softmax._softmax_fwd_wide_kernel
        out.append(compilation(f"softmax-fwd-{T}", kernel, config, LOWEST=lowest, CAUSAL=True))
        config = softmax._softmax_bwd_config(T, holds=False)
        kernel = softmax._softmax_bwd_kernel if tile else softmax._softmax_bwd_wide_kernel
        out.append(compilation(f"softmax-bwd-{T}", kernel, config, CAUSAL=True))

        kernel = getattr(sparsemax, f"_sparsemax_fwd{'' if tile else '_wide'}_kernel")
        constants = {"COMPUTE": tl.float32, "CAUSAL": True, **sparsemax._sparsemax_config(T)}
        warps = constants.pop("num_warps")
        runtime = [n for n in inspect.signature(kernel.fn).parameters if n not in constants]
        signature = {n: "*bf16" if n.endswith("_ptr") else "i32" for n in runtime}
        out.append(Compilation(f"sparsemax-fwd-{T}", kernel, signature, constants, warps))
    return out


def benchmark(B: int, H: int, T: int, window: tuple[int, int], groups: int, **options) -> Benchmark:
    """Scores of a layer; the mixing of heads is in groups, as in the paper."""
    Q, K = window
    scores, products = B * H * T * T, B * H * T * T * H // groups * Q * K

    def make(draw):
        return {
            "scores": draw.normal(B, H, T, T),
            "weight": draw.normal(H, H // groups, Q, K, scale=0.1),
            "bias": None,
            "groups": groups,
            **options,
        }

    kind = "-sparse" if options.get("sparse") else ""
    kind += "-causal" if options["padding"] == "causal" else ""
    return Benchmark(
        f"{B}x{H}x{T}x{T}-{Q}x{K}-{groups}{kind}",
        make,
        bytes_fwd=3 * scores,
        bytes_bwd=4 * scores,
        flops_fwd=2 * products,
        flops_bwd=4 * products,
    )


def bad(id: str, change, error: type[Exception], sentence: str) -> BadCall:
    def make(draw):
        given = {"scores": draw.normal(2, 4, 6, 6), "weight": draw.normal(4, 4, 3, 3)}
        return given | change(draw)

    return BadCall(id, make, error, f"multi_token_attention: {sentence}")


SPEC = OpSpec(
    op=multi_token_attention,
    reference=room.reference,
    baseline=as_torch,
    grads=("scores", "weight", "bias"),
    rows=("scores",),
    autocast=True,
    # PyTorch 2.11 can do that of no convolution.
    symbolic=torch.__version__ >= (2, 12),
    cases=(
        case(2, T=3, out=1, padding=1, id="softmax"),
        case(2, H=1, T=4, padding="causal", sparse=True, id="sparse-causal"),
        case(1, out=4, groups=2, window=(2, 3), padding="causal", dilation=2, id="groups"),
        # PyTorch's convolution: of other strides, and of more heads than four.
        case(2, T=7, padding=1, stride=2, bias=False, id="stride"),
        case(1, H=5, T=4, out=1, padding=1, id="heads"),
        # The last query and key are in no window.
        case(T=6, stride=2, id="unused-rest"),
        case(1, 2, T=4, window=(2, 2), sparse=True, bias=False, id="two-leading"),
    ),
    sizes=(
        case(0, padding=1, id="empty"),
        case(1, H=1, out=1, T=1, window=(1, 1), id="one"),
        case(1, H=4, out=8, groups=2, window=(2, 3), padding="causal", dilation=2, id="mixed"),
        case(1, T=64, window=(6, 11), groups=2, padding="causal", id="paper"),
        case(1, T=37, window=(4, 3), padding=(15, 10), dilation=(10, 10), id="far"),
        case(1, H=1, out=1, T=16, window=(1, 1), padding=8, id="padded"),
        case(1, H=1, out=1, T=130, padding=1, sparse=True, id="sparse"),
        case(1, H=1, out=1, T=40, padding=1, size=100.0, id="large"),
        # Wider than what the kernels hold of a row would take T² of 2^28: see the tests of softmax.
        case(1, H=1, out=1, T=1030, window=(1, 3), padding="causal", id="beyond-a-thousand"),
    ),
    errors=(
        bad("scores integer", lambda d: {"scores": d.integers(3, 2, 4, 6, 6)}, TypeError,
            "`scores` must have a floating-point dtype"),
        bad("scores square", lambda d: {"scores": d.normal(2, 4, 6, 5)}, ValueError,
            "`scores` must have shape (..., H, T, T); got (2, 4, 6, 5)."),
        bad("groups", lambda d: {"groups": 3}, ValueError,
            "`groups` must divide 4, the heads of `scores`; got 3."),
        bad("groups none", lambda d: {"groups": 0}, ValueError,
            "`groups` must be a positive integer; got 0."),
        bad("weight dtype", lambda d: {"weight": d.normal(4, 4, 3, 3).half()}, TypeError,
            "`weight` must have the dtype of `scores`, torch.float32; got torch.float16."),
        bad("weight shape", lambda d: {"groups": 2}, ValueError,
            "`weight` must have shape (O, 2, Q, K), O a multiple of 2; got (4, 4, 3, 3)."),
        bad("weight device", lambda d: {"weight": torch.ones(4, 4, 3, 3, device="meta")},
            ValueError, "`weight` must be on the device of `scores`"),
        bad("weight even", lambda d: {"weight": d.normal(4, 4, 3, 2), "padding": "causal"},
            ValueError, '`weight` must have an odd last size where `padding` is "causal"; got 2.'),
        bad("bias shape", lambda d: {"bias": d.normal(3)}, ValueError,
            "`bias` must have shape (4,), the first size of `weight`; got (3,)."),
        bad("stride", lambda d: {"stride": 0}, ValueError,
            "`stride` must be an integer of at least 1, or two; got 0."),
        bad("dilation", lambda d: {"dilation": (1, 2.0)}, ValueError,
            "`dilation` must be an integer of at least 1, or two; got (1, 2.0)."),
        bad("padding", lambda d: {"padding": "same"}, ValueError,
            "`padding` must be an integer of at least 0, or two; got 'same'."),
        bad("not square", lambda d: {"padding": (1, 0)}, ValueError,
            "`padding` must leave as many queries as keys, with `weight`, `stride` and `dilation`; "
            "got 6 and 4."),
        bad("nothing left", lambda d: {"dilation": 3}, ValueError,
            "`padding` must leave as many queries as keys, with `weight`, `stride` and `dilation`; "
            "got 0 and 0."),
    ),
    kernels=kernels,
    launches=(
        Launch(causal_convolution, "_conv_config", "fwd", candidates),
        Launch(causal_convolution, "_conv_bwd_dweight_config", "bwd", square_candidates),
    ),
    benchmarks=(
        benchmark(1, 32, 1024, (3, 3), 32, padding=1),
        benchmark(1, 32, 2048, (6, 11), 32, padding="causal"),
        benchmark(1, 16, 2048, (6, 11), 8, padding="causal"),
        benchmark(1, 16, 1024, (3, 3), 16, padding=1, sparse=True),
    ),
)  # fmt: skip
