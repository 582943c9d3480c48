"""What the specs of the norms share."""

import inspect
from collections.abc import Callable, Sequence

import torch
import triton.language as tl

from liger_fn.functional.norm import rows
from liger_fn.testing.spec import (
    Arguments,
    BadCall,
    Benchmark,
    Compilation,
    Draw,
    Launch,
    around,
)

_SHAPES = (
    (8192, 4096),
    (16384, 2048),
    (8192, 8192),
    (4096, 16384),
    (65536, 128),
    (8192, 3584),
    (8192, 5376),
    # Heads, widths that are no powers of two, few rows and many.
    (65536, 64),
    (65536, 256),
    (8192, 1152),
    (8192, 2560),
    (8192, 2880),
    (8192, 3840),
    (8192, 5120),
    (8192, 7168),
    (1024, 4096),
    (32768, 4096),
    (65536, 4096),
)


def benchmarks(
    make: Callable[[Draw, int, int], Arguments], bytes_fwd: int, bytes_bwd: int
) -> tuple[Benchmark, ...]:
    """The headline shapes; the bytes are those per element of x."""
    return tuple(
        Benchmark(
            f"{N}x{D}",
            lambda draw, N=N, D=D: make(draw, N, D),
            bytes_fwd=bytes_fwd * N * D,
            bytes_bwd=bytes_bwd * N * D,
        )
        for N, D in _SHAPES
    )


def launches() -> tuple[Launch, ...]:
    forward = around(BLOCK_N=(1, 2, 4, 8, 16, 32), num_warps=(2, 4, 8, 16, 32))
    backward = around(
        BLOCK_N=(1, 2, 4, 8), STAGES=(1, 2), num_warps=(4, 8, 16), per_sm=(1, 2, 4, 8)
    )
    return (
        Launch(rows, "_fwd_config", "fwd", forward),
        Launch(rows, "_bwd_config", "bwd", backward),
    )


def feature_errors(op: str, *names: str) -> tuple[BadCall, ...]:
    """Wrong shapes, dtypes and devices of what has one value per column."""

    def bad(what: str, name: str, wrong: Callable, error: type[Exception], sentence: str):
        def make(draw):
            rows = {"residual": draw.normal(4, 8)} if op.startswith("fused_add") else {}
            return {"x": draw.normal(4, 8), **rows, name: wrong(draw)}

        return BadCall(f"{name} {what}", make, error, sentence)

    return tuple(
        call
        for name in names
        for call in (
            bad(
                "shape",
                name,
                lambda d: d.normal(7),
                ValueError,
                f"{op}: `{name}` must have shape (8,), the last size of `x`; got (7,).",
            ),
            bad(
                "integer",
                name,
                lambda d: d.integers(3, 8),
                TypeError,
                f"`{name}` must have a floating-point dtype",
            ),
            bad(
                "device",
                name,
                lambda d: torch.ones(8, device="meta"),
                ValueError,
                f"`{name}` must be on the device of `x`",
            ),
        )
    )


_STATISTICS = ("mean_ptr", "rstd_ptr", "part_ptr", "dweight_part_ptr", "dbias_part_ptr")


def _compilation(id: str, kernel, absent: Sequence[str], num_warps: int, **constants):
    """A kernel on bfloat16 tensors, those in `absent` being None; sizes fit 32 bits."""
    parameters = inspect.signature(kernel.fn).parameters
    constants |= {n: None for n in absent if n in parameters}
    constants.pop("per_sm", None)

    def type_of(name: str) -> str:
        if name.removeprefix("more_") in _STATISTICS:
            return "*fp32"
        return "*bf16" if name.endswith("_ptr") else "i32"

    signature = {n: type_of(n) for n in parameters if n not in constants}
    return Compilation(id, kernel, signature, constants, num_warps)


def compilations(
    residual: bool = False, centred: bool = False, sampled: bool = False
) -> Callable[[], list[Compilation]]:
    """The kernels as the norm of a sum, the centred one, a modulated one or none launches them."""
    absent = [] if residual else ["residual_ptr", "s_ptr", "ds_ptr"]
    absent += [] if centred else ["mean_ptr"]
    shifted = centred or sampled
    absent += [] if shifted else ["bias_ptr", "dbias_part_ptr", "more_part_ptr", "more_out_ptr"]
    absent += [] if sampled else ["T"]
    compute = {"COMPUTE": tl.float32}
    # A norm that may have an offset has one here: it takes more registers than none.
    scaled = {"OFFSET": None if centred and not sampled else 1.0, **compute}

    def kernels():
        out = []
        for D in (64, 128, 1152, 2048, 2880, 4096, 5120, 8192, 16384, 32768, 65536):
            config = {"EPS": 1e-6, "CAST": False, **scaled, **rows._fwd_config(D, 2, shifted)}
            kernel = rows._norm_fwd_kernel if "PIECES" in config else rows._norm_fwd_wide_kernel
            out.append(_compilation(f"fwd-{D}", kernel, absent, **config))
        for D in (64, 128, 1152, 2048, 2880, 4096, 5120, 8192, 12288, 16384, 32768):
            config = {**scaled, **rows._bwd_config(D, 2, centred, sampled)}
            kernel = rows._norm_bwd_kernel if "PIECES" in config else rows._norm_bwd_wide_dx_kernel
            apart = ["dbias_part_ptr"] if rows._dbias_is_apart(D, centred) else []
            out.append(_compilation(f"bwd-{D}", kernel, absent + apart, **config))
        tile = {"BLOCK_N": 8, "BLOCK_D": 256, "STAGES": 2, "num_warps": 4, **compute}
        wide = rows._norm_bwd_wide_dweight_kernel
        out.append(_compilation("bwd-wide-dweight", wide, absent, **tile))
        if centred:
            without = [*absent, "dweight_part_ptr"]
            out.append(_compilation("bwd-wide-dbias", wide, without, **tile))
        adding = rows.add_parts_config(73728 if sampled else 4096)
        return [*out, _compilation("add-parts", rows._add_parts_kernel, absent, **adding)]

    return kernels
