"""Facts about mhc_post."""

import inspect

import torch
import triton.language as tl

from liger_fn.functional import mhc_post
from liger_fn.functional.residual import mhc_post as room
from liger_fn.testing.spec import BadCall, Benchmark, Case, Compilation, Launch, OpSpec, around


def arguments(draw, *shape: int, scale: float = 1.0) -> dict:
    """With coefficients as `mhc_pre` gives them, in float32."""
    *tokens, H, D = shape
    return {
        "x": draw.normal(*shape, scale=scale),
        "y": draw.normal(*tokens, D, scale=scale),
        "post": draw.uniform(*tokens, H, high=2.0, dtype=torch.float32),
        "res": draw.normal(*tokens, H, H, dtype=torch.float32).softmax(-1),
    }


def case(*shape: int, id: str = "", scale: float = 1.0) -> Case:
    return Case(id or "x".join(map(str, shape)), lambda d: arguments(d, *shape, scale=scale))


def _transposed(draw) -> dict:
    """res as DeepSeek-V4 has it, and y of another dtype than x."""
    given = arguments(draw, 3, 4, 8)
    return given | {"res": given["res"].transpose(-1, -2), "y": given["y"].float()}


def as_models_write_it(x, y, post, res):
    """Coefficients rounded to the dtype of the streams."""
    return post.to(x.dtype)[..., None] * y[..., None, :].to(x.dtype) + res.to(x.dtype) @ x


def kernels() -> list[Compilation]:
    out = []
    for H, D in ((4, 4096), (2, 2048), (8, 2048), (16, 128), (3, 2560)):
        for passed, config in (("fwd", room._fwd_config), ("bwd", room._bwd_config)):
            kernel = getattr(room, f"_mhc_post_{passed}_kernel")
            constants = {"COMPUTE": tl.float32, "H": H, **config(D, H)}
            warps = constants.pop("num_warps")
            runtime = [n for n in inspect.signature(kernel.fn).parameters if n not in constants]
            floats = ("post_ptr", "res_ptr", "dpost_ptr", "dres_ptr")
            signature = {
                n: "*fp32" if n in floats else "*bf16" if n.endswith("_ptr") else "i32"
                for n in runtime
            }
            out.append(Compilation(f"{passed}-{H}x{D}", kernel, signature, constants, warps))
    return out


def benchmark(T: int, H: int, D: int) -> Benchmark:
    n = T * D
    return Benchmark(
        f"{T}x{H}x{D}",
        lambda draw: arguments(draw, 1, T, H, D),
        bytes_fwd=(4 * H + 2) * n,
        bytes_bwd=(6 * H + 4) * n,
    )


def bad(id: str, change, error: type[Exception], sentence: str) -> BadCall:
    def make(draw):
        return arguments(draw, 4, 2, 8) | change(draw)

    return BadCall(id, make, error, f"mhc_post: {sentence}")


SPEC = OpSpec(
    op=mhc_post,
    reference=room.reference,
    baseline=as_models_write_it,
    grads=("x", "y", "post", "res"),
    rows=("x", "y", "post", "res"),
    cases=(
        case(4, 2, 3),
        case(2, 3, 4, 5, id="four-streams"),
        Case("transposed", _transposed),
        case(2, 7, 5, id="rows-apart"),
    ),
    sizes=(
        case(0, 4, 8),
        case(4, 7),
        case(1, 1, 1),
        case(9, 4, 1100, id="wide"),
        case(3, 3, 300, id="three-streams"),
        case(2, 16, 40, id="sixteen-streams"),
        case(4, 4, 64, scale=100.0, id="large"),
        case(4, 4, 64, scale=1e-3, id="tiny"),
    ),
    errors=(
        bad("x integer", lambda d: {"x": d.integers(3, 4, 2, 8)}, TypeError,
            "`x` must have a floating-point dtype"),
        bad("x row", lambda d: {"x": d.normal(8)}, ValueError,
            "`x` must have shape (..., H, D) with at least one stream and one feature; got (8,)."),
        bad("streams", lambda d: {"x": d.normal(4, 17, 8)}, NotImplementedError,
            "`x` must have at most 16 streams; got 17."),
        bad("y shape", lambda d: {"y": d.normal(4, 2, 8)}, ValueError,
            "`y` must have shape (4, 8), with the sizes of `x`; got (4, 2, 8)."),
        bad("y integer", lambda d: {"y": d.integers(3, 4, 8)}, TypeError,
            "`y` must have a floating-point dtype"),
        bad("post shape", lambda d: {"post": d.normal(2)}, ValueError,
            "`post` must have shape (4, 2), with the sizes of `x`; got (2,)."),
        bad("res shape", lambda d: {"res": d.normal(4, 2)}, ValueError,
            "`res` must have shape (4, 2, 2), with the sizes of `x`; got (4, 2)."),
        bad("res device", lambda d: {"res": torch.ones(4, 2, 2, device="meta")}, ValueError,
            "`res` must be on the device of `x`"),
    ),
    kernels=kernels,
    benchmarks=(benchmark(8192, 4, 4096), benchmark(4096, 4, 7168), benchmark(8192, 4, 2560)),
    launches=(
        Launch(room, "_fwd_config", "fwd", around(BLOCK_D=(512, 1024, 2048), num_warps=(2, 4, 8))),
        Launch(room, "_bwd_config", "bwd",
               around(per_thread=(2, 8), BLOCK_D=(64, 128, 256, 512), num_warps=(1, 2, 4))),
    ),
    huge=Case(
        "131328x4x4096",
        lambda d: {n: t.repeat(32, *[1] * (t.dim() - 1))
                   for n, t in arguments(d, 4104, 4, 4096).items()},
    ),
)  # fmt: skip
