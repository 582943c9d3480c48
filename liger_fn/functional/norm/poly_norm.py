"""PolyNorm: a polynomial activation whose powers are normalised.

    y = w₀ · norm(x³) + w₁ · norm(x²) + w₂ · norm(x) + b
    norm(u) = u · r                        r = 1 / √(mean(u²) + ε)

    dx   = Σ_k w · k · x^(k−1) · r · (dy − x^k · r² · mean(dy · x^k))            k = 3, 2, 1
    dw   = Σ dy · x^k · r                  db = Σ dy

Memory traffic in bytes per element of a 2-byte x: 4 forward (read x, write y), 6 backward (read x
and dy, write dx); the three r, 12 bytes a row, are kept. A row is read once and stays in registers.
Backward each program walks a strip of rows with its share of the four sums in registers while the
next rows are on their way; a small launch adds the shares in a fixed order. Programs go over the
columns of wider rows twice, the second time out of the cache.
"""

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.direct import launch
from liger_fn.functional.core.kernels import no_blocks, times
from liger_fn.functional.core.launch import (
    accumulator,
    as_rows,
    cdiv,
    dense_like,
    has_work,
    sm_count,
    tl,
    triton,
    triton_dtype,
    unit_stride,
)
from liger_fn.functional.norm.blocks import load_block, store_block
from liger_fn.functional.norm.rows import (
    cover,
    load_rows,
    row_sums,
    rows_config,
    strips_of,
    sums_of_parts,
)


def reference(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    compute = accumulator(x.dtype)
    h, w = x.to(compute), weight.to(compute)
    powers = (h * h * h, h * h, h)
    normed = (u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps) for u in powers)
    y = sum(w[i] * u for i, u in enumerate(normed))
    return (y + bias.to(compute)).to(x.dtype)


@triton.jit
def _powers(x, PIECES: tl.constexpr):
    """Give the squares and the cubes of some blocks."""
    squares, cubes = no_blocks(), no_blocks()
    for i in tl.static_range(PIECES):
        square = x[i] * x[i]
        squares += (square,)
        cubes += (square * x[i],)
    return squares, cubes


@triton.jit
def _products(a, b, PIECES: tl.constexpr):
    """Give a · b, added up over the blocks, and over neighbours that one thread holds."""
    products = times(a[0], b[0])
    for i in tl.static_range(1, PIECES):
        products += a[i] * b[i]
    BLOCK_N: tl.constexpr = products.shape[0]
    BLOCK_D: tl.constexpr = products.shape[1]
    HELD: tl.constexpr = 8 if BLOCK_D > 8 else BLOCK_D
    return tl.sum(tl.reshape(products, (BLOCK_N, BLOCK_D // HELD, HELD)), axis=2)


@triton.jit
def _three_row_sums(a, b, c):
    """Give the sums of the rows of each: one exchange between the warps, and not three in turn."""
    sums = tl.sum(tl.join(tl.join(a, b), tl.join(c, c)), axis=1)
    ab, cc = tl.split(sums)
    a, b = tl.split(ab)
    c, _ = tl.split(cc)
    return a, b, c


@triton.jit(do_not_specialize=["N"])
def _poly_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, rstd_ptr, x_stride_n, N, D,
    EPS: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = row < N
    x = load_rows(x_ptr, x_stride_n, row, in_n, D, COMPUTE, BLOCK_D, PIECES)
    w3 = tl.load(weight_ptr).to(COMPUTE)
    w2 = tl.load(weight_ptr + 1).to(COMPUTE)
    w1 = tl.load(weight_ptr + 2).to(COMPUTE)
    bias = tl.load(bias_ptr).to(COMPUTE)

    squares, cubes = _powers(x, PIECES)
    # Narrow rows are many a thread, and a division takes as long as several columns.
    over_d = tl.full((), 1.0, COMPUTE) / D
    sum6, sum4, sum2 = _three_row_sums(
        _products(cubes, cubes, PIECES),
        _products(squares, squares, PIECES),
        _products(x, x, PIECES),
    )
    rstd3 = tl.math.rsqrt(sum6 * over_d + EPS)
    rstd2 = tl.math.rsqrt(sum4 * over_d + EPS)
    rstd1 = tl.math.rsqrt(sum2 * over_d + EPS)
    tl.store(rstd_ptr + 3 * row, rstd3, mask=in_n)
    tl.store(rstd_ptr + 3 * row + 1, rstd2, mask=in_n)
    tl.store(rstd_ptr + 3 * row + 2, rstd1, mask=in_n)

    c3, c2, c1 = (w3 * rstd3)[:, None], (w2 * rstd2)[:, None], (w1 * rstd1)[:, None]
    for i in tl.static_range(PIECES):
        y = ((c3 * x[i] + c2) * x[i] + c1) * x[i] + bias
        store_block(y_ptr, row, D, in_n, i * BLOCK_D, D, y, BLOCK_D)


@triton.jit(do_not_specialize=["N"])
def _poly_norm_fwd_wide_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, rstd_ptr, x_stride_n, N, D,
    EPS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = row < N
    w3 = tl.load(weight_ptr).to(COMPUTE)
    w2 = tl.load(weight_ptr + 1).to(COMPUTE)
    w1 = tl.load(weight_ptr + 2).to(COMPUTE)
    bias = tl.load(bias_ptr).to(COMPUTE)

    sums6 = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    sums4 = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    sums2 = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    for start in range(0, D, BLOCK_D):
        x = load_block(x_ptr, row, x_stride_n, in_n, start, D, COMPUTE, BLOCK_D)
        square = x * x
        sums2 += square
        sums4 += square * square
        sums6 += square * square * square
    rstd3 = 1.0 / tl.sqrt(tl.sum(sums6, axis=1) / D + EPS)
    rstd2 = 1.0 / tl.sqrt(tl.sum(sums4, axis=1) / D + EPS)
    rstd1 = 1.0 / tl.sqrt(tl.sum(sums2, axis=1) / D + EPS)
    tl.store(rstd_ptr + 3 * row, rstd3, mask=in_n)
    tl.store(rstd_ptr + 3 * row + 1, rstd2, mask=in_n)
    tl.store(rstd_ptr + 3 * row + 2, rstd1, mask=in_n)

    c3, c2, c1 = (w3 * rstd3)[:, None], (w2 * rstd2)[:, None], (w1 * rstd1)[:, None]
    for start in range(0, D, BLOCK_D):
        x = load_block(x_ptr, row, x_stride_n, in_n, start, D, COMPUTE, BLOCK_D)
        y = ((c3 * x + c2) * x + c1) * x + bias
        store_block(y_ptr, row, D, in_n, start, D, y, BLOCK_D)


@triton.jit(do_not_specialize=["N", "strip"])
def _poly_norm_bwd_kernel(
    x_ptr, weight_ptr, rstd_ptr, dy_ptr, dx_ptr, dweight_part_ptr, dbias_part_ptr,
    x_stride_n, dy_stride_n, N, D, strip,
    COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    w3 = tl.load(weight_ptr).to(COMPUTE)
    w2 = tl.load(weight_ptr + 1).to(COMPUTE)
    w1 = tl.load(weight_ptr + 2).to(COMPUTE)
    dw3, dw2 = tl.zeros((BLOCK_N,), COMPUTE), tl.zeros((BLOCK_N,), COMPUTE)
    dw1 = tl.zeros((BLOCK_N,), COMPUTE)
    # Nothing waits for this sum: it is added up by columns, and over them once, at the end.
    db = no_blocks()
    for _ in tl.static_range(PIECES):
        db += (tl.zeros((BLOCK_N, BLOCK_D), COMPUTE),)

    for step in tl.range(0, strip, BLOCK_N, num_stages=STAGES):
        at = step + tl.arange(0, BLOCK_N)
        row = program * strip + at
        in_n = (row < N) & (at < strip)
        x = load_rows(x_ptr, x_stride_n, row, in_n, D, COMPUTE, BLOCK_D, PIECES)
        dy = load_rows(dy_ptr, dy_stride_n, row, in_n, D, COMPUTE, BLOCK_D, PIECES)
        rstd3 = tl.load(rstd_ptr + 3 * row, mask=in_n, other=0.0)
        rstd2 = tl.load(rstd_ptr + 3 * row + 1, mask=in_n, other=0.0)
        rstd1 = tl.load(rstd_ptr + 3 * row + 2, mask=in_n, other=0.0)

        squares, cubes = _powers(x, PIECES)
        dot3, dot2, dot1 = _three_row_sums(
            _products(dy, cubes, PIECES),
            _products(dy, squares, PIECES),
            _products(dy, x, PIECES),
        )
        dot3, dot2, dot1 = dot3 * rstd3, dot2 * rstd2, dot1 * rstd1
        dw3 += dot3
        dw2 += dot2
        dw1 += dot1
        db_next = no_blocks()
        for i in tl.static_range(PIECES):
            db_next += (db[i] + dy[i],)
        db = db_next

        if dx_ptr is not None:
            c3, c2, c1 = 3.0 * w3 * rstd3, 2.0 * w2 * rstd2, w1 * rstd1
            e3, e2, e1 = dot3 * rstd3 / D * c3, dot2 * rstd2 / D * c2, dot1 * rstd1 / D * c1
            c3, c2, c1 = c3[:, None], c2[:, None], c1[:, None]
            e3, e2, e1 = e3[:, None], e2[:, None], e1[:, None]
            for i in tl.static_range(PIECES):
                # The terms in dy, then those in the powers of x, which are all odd.
                square = x[i] * x[i]
                slope = (c3 * x[i] + c2) * x[i] + c1
                along = (e3 * square + e2) * square + e1
                dx = dy[i] * slope - x[i] * along
                store_block(dx_ptr, row, D, in_n, i * BLOCK_D, D, dx, BLOCK_D)

    if dweight_part_ptr is not None:
        tl.store(dweight_part_ptr + 3 * program, tl.sum(dw3, axis=0))
        tl.store(dweight_part_ptr + 3 * program + 1, tl.sum(dw2, axis=0))
        tl.store(dweight_part_ptr + 3 * program + 2, tl.sum(dw1, axis=0))
    if dbias_part_ptr is not None:
        tl.store(dbias_part_ptr + program, tl.sum(row_sums(db, PIECES), axis=0))


@triton.jit(do_not_specialize=["N", "strip"])
def _poly_norm_bwd_wide_kernel(
    x_ptr, weight_ptr, rstd_ptr, dy_ptr, dx_ptr, dweight_part_ptr, dbias_part_ptr,
    x_stride_n, dy_stride_n, N, D, strip,
    COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    w3 = tl.load(weight_ptr).to(COMPUTE)
    w2 = tl.load(weight_ptr + 1).to(COMPUTE)
    w1 = tl.load(weight_ptr + 2).to(COMPUTE)
    dw3, dw2 = tl.zeros((BLOCK_N,), COMPUTE), tl.zeros((BLOCK_N,), COMPUTE)
    dw1, db = tl.zeros((BLOCK_N,), COMPUTE), tl.zeros((BLOCK_N,), COMPUTE)

    for step in range(0, strip, BLOCK_N):
        at = step + tl.arange(0, BLOCK_N)
        row = program * strip + at
        in_n = (row < N) & (at < strip)
        rstd3 = tl.load(rstd_ptr + 3 * row, mask=in_n, other=0.0)
        rstd2 = tl.load(rstd_ptr + 3 * row + 1, mask=in_n, other=0.0)
        rstd1 = tl.load(rstd_ptr + 3 * row + 2, mask=in_n, other=0.0)

        dots3 = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
        dots2 = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
        dots1 = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
        sums = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
        for start in range(0, D, BLOCK_D):
            x = load_block(x_ptr, row, x_stride_n, in_n, start, D, COMPUTE, BLOCK_D)
            dy = load_block(dy_ptr, row, dy_stride_n, in_n, start, D, COMPUTE, BLOCK_D)
            product = dy * x
            sums += dy
            dots1 += product
            dots2 += product * x
            dots3 += product * x * x
        dot3, dot2 = tl.sum(dots3, axis=1) * rstd3, tl.sum(dots2, axis=1) * rstd2
        dot1 = tl.sum(dots1, axis=1) * rstd1
        dw3 += dot3
        dw2 += dot2
        dw1 += dot1
        db += tl.sum(sums, axis=1)

        if dx_ptr is not None:
            c3, c2, c1 = (
                (3.0 * w3 * rstd3)[:, None],
                (2.0 * w2 * rstd2)[:, None],
                (w1 * rstd1)[:, None],
            )
            along3, along2 = (dot3 * rstd3 / D)[:, None], (dot2 * rstd2 / D)[:, None]
            along1 = (dot1 * rstd1 / D)[:, None]
            for start in range(0, D, BLOCK_D):
                x = load_block(x_ptr, row, x_stride_n, in_n, start, D, COMPUTE, BLOCK_D)
                dy = load_block(dy_ptr, row, dy_stride_n, in_n, start, D, COMPUTE, BLOCK_D)
                square = x * x
                dx = c3 * square * (dy - square * x * along3)
                dx += c2 * x * (dy - square * along2)
                dx += c1 * (dy - x * along1)
                store_block(dx_ptr, row, D, in_n, start, D, dx, BLOCK_D)

    if dweight_part_ptr is not None:
        tl.store(dweight_part_ptr + 3 * program, tl.sum(dw3, axis=0))
        tl.store(dweight_part_ptr + 3 * program + 1, tl.sum(dw2, axis=0))
        tl.store(dweight_part_ptr + 3 * program + 2, tl.sum(dw1, axis=0))
    if dbias_part_ptr is not None:
        tl.store(dbias_part_ptr + program, tl.sum(db, axis=0))


def _poly_norm_fwd_config(D: int, itemsize: int) -> dict:
    """One row is live, and is held up to 32 KiB."""
    return rows_config(D, itemsize, widest=32768)


def _poly_norm_bwd_config(D: int, itemsize: int) -> dict:
    """16 numbers a thread: x, its square and dy are live at once, four bytes each.

    Sixteen warps have registers for that. While they add up their rows, the next rows of x and dy
    are on their way, two steps ahead where these take two bytes an element.
    """
    widest = min(8192, 32768 // itemsize)
    if widest < D:
        # One row, so that the second reading finds it in the cache.
        return {"BLOCK_N": 1, "BLOCK_D": 4096, "num_warps": 8, "per_sm": 2}
    block_d, pieces = cover(D)
    width = block_d * pieces
    return {
        "BLOCK_N": min(32, 1 << max(0, (4096 // width).bit_length() - 1)),
        "BLOCK_D": block_d,
        "PIECES": pieces,
        "STAGES": 3 if itemsize == 2 else 2,
        "num_warps": 8 if width <= 4096 else 16,
        "per_sm": 2 if width <= 4096 else 1,
    }


def poly_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = dense_like(x)
    rstd = x.new_empty((*x.shape[:-1], 3), dtype=accumulator(x.dtype))

    if has_work(y):
        x, weight = as_rows(x), unit_stride(weight)
        N, D = x.shape
        config = _poly_norm_fwd_config(D, x.element_size())
        launch(
            _poly_norm_fwd_kernel if "PIECES" in config else _poly_norm_fwd_wide_kernel,
            (cdiv(N, config["BLOCK_N"]),),
            x, weight, bias, y, rstd, x.stride(0), N, D,
            EPS=eps, COMPUTE=triton_dtype(rstd.dtype), **config,
        )  # fmt: skip
    return y, rstd


def poly_norm_bwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    rstd: Tensor,
    dy: Tensor,
    eps: float,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dx = dense_like(x) if need_dx else None
    like = [weight if need_dweight else None, bias if need_dbias else None]
    if not has_work(x):
        dweight, dbias = (None if t is None else dense_like(t).zero_() for t in like)
        return dx, dweight, dbias

    x, dy = as_rows(x), as_rows(dy)
    N, D = x.shape
    config = _poly_norm_bwd_config(D, x.element_size())
    per_sm = config.pop("per_sm")
    programs, strip = strips_of(N, config["BLOCK_N"], per_sm * sm_count(x.device))
    parts = [
        None if t is None else x.new_empty((programs, width), dtype=rstd.dtype)
        for t, width in zip(like, (3, 1), strict=True)
    ]
    launch(
        _poly_norm_bwd_kernel if "PIECES" in config else _poly_norm_bwd_wide_kernel,
        (programs,),
        x, unit_stride(weight), unit_stride(rstd), dy, dx, *parts,
        x.stride(0), dy.stride(0), N, D, strip, COMPUTE=triton_dtype(rstd.dtype), **config,
    )  # fmt: skip
    (dweight,), (dbias,) = (sums_of_parts(parts[i : i + 1], like[i : i + 1]) for i in range(2))
    return dx, dweight, dbias


_poly_norm = custom_vjp(
    "poly_norm",
    reference=reference,
    fwd=poly_norm_fwd,
    bwd=poly_norm_bwd,
    results="y",
    residuals="rstd",
    grads="x weight bias",
    rows="x y rstd",
)


def poly_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Activate by a polynomial of degree three whose powers are normalised over the last dimension.

        y = w₀ · norm(x³) + w₁ · norm(x²) + w₂ · norm(x) + bias

    with norm(u) = u / √(mean(u²) + eps).

    Args:
        x: (..., D), floating point, any strides.
        weight: (3,), floating point, may be of another dtype than x: of the cube, the square and x.
        bias: one element, () or (1,), floating point.
        eps: added to each mean square.

    Returns:
        (..., D), dtype of x, contiguous.

    Raises:
        TypeError: an argument is not a floating-point tensor, or eps is no number.
        ValueError: weight or bias has another shape, or lies on another device.

    Precision: computed in float32 (float64 for float64 x), as are the sums dweight and dbias; every
        output is rounded once. In float32 x⁶ must be finite: |x| up to 10⁶.
    Memory: x, weight, bias and 12 bytes a row live until the backward pass.
    Source: Zhuo et al., "Polynomial Composition Activations: Unleashing the Dynamics of Large
        Language Models", 2025.
    """
    op = "poly_norm"
    check.floating(op, "x", x)
    check.at_least_1d(op, "x", x)
    check.floating(op, "weight", weight)
    check.shape(op, "weight", weight, (3,), "one weight per power")
    check.device(op, "weight", weight, x, "x")
    check.floating(op, "bias", bias)
    if bias.numel() != 1 or bias.dim() > 1:
        check.fail(op, "bias", "have shape () or (1,)", check.spell(bias.shape))
    check.device(op, "bias", bias, x, "x")
    check.number(op, "eps", eps, "be a number", True)
    return _poly_norm(x, weight, bias, eps)
