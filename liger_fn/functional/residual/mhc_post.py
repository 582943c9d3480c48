"""Manifold-constrained hyper-connections, second half: a layer's output goes back to H streams.

    out_o   = Σ_i res[o, i] · x_i + post_o · y

    dx_i    = Σ_o res[o, i] · dout_o              dres[o, i] = dout_o · x_i
    dy      = Σ_o post_o · dout_o                 dpost_o    = dout_o · y

Memory traffic in bytes per element of a 2-byte x: 4 forward, and 2 / H to read y; 6 backward, and
4 / H to read y and write dy. Inputs are kept, nothing else. Backward a program walks along one
token with its share of all H² + H dot products in registers; where these are too many, several
programs have some rows of res each, and read the token out of the cache.
"""

from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.direct import launch
from liger_fn.functional.core.launch import (
    accumulator,
    as_rows,
    cdiv,
    dense_like,
    has_work,
    next_power_of_2,
    tl,
    triton,
    triton_dtype,
    unit_stride,
)
from liger_fn.functional.residual.mhc_pre import check_streams


def reference(x: Tensor, y: Tensor, post: Tensor, res: Tensor) -> Tensor:
    compute = accumulator(x.dtype)
    streams, y, post, res = (t.to(compute) for t in (x, y, post, res))
    out = post[..., None] * y[..., None, :]
    for i in range(x.shape[-2]):
        out = out + res[..., :, i, None] * streams[..., i, None, :]
    return out.to(x.dtype)


@triton.jit
def _no_terms():
    """An empty tuple, to which terms are added; to type checkers it says nothing of its length."""
    return ()


@triton.jit
def _load_streams(ptr, d, D, H: tl.constexpr, COMPUTE: tl.constexpr):
    """Load some columns of each stream of a token."""
    streams = _no_terms()
    for h in tl.static_range(H):
        streams += (tl.load(ptr + h * D + d, mask=d < D, other=0.0).to(COMPUTE),)
    return streams


@triton.jit
def _load_numbers(ptr, stride, count, SIZE: tl.constexpr, COMPUTE: tl.constexpr):
    """Load SIZE numbers, those from `count` on as zeros."""
    numbers = _no_terms()
    for i in tl.static_range(SIZE):
        numbers += (tl.load(ptr + i * stride, mask=i < count, other=0.0).to(COMPUTE),)
    return numbers


@triton.jit
def _dot(numbers, streams, total, H: tl.constexpr):
    """total + Σ_h numbers_h · streams_h."""
    for h in tl.static_range(H):
        total += numbers[h] * streams[h]
    return total


@triton.jit
def _mhc_post_fwd_kernel(
    x_ptr, y_ptr, post_ptr, res_ptr, out_ptr,
    x_stride_n, y_stride_n, res_stride_n, res_stride_o, res_stride_i, D,
    H: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    res_ptr += n * res_stride_n
    x = _load_streams(x_ptr + n * x_stride_n, d, D, H, COMPUTE)
    y = tl.load(y_ptr + n * y_stride_n + d, mask=d < D, other=0.0).to(COMPUTE)

    for o in tl.static_range(H):
        post = tl.load(post_ptr + n * H + o).to(COMPUTE)
        res = _load_numbers(res_ptr + o * res_stride_o, res_stride_i, H, H, COMPUTE)
        out = _dot(res, x, post * y, H)
        tl.store(out_ptr + (n * H + o) * D + d, out, mask=d < D)


@triton.jit
def _mhc_post_bwd_kernel(
    x_ptr, y_ptr, post_ptr, res_ptr, dout_ptr, dx_ptr, dy_ptr, dpost_ptr, dres_ptr,
    x_stride_n, y_stride_n, res_stride_n, res_stride_o, res_stride_i, dout_stride_n, D,
    H: tl.constexpr, ROWS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS
    x_ptr += n * x_stride_n
    dout_ptr += n * dout_stride_n
    res_ptr += n * res_stride_n
    post = _load_numbers(post_ptr + n * H, 1, H, H, COMPUTE)
    # What no pointer asks for, the compiler leaves out.
    res, dpost, dres = _no_terms(), _no_terms(), _no_terms()
    for k in tl.static_range(ROWS):
        there = tl.where(first + k < H, H, 0)
        res += (
            _load_numbers(res_ptr + (first + k) * res_stride_i, res_stride_o, there, H, COMPUTE),
        )
        dpost += (tl.zeros((BLOCK_D,), COMPUTE),)
    for _ in tl.static_range(ROWS * H):
        dres += (tl.zeros((BLOCK_D,), COMPUTE),)

    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        dout = _load_streams(dout_ptr, d, D, H, COMPUTE)
        x = _load_streams(x_ptr, d, D, H, COMPUTE)
        y = tl.load(y_ptr + n * y_stride_n + d, mask=d < D, other=0.0).to(COMPUTE)
        none = tl.zeros((BLOCK_D,), COMPUTE)
        if dy_ptr is not None:
            in_d = d < tl.where(first == 0, D, 0)
            tl.store(dy_ptr + n * D + d, _dot(post, dout, none, H), mask=in_d)
        dpost_next, dres_next = _no_terms(), _no_terms()
        for k in tl.static_range(ROWS):
            in_d = d < tl.where(first + k < H, D, 0)
            if ROWS == H:
                own = dout[k]
            else:
                own = tl.load(dout_ptr + (first + k) * D + d, mask=in_d, other=0.0).to(COMPUTE)
            if dx_ptr is not None:
                dx = _dot(res[k], dout, none, H)
                tl.store(dx_ptr + (n * H + first + k) * D + d, dx, mask=in_d)
            dpost_next += (dpost[k] + own * y,)
            for i in tl.static_range(H):
                dres_next += (dres[k * H + i] + own * x[i],)
        dpost, dres = dpost_next, dres_next

    for k in tl.static_range(ROWS):
        o, there = n * H + first + k, first + k < H
        if dpost_ptr is not None:
            tl.store(dpost_ptr + o, tl.sum(dpost[k], axis=0), mask=there)
        if dres_ptr is not None:
            for i in tl.static_range(H):
                tl.store(dres_ptr + o * H + i, tl.sum(dres[k * H + i], axis=0), mask=there)


def _fwd_config(D: int, H: int) -> dict:
    """Eight columns of every stream a thread, a 16-byte load of each."""
    block_d = min(1024 if H <= 8 else 256, next_power_of_2(D))
    return {"BLOCK_D": block_d, "num_warps": max(1, block_d // 256)}


def _bwd_config(D: int, H: int) -> dict:
    """A warp a token, whose dot products need no barrier to be added up: four columns a thread
    while all H² + H of them have room beside these, else two, and rows of res for about 24.
    """
    whole = H * (H + 1) <= 24
    rows = H if whole else max(1, 24 // (H + 1))
    block_d = min(128 if whole else 64, next_power_of_2(D))
    return {"ROWS": rows, "BLOCK_D": block_d, "num_warps": 1}


def mhc_post_fwd(x: Tensor, y: Tensor, post: Tensor, res: Tensor) -> tuple[Tensor]:
    out = dense_like(x)
    if has_work(out):
        (H, D), options = x.shape[-2:], {"COMPUTE": triton_dtype(accumulator(x.dtype))}
        x, y = as_rows(x.flatten(-2)), as_rows(y)
        post, res = unit_stride(post), res.reshape(-1, H, H)
        config = _fwd_config(D, H)
        launch(
            _mhc_post_fwd_kernel, (len(x), cdiv(D, config["BLOCK_D"])),
            x, y, post, res, out, x.stride(0), y.stride(0), *res.stride(), D,
            H=H, **options, **config,
        )  # fmt: skip
    return (out,)


def mhc_post_bwd(
    x: Tensor,
    y: Tensor,
    post: Tensor,
    res: Tensor,
    dout: Tensor,
    need_dx: bool,
    need_dy: bool,
    need_dpost: bool,
    need_dres: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    given = (x, need_dx), (y, need_dy), (post, need_dpost), (res, need_dres)
    dx, dy, dpost, dres = (dense_like(t) if need else None for t, need in given)
    if has_work(dout):
        (H, D), options = x.shape[-2:], {"COMPUTE": triton_dtype(accumulator(x.dtype))}
        x, y, dout = as_rows(x.flatten(-2)), as_rows(y), as_rows(dout.flatten(-2))
        post, res = unit_stride(post), res.reshape(-1, H, H)
        config = _bwd_config(D, H)
        launch(
            _mhc_post_bwd_kernel, (len(x), cdiv(H, config["ROWS"])),
            x, y, post, res, dout, dx, dy, dpost, dres,
            x.stride(0), y.stride(0), *res.stride(), dout.stride(0), D, H=H, **options, **config,
        )  # fmt: skip
    return dx, dy, dpost, dres


_mhc_post = custom_vjp(
    "mhc_post",
    reference=reference,
    fwd=mhc_post_fwd,
    bwd=mhc_post_bwd,
    results="out",
    grads="x y post res",
    rows="x y post res out",
    core_dims=2,
)


def mhc_post(x: Tensor, y: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """Mix residual streams, and add a layer's output to each (mHC).

        out_o = Σ_i res[o, i] · x_i + post_o · y

    Args:
        x: (..., H, D), floating point, any strides: H streams, 16 at most.
        y: (..., D), floating point, may be of another dtype than x: the layer's output.
        post: (..., H), floating point: how much of y goes to each stream.
        res: (..., H, H), floating point, any strides: row o says what goes to stream o.
            DeepSeek-V4 and GLM have it the other way: give `res.transpose(-1, -2)`.

    Returns:
        (..., H, D), dtype of x, contiguous.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: a shape or device does not fit.
        NotImplementedError: more than 16 streams.

    Precision: computed in float32 (float64 for float64 x); every output is rounded once.
    Memory: x, y, post and res live until the backward pass.
    Source: Xie et al., "mHC: Manifold-Constrained Hyper-Connections", 2025; arXiv:2512.24880.
    """
    op = "mhc_post"
    check_streams(op, x)
    *tokens, H, D = x.shape
    shapes = {"y": (*tokens, D), "post": (*tokens, H), "res": (*tokens, H, H)}
    for name, t in {"y": y, "post": post, "res": res}.items():
        check.floating(op, name, t)
        check.shape(op, name, t, shapes[name], "with the sizes of `x`")
        check.device(op, name, t, x, "x")
    return _mhc_post(x, y, post, res)
