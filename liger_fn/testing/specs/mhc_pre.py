"""Facts about mhc_pre."""

import inspect

import torch
import triton.language as tl

from liger_fn.functional import mhc_pre
from liger_fn.functional.residual import mhc_pre as room
from liger_fn.testing.spec import BadCall, Benchmark, Case, Compilation, Launch, OpSpec, around


def arguments(draw, *shape: int, scale: float = 1.0, params: torch.dtype | None = None) -> dict:
    """Logits of size 1: sigmoids and iterations are neither flat nor saturated."""
    H, D = shape[-2:]
    M = H * H + 2 * H
    return {
        "x": draw.normal(*shape, scale=scale),
        "weight": draw.normal(M, H * D, scale=(H * D) ** -0.5, dtype=params),
        "bias": draw.normal(M, dtype=params),
        "scale": draw.uniform(3, dtype=params) + 0.5,
    }


def case(*shape: int, id: str = "", scale: float = 1.0, params=None, **options) -> Case:
    def make(draw):
        return arguments(draw, *shape, scale=scale, params=params) | options

    return Case(id or "x".join(map(str, shape)), make)


def benchmark(T: int, H: int, D: int) -> Benchmark:
    """With parameters in float32, as DeepSeek-V4 has them."""
    n = T * D
    return Benchmark(
        f"{T}x{H}x{D}",
        lambda draw: arguments(draw, 1, T, H, D, params=torch.float32),
        bytes_fwd=(2 * H + 2) * n,
        bytes_bwd=(4 * H + 2) * n,
    )


_FLOATS = {
    "mix_part_ptr", "squares_part_ptr", "mix_ptr", "rstd_ptr", "pre_ptr", "post_ptr", "res_ptr",
    "dpre_ptr", "dpost_ptr", "dres_ptr", "scratch_ptr", "along_ptr", "dbias_part_ptr",
    "dscale_part_ptr", "dweight_part_ptr", "weight_ptr", "bias_ptr", "scale_ptr",
}  # fmt: skip


def kernels() -> list[Compilation]:
    def compiled(id: str, kernel, floats=_FLOATS, dtype: str = "bf16", **constants) -> Compilation:
        """With what is in `floats` in float32, and all else of `dtype`."""
        of_launch = "num_warps", "num_stages", "chips"
        options = {n: constants.pop(n) for n in of_launch if n in constants}
        constants["COMPUTE"] = tl.float32
        constants.pop("per_sm", None)
        runtime = [n for n in inspect.signature(kernel.fn).parameters if n not in constants]
        signature = {
            n: "*fp32" if n in floats else f"*{dtype}" if n.endswith("_ptr") else "i32"
            for n in runtime
        }
        return Compilation(id, kernel, signature, constants, **options)

    out = []
    for H, D in ((4, 4096), (2, 2048), (6, 2048), (8, 2048), (16, 512), (3, 2560)):
        M, of = H * H + 2 * H, f"{H}x{D}"
        sinkhorn = {"ITERATIONS": 20, "SINKHORN_EPS": 1e-6, "POST_SCALE": 2.0, "H": H}
        sinkhorn |= room._coefficients_config(H)
        streams = room.streams_config(D, H) | {"H": H}
        dense = {"weight_stride_k": 1}
        for dtype, kind in ((torch.float16, "fp16"), (torch.float32, "fp32")):
            x, weight = torch.empty(0, dtype=dtype), torch.empty(0)
            mix = {
                "SPAN": room._SPAN, "PIECES": 1, "PRECISION": room._precision_of_mix(x, weight),
                "PRODUCT": tl.float32, **room._mix_config(M, x.element_size()), **dense,
            }  # fmt: skip
            bwd = {"H": H, "WIDTH": M, **room._bwd_config(M, H, x.element_size()), **dense}
            with_dz = _FLOATS | {"dz_ptr"}
            out += [
                compiled(f"mix-{kind}-{of}", room._mhc_pre_mix_kernel, dtype=kind, **mix),
                compiled(f"bwd-{kind}-{of}", room._mhc_pre_bwd_kernel, with_dz, kind, **bwd),
            ]
        for pieces, floats, kind in ((3, _FLOATS, ""), (1, _FLOATS - {"weight_ptr"}, "bf16-")):
            mix = {
                "SPAN": room._SPAN, "PIECES": pieces, "PRECISION": "ieee",
                "PRODUCT": tl.bfloat16, **room._mix_config(M, 2, True), **dense,
            }  # fmt: skip
            pieces_of_x = _FLOATS - {"weight_ptr"}
            out.append(compiled(f"mix-{kind}{of}", room._mhc_pre_mix_kernel, pieces_of_x, **mix))
            if room._bwd_is_by_pieces(M, torch.bfloat16, 232448):
                bwd = {
                    "PIECES": max(2, pieces), "OF_WEIGHT": min(2, pieces), "PRODUCT": tl.bfloat16,
                    "WIDTH": 8 * -(-M // 8), "H": H, **room._bwd_config(M, H, 2, True), **dense,
                }  # fmt: skip
                kernel = room._mhc_pre_bwd_pieces_kernel
                out.append(compiled(f"bwd-{kind}{of}", kernel, floats, **bwd, chips=(90, 100)))
        fwd = {"EPS": 1e-6, "PRE_EPS": 0.0, **sinkhorn}
        bwd = {"PIECES": 3, "WIDTH": 8 * -(-M // 8), **sinkhorn}
        out += [
            compiled(f"coefficients-fwd-{of}", room._mhc_pre_coefficients_fwd_kernel, **fwd),
            compiled(f"coefficients-bwd-{of}", room._mhc_pre_coefficients_bwd_kernel, **bwd),
            compiled(f"fwd-{of}", room._mhc_pre_fwd_kernel, **streams),
            compiled(f"dpre-{of}", room._mhc_pre_bwd_dpre_kernel, **streams),
        ]
    weight = {"PIECES": 3, "BLOCK_K": 1024}
    out.append(compiled("weight-pieces", room._mhc_pre_weight_pieces_kernel, **weight))
    return out


def bad(id: str, change, error: type[Exception], sentence: str) -> BadCall:
    def make(draw):
        return arguments(draw, 4, 2, 8) | change(draw)

    return BadCall(id, make, error, f"mhc_pre: {sentence}")


SPEC = OpSpec(
    op=mhc_pre,
    reference=room.reference,
    grads=("x", "weight", "bias", "scale"),
    rows=("x",),
    # Products of float32 count 22 of its 24 bits; in 2 bytes dx is rounded once, after a product in
    # TF32, which is four times as fine. Tensor cores drop bits of sums that a CPU rounds.
    slack={torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0},
    cases=(
        case(4, 2, 3, iterations=3),
        case(2, 3, 4, 5, id="four-streams"),
        case(3, 3, 4, iterations=2, pre_eps=0.1, post_scale=1.5, sinkhorn_eps=0.01, eps=0.5,
             id="three-streams"),
        case(2, 1, 4, iterations=1, id="one-stream"),
    ),
    sizes=(
        case(0, 4, 8),
        case(4, 7),
        case(1, 1, 1),
        case(70, 4, 33, id="strips"),
        case(2, 4, 1100, id="wide"),
        case(3, 6, 40, id="six-streams"),
        case(2, 16, 8, iterations=4, id="sixteen-streams"),
        case(5, 4, 64, params=torch.float32, id="parameters-in-float32"),
        case(4, 4, 64, scale=100.0, id="large"),
        case(4, 4, 64, scale=1e-3, id="tiny"),
    ),
    errors=(
        bad("x integer", lambda d: {"x": d.integers(3, 4, 2, 8)}, TypeError,
            "`x` must have a floating-point dtype"),
        bad("x row", lambda d: {"x": d.normal(8)}, ValueError,
            "`x` must have shape (..., H, D) with at least one stream and one feature; got (8,)."),
        bad("x empty", lambda d: {"x": d.normal(4, 2, 0)}, ValueError,
            "`x` must have shape (..., H, D) with at least one stream and one feature; got"),
        bad("streams", lambda d: {"x": d.normal(4, 17, 8)}, NotImplementedError,
            "`x` must have at most 16 streams; got 17."),
        bad("weight shape", lambda d: {"weight": d.normal(16, 8)}, ValueError,
            "`weight` must have shape (8, 16), (H² + 2·H, H · D) of `x`; got (16, 8)."),
        bad("weight device", lambda d: {"weight": torch.ones(8, 16, device="meta")}, ValueError,
            "`weight` must be on the device of `x`"),
        bad("bias shape", lambda d: {"bias": d.normal(2)}, ValueError,
            "`bias` must have shape (8,), (H² + 2·H,); got (2,)."),
        bad("bias integer", lambda d: {"bias": d.integers(3, 8)}, TypeError,
            "`bias` must have a floating-point dtype"),
        bad("scale shape", lambda d: {"scale": d.normal(1)}, ValueError,
            "`scale` must have shape (3,), of pre, post and res; got (1,)."),
        bad("iterations", lambda d: {"iterations": 0}, ValueError,
            "`iterations` must be a positive integer; got 0."),
        bad("iterations float", lambda d: {"iterations": 2.0}, ValueError,
            "`iterations` must be a positive integer; got 2.0."),
        bad("eps", lambda d: {"eps": None}, TypeError, "`eps` must be a number; got NoneType."),
        bad("post_scale", lambda d: {"post_scale": "2"}, TypeError,
            "`post_scale` must be a number; got str."),
    ),
    kernels=kernels,
    benchmarks=(benchmark(8192, 4, 4096), benchmark(4096, 4, 7168), benchmark(8192, 4, 2560)),
    launches=(
        Launch(room, "_mix_config", "fwd",
               around(("BLOCK_N", "BLOCK_K"), BLOCK_N=(64, 128, 256), BLOCK_K=(32, 64, 128),
                      num_warps=(4, 8), num_stages=(3, 4, 5))),
        Launch(room, "_bwd_config", "bwd",
               around(("BLOCK_N", "BLOCK_D"), STREAMS=(1, 2), BLOCK_N=(16, 64, 128),
                      BLOCK_D=(64, 128), STAGES=(2, 3), num_warps=(4, 8))),
    ),
    huge=Case(
        "131328x4x4096",
        lambda d: arguments(d, 1, 4, 4096) | {"x": d.normal(4104, 4, 4096).repeat(32, 1, 1)},
    ),
)  # fmt: skip
