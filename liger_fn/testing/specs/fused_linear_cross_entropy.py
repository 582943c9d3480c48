"""Facts about fused_linear_cross_entropy."""

import torch
import torch.nn.functional as F
import triton.language as tl

from liger_fn.functional import fused_linear_cross_entropy
from liger_fn.functional.linear_loss import cross_entropy as room
from liger_fn.functional.linear_loss import products, statistics
from liger_fn.testing.spec import BadCall, Benchmark, Case, Compilation, OpSpec
from liger_fn.testing.specs.cross_entropy import EVERY_OPTION, as_torch, compilation, targets


def case(*shape: int, id: str = "", bias: bool = False, weighted: bool = False, **options) -> Case:
    """A case of x (..., H) and a weight (V, H); the shape is (..., H, V)."""
    *rows, H, V = shape

    def make(draw):
        arguments = {
            "weight": draw.normal(V, H, scale=max(1, H) ** -0.5),
            "x": draw.normal(*rows, H),
            "y": targets(draw, V, *rows, ignore_index=options.get("ignore_index", -100)),
            **options,
        }
        if bias:
            arguments["bias"] = draw.normal(V)
        if weighted:
            arguments["class_weight"] = draw.uniform(V, dtype=room.accumulator(draw.dtype)) + 0.5
        return arguments

    return Case(id or "x".join(map(str, shape)), make)


def as_models_write_it(
    weight, x, y, chunk_size=None, *, bias=None, num_items=None, max_valid=None,
    memory_budget=None, accum_dtype=None, **options,
):  # fmt: skip
    logits = F.linear(x, weight, bias)
    if num_items is not None:
        return as_torch(logits, y, **options | {"reduction": "sum"}) / num_items
    return as_torch(logits, y, **options)


def benchmark(N: int, H: int, V: int, ignored: float = 0.0, peaked: bool = False) -> Benchmark:
    """Flat logits, or peaked ones: the target's stands out as in a trained model."""

    def make(draw):
        weight, x, y = draw.normal(V, H, scale=H**-0.5), draw.normal(N, H), draw.integers(V, N)
        if peaked:
            x = x * 2.0 + weight[y] * 8.0
        if ignored:
            y[draw.uniform(N, dtype=torch.float32) < ignored] = -100
        return {"weight": weight, "x": x, "y": y}

    more = f"-{ignored:.0%}-ignored" * bool(ignored) + "-peaked" * peaked
    live = 1.0 - ignored
    return Benchmark(
        f"{N}x{H}x{V}{more}".replace("%", "pct"),
        make,
        flops_fwd=int(2 * N * H * V * live),
        flops_bwd=int(4 * N * H * V * live),
    )


def kernels() -> list[Compilation]:
    over_the_logits = [
        compilation(f"chunk-{V}-{name}", V, True, True, **options)
        for V in (32000, 50257, 262144)
        for name, options in {"plain": {}, "every-option": EVERY_OPTION}.items()
    ]
    signature = {"scalar_ptr": "*fp32", "out_ptr": "*bf16", "n": "i32", "strip": "i32"}
    upstream = [
        Compilation(
            f"upstream-{held}",
            room._times_scalar_kernel,
            {"unit_ptr": f"*{held}"} | signature,
            {"UNIT": 1.0, "IN_PLACE": held == "bf16", "BLOCK": 4096},
            8,
        )
        for held in ("bf16", "fp32")
    ]
    return [*over_the_logits, *upstream, *products_of_tiles(), *orders_of_rows()]


def tiles(dtype: str, pieces: int = 1, **blocks: str) -> dict[str, str]:
    """Descriptors of tiles: `x="MK"` has blocks of BLOCK_M x BLOCK_K, in so many pieces."""
    config = products.tiles_config()
    sizes = {n: (config[f"BLOCK_{a}"], config[f"BLOCK_{b}"]) for n, (a, b) in blocks.items()}
    return {f"{n}_desc": f"tensordesc<{dtype}[{a},{b // pieces}]>" for n, (a, b) in sizes.items()}


def of_tiles(id: str, kernel, signature: dict, chips: tuple[int, ...] = (90,), **constants):
    config = products.tiles_config()
    warps, stages = config.pop("num_warps"), config.pop("num_stages")
    signature = signature | {"count_ptr": "*i32"} | dict.fromkeys(("first", "N", "V", "H"), "i32")
    constants = {"PROGRAMS": 132} | config | constants
    return Compilation(id, kernel, signature, constants, warps, stages, chips=chips)


def products_of_tiles() -> list[Compilation]:
    """The products that skip what does not count, on Hopper; sums of two chunks on others, too."""
    kernels = []
    bias = {"bias_ptr": "*bf16"}
    for name, dtype in {"bf16": tl.bfloat16, "fp16": tl.float16}.items():
        logits = tiles(name, x="MK", weight="NK", logits="MN") | bias
        kernels.append(of_tiles(f"logits-{name}", products._logits_kernel, logits, DTYPE=dtype))
        for out in (name, "fp32"):
            like = torch.empty(0, dtype=torch.float32 if out == "fp32" else torch.float16)
            pieces = products._pieces(like, buffers=2)
            dx = tiles(name, g="MK", weight="KN") | tiles(out, pieces, dx="MN")
            dx |= tiles("fp32", 4, parts="MN")
            options = {"DTYPE": dtype, "PIECES": pieces}
            kernels.append(of_tiles(f"dx-{name}-{out}", products._dx_kernel, dx, **options))
            for add in (False, True):
                options = {"DTYPE": dtype} | products._writing(like, add)
                dweight = tiles(name, g="KM", x="KN") | tiles(out, options["PIECES"], dweight="MN")
                id = f"dweight-{name}-{out}{'-add' * add}"
                chips = (90, 100) if options["ADD"] == "here" else (90,)
                kernels.append(of_tiles(id, products._dweight_kernel, dweight, chips, **options))
    return kernels + statistics_of_tiles()


def statistics_of_tiles() -> list[Compilation]:
    rows = {"y_ptr": "*i64", "held_ptr": "*i32"}
    rows |= {f"{n}_ptr": "*fp32" for n in ("z_t", "top", "total")}
    more = {"moment_ptr": "*fp32", "best_ptr": "*i32"}
    signature = tiles("bf16", x="MK", weight="NK") | rows
    options = {"LOWEST": torch.finfo(torch.float32).min, "DTYPE": tl.bfloat16, "SCALE": 1.0}
    kernel = statistics._statistics_kernel
    nothing = dict.fromkeys(("moment_ptr", "best_ptr", "bias_ptr", "CAP"))
    return [
        of_tiles("statistics", kernel, signature, **options, **nothing),
        of_tiles("statistics-all", kernel, signature | more | {"bias_ptr": "*bf16"}, **options,
                 CAP=30.0),
    ]  # fmt: skip


def orders_of_rows() -> list[Compilation]:
    """What takes rows to the front and back again, and puts together what is known of each."""
    config = products.tiles_config()
    where = {"y_ptr": "*i64", "places_ptr": "*i64", "count_ptr": "*i32", "held_ptr": "*i32"}
    sizes = dict.fromkeys(("stride_n", "first", "N", "H", "V", "columns", "ignore_index"), "i32")
    gathered = dict.fromkeys(("x_ptr", "out_ptr"), "*bf16")
    spread = {"dx_ptr": "*bf16", "parts_ptr": "*fp32", "out_ptr": "*bf16"}
    divided = {"PROGRAMS": 132} | {n: config[n] for n in ("GROUP", "BLOCK_M", "BLOCK_N")}
    numbers = ("z_t", "top", "total", "moment", "logp", "lse", "entropy", "highest", "log_sum")
    known = {f"{n}_ptr": "*fp32" for n in (*numbers, "top1")} | {"best_ptr": "*i32"}
    nothing = dict.fromkeys(("moment_ptr", "best_ptr", "entropy_ptr", "top1_ptr"))
    together = {"LOWEST": torch.finfo(torch.float32).min, "BLOCK_C": 64, "BLOCK_N": 32}

    def of_rows(id: str, kernel, pointers: dict, num_warps: int = 4, **constants) -> Compilation:
        given = where | sizes | pointers
        signature = {n: given[n] for n in kernel.arg_names if n in given and n not in constants}
        return Compilation(id, kernel, signature, constants, num_warps)

    return [
        of_rows("places", products._places_kernel, {}, 8, BLOCK=4096),
        of_rows("gather", products._gather_kernel, gathered,
                TILE=config["BLOCK_M"], BLOCK_N=8, BLOCK_H=1024),
        of_rows("spread", products._spread_kernel, spread, BLOCK_R=16, **divided),
        of_rows("targets", statistics._targets_kernel, {}, 8,
                BLOCK_M=config["BLOCK_M"], WIDTH=config["BLOCK_N"] // 4, BLOCK_C=256),
        of_rows("combine", statistics._combine_kernel, known, **together, **nothing),
        of_rows("combine-all", statistics._combine_kernel, known, **together),
    ]  # fmt: skip


def _good(draw) -> dict:
    return {"weight": draw.normal(8, 6), "x": draw.normal(4, 6), "y": draw.integers(8, 4)}


def bad(id: str, change, error: type[Exception], sentence: str) -> BadCall:
    return BadCall(id, lambda draw: _good(draw) | change(draw), error, sentence)


SPEC = OpSpec(
    op=fused_linear_cross_entropy,
    reference=room.reference,
    baseline=as_models_write_it,
    grads=("weight", "x", "bias"),
    rows=("x", "y"),
    autocast=True,
    cases=(
        case(4, 3, 7, chunk_size=3, bias=True, id="chunks-of-3"),
        case(2, 3, 5, 9, id="one-chunk"),
        case(5, 4, 7, chunk_size=2, reduction="none", bias=True, id="rows"),
        case(2, 3, 4, 7, chunk_size=1, reduction="sum", z_loss=1e-2, id="sum-z-loss"),
        case(4, 3, 7, chunk_size=2, label_smoothing=0.2, weighted=True, id="weighted-smoothing"),
        case(4, 3, 7, softcap=2.0, logit_scale=0.5, bias=True, id="scaled-softcap"),
        case(
            4, 3, 7, chunk_size=3, softcap=2.0, weighted=True, reduction="none", ignore_index=2,
            id="weighted-rows",
        ),
        case(2, 3, 4, 7, chunk_size=4, num_items=5, id="divided"),
        case(6, 3, 7, memory_budget=64, max_valid=5, id="some-rows"),
        case(6, 3, 7, max_valid=5, reduction="none", id="some-losses"),
    ),
    sizes=(
        case(6, 9, id="single-row"),
        case(0, 6, 9),
        case(3, 5, 1),
        case(3, 0, 5, bias=True, id="no-features"),
        case(3, 0, 5, reduction="none", id="no-features-rows"),
        case(2, 7, 16, 130, chunk_size=4),
        case(40, 64, 1000, chunk_size=16),
        case(37, 64, 1000, chunk_size=16, reduction="none", id="37x64x1000-rows"),
        case(3, 32, 20000, chunk_size=2, id="beyond-one-block"),
        case(
            6, 16, 50, weighted=True, bias=True, label_smoothing=0.1, z_loss=1e-2, softcap=5.0,
            id="every-term",
        ),
        case(5, 16, 64, chunk_size=100, id="chunk-larger-than-all"),
        Case(
            "nothing-counts",
            lambda d: {
                "weight": d.normal(9, 6),
                "x": d.normal(4, 6),
                "y": torch.full((4,), -100, device=d.device),
            },
        ),
    ),
    errors=(
        bad("x integer", lambda d: {"x": d.integers(3, 4, 6)}, TypeError,
            "`x` must have a floating-point dtype"),
        bad("x scalar", lambda d: {"x": d.normal()}, ValueError,
            "`x` must have at least one dimension"),
        bad("weight integer", lambda d: {"weight": d.integers(3, 8, 6)}, TypeError,
            "`weight` must have a floating-point dtype"),
        bad("weight dtype", lambda d: {"weight": d.normal(8, 6, dtype=torch.float64)}, TypeError,
            "`weight` must have the dtype of `x`, torch.float32; got torch.float64."),
        bad("weight device", lambda d: {"weight": torch.ones(8, 6, device="meta")}, ValueError,
            "`weight` must be on the device of `x`"),
        bad("weight vector", lambda d: {"weight": d.normal(6)}, ValueError,
            "`weight` must have shape (V, H) with at least one class; got (6,)."),
        bad("no classes", lambda d: {"weight": d.normal(0, 6)}, ValueError,
            "`weight` must have shape (V, H) with at least one class; got (0, 6)."),
        bad("weight shape", lambda d: {"weight": d.normal(8, 5)}, ValueError,
            "`weight` must have shape (8, 6), (V, H) with the last size of `x`; got (8, 5)."),
        bad("y float", lambda d: {"y": d.normal(4)}, TypeError, "`y` must have an integer dtype"),
        bad("y shape", lambda d: {"y": d.integers(8, 5)}, ValueError,
            "`y` must have shape (4,), that of `x` without its last dimension; got (5,)."),
        bad("bias shape", lambda d: {"bias": d.normal(7)}, ValueError,
            "`bias` must have shape (8,), one per class; got (7,)."),
        bad("bias dtype", lambda d: {"bias": d.normal(8, dtype=torch.bfloat16)}, TypeError,
            "`bias` must have the dtype of `x`"),
        bad("chunk_size zero", lambda d: {"chunk_size": 0}, ValueError,
            "`chunk_size` must be a positive integer, or None; got 0."),
        bad("chunk_size float", lambda d: {"chunk_size": 2.0}, ValueError,
            "`chunk_size` must be a positive integer, or None; got 2.0."),
        bad("memory_budget zero", lambda d: {"memory_budget": 0}, ValueError,
            "`memory_budget` must be a positive number of bytes, or None; got 0."),
        bad("max_valid negative", lambda d: {"max_valid": -1}, ValueError,
            "`max_valid` must be a whole number of rows, or None; got -1."),
        bad("num_items of a sum", lambda d: {"num_items": 3, "reduction": "sum"}, ValueError,
            '`num_items` must be None unless `reduction` is "mean"; got 3.'),
        bad("num_items zero", lambda d: {"num_items": 0}, ValueError,
            "`num_items` must be positive; got 0."),
        bad("num_items vector", lambda d: {"num_items": torch.ones(2)}, ValueError,
            "`num_items` must have shape (), one number; got (2,)."),
        bad("accum_dtype", lambda d: {"accum_dtype": torch.float16}, ValueError,
            "`accum_dtype` must be torch.float32 for `x` of torch.float32, or None; got"),
        bad("class_weight shape", lambda d: {"class_weight": d.normal(7)}, ValueError,
            "`class_weight` must have shape (8,), one weight per class; got (7,)."),
        bad("reduction", lambda d: {"reduction": "average"}, ValueError,
            "`reduction` must be one of"),
        bad("softcap", lambda d: {"softcap": -1.0}, ValueError,
            "`softcap` must be positive, or None; got -1.0."),
    ),
    kernels=kernels,
    benchmarks=tuple(
        benchmark(*s)
        for s in (
            (8192, 4096, 128256),
            (16384, 2048, 128256),
            (8192, 3584, 152064),
            (8192, 2560, 262144),
            (8192, 4096, 32000),
            (8192, 4096, 151936),
            (1024, 4096, 128256),
            (2048, 4096, 128256),
            (4096, 4096, 128256),
            (32768, 4096, 128256),
            (65536, 4096, 128256),
            (8192, 4096, 128256, 0.7),
            (8192, 4096, 128256, 0.0, True),
        )
    ),
)  # fmt: skip
