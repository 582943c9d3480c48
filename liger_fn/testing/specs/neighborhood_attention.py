"""Facts about neighborhood_attention."""

import inspect
from itertools import product
from math import prod

import torch
import torch.nn.functional as F

from liger_fn.functional import neighborhood_attention
from liger_fn.functional.attention import neighborhood_attention as room
from liger_fn.functional.core.launch import interpreted, triton_dtype
from liger_fn.testing.spec import BadCall, Benchmark, Case, Compilation, Config, Launch, OpSpec


def case(
    *shape: int,
    kernel_size: int | tuple[int, ...],
    size: float = 1.0,
    id: str = "",
    **options,
) -> Case:
    def make(draw):
        tensors = {n: draw.normal(*shape, scale=size) for n in ("q", "k", "v")}
        return {**tensors, "kernel_size": kernel_size, **options}

    return Case(id or "x".join(map(str, shape)), make)


def as_masked(q, k, v, kernel_size, *, dilation=1, window="shifted", scale=None):
    """PyTorch's own attention, with a mask."""
    planar = isinstance(kernel_size, tuple) and len(kernel_size) == 2
    sizes = kernel_size if isinstance(kernel_size, tuple) else (kernel_size,)
    steps = dilation if isinstance(dilation, tuple) else (dilation,) * len(sizes)
    lengths = q.shape[-1 - len(sizes) : -1]
    sees = torch.ones(1, 1, dtype=torch.bool, device=q.device)
    for T, size, step in zip(lengths, sizes, steps, strict=True):
        at, inside = room._neighbours(T, size, step, window, q.device)
        here = torch.zeros(T, T, dtype=torch.int32, device=q.device)
        here = here.scatter_add(1, at, inside.to(torch.int32)) > 0
        sees = torch.kron(sees, here) if planar else here
    images, tokens = q.shape[: -1 - len(sizes)], prod(lengths)
    if q.numel() == 0:
        # Of no features, PyTorch's own gives no tensor at all on a GPU.
        return room.reference(q, k, v, kernel_size, dilation=dilation, window=window, scale=scale)
    q, k, v = (t.reshape(prod(images), 1, tokens, q.shape[-1]) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, sees, scale=scale)
    return y.reshape(*images, *lengths, q.shape[-1])


def compiled(
    passed: str, dtype: torch.dtype, C: int, kernel_size: tuple[int, int], *T: int, **flags
) -> Compilation:
    kernel = getattr(room, f"_neighborhood_attention_{passed}_kernel")
    config = getattr(room, f"_neighborhood_attention_{passed.removeprefix('bwd_')}_config")
    windows = room._Windows(kernel_size, (1, 1), "shifted", 0.125, T)
    q = torch.empty(1, 1, 1, C, dtype=dtype, device="meta")
    launched = config(*windows.sizes(q))
    steps = {}
    if passed == "fwd":
        one = room._fwd_steps(windows.lengths, kernel_size, launched)
        steps = {"ONE": one is not None, "LOWEST": torch.finfo(torch.float32).min}
        one = one or (launched["TILE_1"], launched["TILE_2"])
        steps |= {"STEP_1": one[0], "STEP_2": one[1]}
    elif passed == "bwd_near":
        few = room._near_steps(windows.lengths, kernel_size, "shifted", launched)
        steps = {"STEP_1": few[0], "STEP_2": few[1]}
    constants = windows.constants(q, [0, 0, C]) | launched | steps | flags
    # Also where this process interprets.
    constants["PRODUCT"] = triton_dtype(dtype)
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    inputs, sums = (f"*{t.name}" for t in (constants["PRODUCT"], constants["COMPUTE"]))
    runtime = [n for n in inspect.signature(kernel.fn).parameters if n not in constants]
    types = {n: inputs if n.endswith("_ptr") else "i32" for n in runtime}
    types |= {n: sums for n in ("top_ptr", "over_ptr", "delta_ptr") if n in runtime}
    where = f"{'x'.join(map(str, kernel_size))}-of-{'x'.join(map(str, T))}"
    return Compilation(f"{passed}-{where}-{C}{inputs}", kernel, types, constants, warps, stages)


def kernels() -> list[Compilation]:
    dq, dkv = {"NEED_DQ": True}, {"NEED_DK": True, "NEED_DV": True}
    narrow = [
        compiled(passed, dtype, C, kernel_size, *lengths, **flags)
        for dtype, C, kernel_size, lengths in (
            (torch.bfloat16, 64, (1, 7), (1, 4096)),
            (torch.bfloat16, 128, (1, 7), (1, 4096)),
            (torch.bfloat16, 256, (1, 7), (1, 4096)),
            (torch.bfloat16, 32, (7, 7), (7, 7)),
            (torch.float32, 64, (1, 7), (1, 4096)),
            (torch.float64, 64, (1, 3), (1, 4096)),
        )
        for passed, flags in (("fwd", {}), ("bwd_near", dq | dkv))
    ]
    wide = [
        compiled(passed, dtype, C, kernel_size, *lengths, **flags)
        for dtype, C, kernel_size, lengths in (
            (torch.bfloat16, 64, (1, 129), (1, 4096)),
            (torch.bfloat16, 128, (1, 129), (1, 4096)),
            (torch.bfloat16, 32, (7, 7), (56, 56)),
            (torch.bfloat16, 64, (17, 17), (64, 64)),
            (torch.bfloat16, 128, (7, 7), (64, 64)),
            (torch.bfloat16, 256, (7, 7), (64, 64)),
            (torch.float32, 64, (7, 7), (64, 64)),
            (torch.float64, 64, (7, 7), (64, 64)),
        )
        for passed, flags in (("fwd", {}), ("bwd_dq", dq), ("bwd_dkv", dkv))
    ]
    return narrow + wide


def benchmark(id: str, *shape: int, kernel_size, **options) -> Benchmark:
    """q, k and v as views of projections, tokens before heads, as models have them.

    Of greater shapes the reference's windows in float64 would not fit beside it.
    """
    *lengths, C = shape[2:]
    tokens, window = prod(shape[:-1]), kernel_size
    if isinstance(kernel_size, tuple):
        window = prod(kernel_size)

    def make(draw):
        def view():
            return draw.normal(shape[0], *lengths, shape[1], C).movedim(-2, 1)

        return {"q": view(), "k": view(), "v": view(), "kernel_size": kernel_size, **options}

    return Benchmark(
        id,
        make,
        bytes_fwd=8 * tokens * C,
        bytes_bwd=16 * tokens * C,
        flops_fwd=4 * tokens * window * C,
        flops_bwd=10 * tokens * window * C,
    )


def candidates(current: Config) -> list[Config]:
    """Tiles along a line, or squares and their halves, and blocks of half to twice their size."""
    line = current["TILE_1"] == 1
    tiles = [(1, n) for n in (16, 32, 64, 128)] if line else [(4, 4), (4, 8), (8, 8), (8, 16)]
    sizes = (16, 32, 64, 128, 256) if "BLOCK_2" in current else (0,)
    found = []
    for (a, b), n, w, s in product(tiles, sizes, (1, 2, 4, 8), (1, 2, 3)):
        # A warp has 16 rows of a product.
        if not 16 * w <= 2 * a * b <= 128 * w:
            continue
        tile = {"TILE_1": a, "TILE_2": b, "num_warps": w, "num_stages": s}
        if n == 0:
            found += [current | tile] if s == 1 else []
        elif a * b // 2 <= n <= (2 if line else 4) * a * b:
            block = room._square(n, not line)
            found.append(current | tile | {"BLOCK_1": block[0], "BLOCK_2": block[1]})
    return found


def bad(id: str, change, error: type[Exception], sentence: str) -> BadCall:
    def make(draw):
        tensors = {n: draw.normal(2, 3, 8, 4) for n in ("q", "k", "v")}
        return {**tensors, "kernel_size": 3} | change(draw)

    return BadCall(id, make, error, f"neighborhood_attention: {sentence}")


def huge(draw):
    # Drawn once and repeated: to draw 2^31 numbers takes minutes.
    tensors = {n: draw.normal(32, 16, 1024, 64).repeat(65, 1, 1, 1) for n in ("q", "k", "v")}
    return {**tensors, "kernel_size": 7}


# Where one key takes nearly all, dy · v − delta cancels to the rounding of its two sums. PyTorch
# takes the same difference, of sums in another order.
SLACK = {torch.float32: 2.0, torch.float64: 2.0}
if interpreted():
    # There the order of a product's sums depends on the shape of its tiles: large scores differ
    # forward and backward. And bfloat16 y, of which delta is made, is cut off, not rounded.
    SLACK |= {torch.float32: 8.0, torch.bfloat16: 8.0}

SPEC = OpSpec(
    op=neighborhood_attention,
    reference=room.reference,
    baseline=as_masked,
    grads=("q", "k", "v"),
    rows=("q", "k", "v"),
    autocast=True,
    slack=SLACK,
    cases=(
        case(4, 5, 2, kernel_size=3, id="line"),
        case(1, 2, 4, 3, 2, kernel_size=(3, 2), id="plane"),
        case(7, 2, kernel_size=3, dilation=3, window="cut", id="cut"),
        case(2, 6, 2, kernel_size=3, dilation=2, window="causal", scale=0.3, id="causal"),
        case(4, 5, 2, kernel_size=(2, 2), dilation=2, id="dilated-plane"),
    ),
    sizes=(
        case(0, 9, 4, kernel_size=3, id="no-images"),
        case(2, 9, 0, kernel_size=3, id="no-features"),
        case(2, 0, 3, kernel_size=3, window="cut", id="no-tokens"),
        case(1, 1, kernel_size=1, id="one"),
        case(5, 4, kernel_size=(5,), id="whole-sequence"),
        case(3, 4, kernel_size=9, window="cut", id="window-wider-than-sequence"),
        case(2, 3, 2, kernel_size=2, dilation=5, window="causal", id="more-residues-than-tokens"),
        case(2, 2, 150, 40, kernel_size=13, id="beyond-one-tile"),
        case(2, 200, 16, kernel_size=67, dilation=2, id="window-beyond-one-block"),
        case(1, 2, 140, 16, kernel_size=90, window="causal", id="long-causal"),
        case(2, 2, 101, 8, kernel_size=6, id="narrow"),
        case(3, 90, 8, kernel_size=7, dilation=2, window="cut", scale=-0.4, id="narrow-cut"),
        case(2, 70, 8, kernel_size=5, window="causal", scale=0.0, id="narrow-causal"),
        case(1, 13, 11, 8, kernel_size=(3, 2), window="cut", id="narrow-plane"),
        case(2, 19, 21, 20, kernel_size=(5, 7), id="plane-of-tiles"),
        case(1, 20, 18, 8, kernel_size=(3, 5), dilation=(3, 2), window="cut", id="cut-plane"),
        case(1, 12, 13, 8, kernel_size=(4, 3), window="causal", id="causal-plane"),
        case(2, 12, 12, 8, kernel_size=(1, 3), id="rows-of-a-plane"),
        case(2, 12, 12, 8, kernel_size=(3, 1), dilation=2, id="columns-of-a-plane"),
        case(2, 40, 130, kernel_size=5, id="wide-heads"),
        case(2, 40, 16, kernel_size=5, size=10.0, id="large"),
    ),
    errors=(
        bad("q integer", lambda d: {"q": d.integers(3, 2, 3, 8, 4)}, TypeError,
            "`q` must have a floating-point dtype"),
        bad("k dtype", lambda d: {"k": d.normal(2, 3, 8, 4).half()}, TypeError,
            "`k` must have the dtype of `q`, torch.float32; got torch.float16."),
        bad("v shape", lambda d: {"v": d.normal(2, 3, 8, 5)}, ValueError,
            "`v` must have shape (2, 3, 8, 4), the shape of `q`; got (2, 3, 8, 5)."),
        bad("v device", lambda d: {"v": torch.ones(2, 3, 8, 4, device="meta")}, ValueError,
            "`v` must be on the device of `q`"),
        bad("no plane", lambda d: {n: d.normal(3, 4) for n in "qkv"} | {"kernel_size": (3, 3)},
            ValueError, "`q` must have 2 dimensions of tokens and one of features; got (3, 4)."),
        bad("wide heads", lambda d: {n: d.normal(8, 257) for n in "qkv"}, NotImplementedError,
            "`q` must have heads of at most 256 features; got 257."),
        bad("kernel_size", lambda d: {"kernel_size": 0}, ValueError,
            "`kernel_size` must be a positive integer, or two; got 0."),
        bad("kernel_size three", lambda d: {"kernel_size": (3, 3, 3)}, ValueError,
            "`kernel_size` must be a positive integer, or two; got (3, 3, 3)."),
        bad("dilation", lambda d: {"dilation": 1.5}, ValueError,
            "`dilation` must be a positive integer, or two; got 1.5."),
        bad("dilation two", lambda d: {"dilation": (2, 2)}, ValueError,
            "`dilation` must be one number, as `kernel_size` is; got (2, 2)."),
        bad("too wide", lambda d: {"dilation": 3}, ValueError,
            "`kernel_size` must leave room for `dilation` times it in 8 tokens; got 3 times 3."),
        bad("window", lambda d: {"window": "same"}, ValueError,
            "`window` must be one of 'shifted', 'cut', 'causal'; got 'same'."),
        bad("scale", lambda d: {"scale": "1"}, TypeError,
            "`scale` must be a number; got str."),
    ),
    kernels=kernels,
    benchmarks=(
        benchmark("line-4x16x4096x64-7-cut", 4, 16, 4096, 64, kernel_size=7, window="cut"),
        benchmark("line-2x16x4096x64-129", 2, 16, 4096, 64, kernel_size=129),
        benchmark("causal-1x16x2048x128-256", 1, 16, 2048, 128, kernel_size=256, window="causal"),
        benchmark("nat-32x4x56x56x32-7x7", 32, 4, 56, 56, 32, kernel_size=(7, 7)),
        benchmark("dinat-32x4x56x56x32-7x7-8", 32, 4, 56, 56, 32, kernel_size=(7, 7), dilation=8),
        benchmark("plane-1x8x64x64x64-17x17", 1, 8, 64, 64, 64, kernel_size=(17, 17)),
    ),
    launches=(
        Launch(room, "_neighborhood_attention_fwd_config", "fwd", candidates),
        Launch(room, "_neighborhood_attention_near_config", "bwd", candidates),
        Launch(room, "_neighborhood_attention_dq_config", "bwd", candidates),
        Launch(room, "_neighborhood_attention_dkv_config", "bwd", candidates),
    ),
    huge=Case("2080x16x1024x64", huge),
)  # fmt: skip
