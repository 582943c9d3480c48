"""Facts about softmax."""

import inspect
from dataclasses import replace

import torch
import triton.language as tl

from liger_fn.functional import softmax
from liger_fn.functional.activation import softmax as room
from liger_fn.testing.spec import (
    BadCall,
    Benchmark,
    Case,
    Compilation,
    Config,
    Launch,
    OpSpec,
    around,
)


def case(
    *shape: int, mask: tuple[int, ...] | None = None, size: float = 1.0, id: str = "", **options
) -> Case:
    """One call; a mask of this shape allows about half of the elements, and one in every row."""

    def make(draw):
        x = draw.normal(*shape, scale=size)
        allowed = None if mask is None else draw.integers(2, *mask) == 1
        if allowed is not None:
            allowed[..., 0] = True
        return {"x": x, "mask": allowed, **options}

    return Case(id or "x".join(map(str, shape)), make)


def nothing_left(draw):
    """A row that is masked, one that is −∞ where it is not masked, and two whole ones."""
    x, mask = draw.normal(4, 5), torch.ones(4, 5, dtype=torch.bool)
    mask[0], mask[1, 1:] = False, False
    x[1, 0] = -torch.inf
    return {"x": x, "mask": mask.to(x.device), "scale": 0.5}


def as_torch(x, *, mask=None, scale=1.0):
    """PyTorch's own op, on what is scaled and masked in the dtype of x."""
    z = x if scale == 1.0 else x * scale
    return torch.softmax(z if mask is None else z.masked_fill(~mask, -torch.inf), -1)


def compilation(id: str, kernel, config: dict, **flags) -> Compilation:
    """A kernel on bfloat16 tensors; sizes and strides fit 32 bits."""
    constants = {"SCALE": 0.125, "HAS_MASK": False, "CAUSAL": False}
    constants |= {"COMPUTE": tl.float32, **flags, **config}
    warps, most = constants.pop("num_warps"), constants.pop("maxnreg", None)
    types = {"mask_ptr": "*u8", "top_total_ptr": "*fp32"}
    runtime = [n for n in inspect.signature(kernel.fn).parameters if n not in constants]
    signature = {n: types.get(n, "*bf16" if n.endswith("_ptr") else "i32") for n in runtime}
    return Compilation(id, kernel, signature, constants, warps, maxnreg=most)


def kernels() -> list[Compilation]:
    out = []
    lowest = torch.finfo(torch.float32).min
    plain = (256, 4096, 32768, 65536, 131072)
    for D, masked in (*((D, False) for D in plain), (4096, True), (32768, True), (131072, True)):
        config = room._softmax_fwd_config(D, not masked)
        tile = room._softmax_fwd_kernel if "BLOCK_N" in config else room._softmax_fwd_wide_kernel
        id = f"{D}-masked" if masked else str(D)
        flags = {"HAS_MASK": masked}
        out.append(compilation(f"fwd-{id}", tile, config, LOWEST=lowest, **flags))
        config = room._softmax_bwd_config(D, not masked)
        tile = room._softmax_bwd_kernel if "BLOCK_N" in config else room._softmax_bwd_wide_kernel
        out.append(compilation(f"bwd-{id}", tile, config, **flags))
    # What is held depends on the chip.
    kernel, config = room._softmax_bwd_wide_kernel, room._softmax_bwd_config(65536, True, False)
    ampere = compilation("bwd-65536-ampere", kernel, config)
    out = [replace(k, chips=(90, 100)) if k.id == "bwd-65536" else k for k in out]
    out.append(replace(ampere, chips=(80,)))
    return out


def benchmark(N: int, D: int) -> Benchmark:
    return Benchmark(
        f"{N}x{D}", lambda d: {"x": d.normal(N, D)}, bytes_fwd=4 * N * D, bytes_bwd=6 * N * D
    )


def attention_benchmark(B: int, H: int, T: int) -> Benchmark:
    """Scores of causal attention, with one mask for all heads."""

    def make(draw):
        x = draw.normal(B, H, T, T)
        mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=x.device).tril()
        return {"x": x, "mask": mask, "scale": 0.125}

    elements, mask = B * H * T * T, T * T
    return Benchmark(
        f"{B}x{H}x{T}x{T}-masked",
        make,
        bytes_fwd=4 * elements + mask,
        bytes_bwd=6 * elements + mask,
    )


def candidates(current: Config) -> list[Config]:
    """Tiles of whole rows as wide as they are, or walks along the row, and near the limit both."""
    walks = around(
        ("BLOCK_D",), BLOCK_D=(4096, 8192, 16384, 32768), HELD=(0, 1, 2, 4), num_warps=(8, 16, 32)
    )
    if "BLOCK_N" not in current:
        return walks(current)
    tiles = around(BLOCK_N=(1, 2, 4, 8, 16), num_warps=(2, 4, 8, 16, 32))(current)
    return tiles + (
        walks({"BLOCK_D": 8192, "HELD": 0, "num_warps": 8}) if current["BLOCK_D"] > 8192 else []
    )


def huge() -> Case:
    def make(draw):
        # Drawn once and repeated: to draw 2^31 numbers takes minutes.
        return {"x": draw.normal(8192, 4096).repeat(65, 1)}

    return Case("532480x4096", make)


SPEC = OpSpec(
    op=softmax,
    reference=room.reference,
    baseline=as_torch,
    grads=("x",),
    rows=("x", "mask"),
    cases=(
        case(4, 6, mask=(4, 6)),
        case(2, 3, 7, id="plain"),
        case(2, 2, 3, 4, mask=(2, 1, 3, 4), scale=0.3, id="heads-share-a-mask"),
        case(3, 6, mask=(6,), id="rows-share-a-mask"),
        Case("nothing-left", nothing_left),
    ),
    sizes=(
        case(1, 1),
        case(0, 16),
        case(3, 0),
        case(5, 1),
        case(7),
        case(2, 7, 64),
        case(70, 33, mask=(70, 33)),
        case(9, 2500),
        case(2, 20000, id="wide-bwd"),
        case(2, 40000, id="wide-both"),
        case(2, 2, 40000, mask=(2, 1, 40000), id="wide-masked"),
        case(4, 64, size=100.0, id="large"),
        case(4, 64, size=1e-3, id="tiny"),
    ),
    errors=(
        BadCall(
            "x integer",
            lambda d: {"x": d.integers(3, 4, 8)},
            TypeError,
            "softmax: `x` must have a floating-point dtype",
        ),
        BadCall(
            "x scalar",
            lambda d: {"x": d.normal()},
            ValueError,
            "softmax: `x` must have at least one dimension; got a scalar.",
        ),
        BadCall("x no tensor", lambda d: {"x": 3.0}, TypeError, "`x` must be a tensor; got float"),
        BadCall(
            "mask number",
            lambda d: {"x": d.normal(4, 8), "mask": True},
            TypeError,
            "softmax: `mask` must be a tensor; got bool.",
        ),
        BadCall(
            "mask float",
            lambda d: {"x": d.normal(4, 8), "mask": d.normal(4, 8, dtype=torch.float32)},
            TypeError,
            "softmax: `mask` must have dtype torch.bool; got torch.float32.",
        ),
        BadCall(
            "mask shape",
            lambda d: {"x": d.normal(4, 8), "mask": d.integers(2, 3, 8) == 1},
            ValueError,
            "softmax: `mask` must have a shape that broadcasts to (4, 8), the shape of `x`; got "
            "(3, 8).",
        ),
        BadCall(
            "mask dimensions",
            lambda d: {"x": d.normal(4, 8), "mask": d.integers(2, 1, 4, 8) == 1},
            ValueError,
            "softmax: `mask` must have a shape that broadcasts to (4, 8)",
        ),
        BadCall(
            "mask device",
            lambda d: {
                "x": d.normal(4, 8),
                "mask": torch.ones(8, dtype=torch.bool, device="meta"),
            },
            ValueError,
            "softmax: `mask` must be on the device of `x`",
        ),
        BadCall(
            "scale none",
            lambda d: {"x": d.normal(4, 8), "scale": None},
            TypeError,
            "softmax: `scale` must be a number; got NoneType.",
        ),
    ),
    kernels=kernels,
    benchmarks=(
        *(
            benchmark(*s)
            for s in (
                (32768, 1024),
                (32768, 4096),
                (32768, 8192),
                (16384, 32768),
                (8192, 65536),
                (4096, 131072),
                (32768, 256),
            )
        ),
        attention_benchmark(1, 32, 2048),
    ),
    launches=(
        Launch(room, "_softmax_fwd_config", "fwd", candidates),
        Launch(room, "_softmax_bwd_config", "bwd", candidates),
    ),
    huge=huge(),
)
