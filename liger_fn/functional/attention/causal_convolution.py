"""A convolution of causal maps (B, H, T, T), all zero where the key's index is above the query's.

    y_oij = bias_o + Σ_hqk weight_ohqk · x_h,i′j′ where j ≤ i, and 0 elsewhere
    i′ = i + q · dilation − padding, and j′ so from j and k

    dx_hij = Σ_oqk weight_ohqk · dy_o,i″j″        i″ = i − q · dilation + padding, and j″ so
    dweight_ohqk = Σ_ij dy_oij · x_h,i′j′         dbias_o = Σ_ij dy_oij

dy counts where j ≤ i, and dx, which past the diagonal nobody reads, is not written there. A map is
the sum over the few heads of its group: matrix units, which mix many, would have little to do.

A thread has ROWS x COLS neighbours of y in registers. It reads each x that they need once, out of
the first-level cache, as vectors of COLS, and multiplies it by all taps that they need it for: an
instruction for a tap and a y, and few others. dx is such a convolution of dy, by the window
reversed. For dweight a thread has ROWS x COLS neighbours of dy in registers, and a sum for each tap
over all tiles of its program; the programs' sums are then added in a fixed order.

Memory traffic in bytes per element of 2-byte maps, where the caches hold what taps and heads share:
3 for y (read half of x, write y), 2 for dx (read half of dy, write half of dx), 2 for dweight and
dbias (read half of dy and of x).
"""

from torch import Tensor

from liger_fn.functional.core.direct import launch
from liger_fn.functional.core.kernels import no_blocks
from liger_fn.functional.core.launch import (
    accumulator,
    cdiv,
    dense_like,
    has_work,
    next_power_of_2,
    sm_count,
    tl,
    triton,
    triton_dtype,
    unit_stride,
)
from liger_fn.functional.norm.rows import strips_of, sums_of_parts

Pair = tuple[int, int]


@triton.jit
def _load_weight(weight_ptr, TAPS: tl.constexpr, STEP: tl.constexpr, COMPUTE: tl.constexpr):
    """Load so many taps, forwards or backwards."""
    weight = no_blocks()
    for tap in tl.static_range(TAPS):
        weight += (tl.load(weight_ptr + tap * STEP).to(COMPUTE),)
    return weight


@triton.jit
def _neighbours(
    first_i, first_j,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Give the first row of each thread, and all its columns; the first of these if not ALIGNED."""
    row = first_i + tl.arange(0, BLOCK_I)[:, None] * ROWS
    col = first_j + tl.arange(0, BLOCK_J)[None, :] * COLS
    if ALIGNED:
        row, col = row[:, :, None], col[:, :, None] + tl.arange(0, COLS)[None, None, :]
    return row, col


@triton.jit
def _columns(
    col, T,
    WINDOW: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, COLS: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Give the columns that the taps of a row need, and which are inside: vectors, or one by one.

    Where rows are not ALIGNED, to vectors, the compiler would load these by way of shared memory.
    """
    LEAD: tl.constexpr = -PADDING % COLS if ALIGNED and DILATION <= COLS else 0
    # Neighbours share columns if the taps are near enough.
    SHARED: tl.constexpr = DILATION if DILATION < COLS else COLS
    SIZE: tl.constexpr = COLS if ALIGNED else 1
    at, inside = no_blocks(), no_blocks()
    for n in tl.static_range(0, LEAD + COLS + (WINDOW - 1) * SHARED, SIZE):
        column = col + (n // SHARED * DILATION + n % SHARED - PADDING - LEAD)
        at += (column,)
        inside += ((column >= 0) & (column < T),)
    return at, inside


@triton.jit
def _load_row(
    x_ptr, row, at, inside, T,
    COLS: tl.constexpr, CUT: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Load these columns of a row, one by one; where it is to be CUT, 0 past the diagonal."""
    x_ptr += row.to(tl.int64) * T
    in_t = (row >= 0) & (row < T)
    x = no_blocks()
    for n in tl.static_range(len(at)):
        block = tl.load(x_ptr + at[n], mask=in_t & inside[n], other=0.0).to(COMPUTE)
        if CUT:
            block = tl.where(at[n] <= row, block, 0.0)
        if ALIGNED:
            x += _parted(block, COLS)
        else:
            x += (block,)
    return x


@triton.jit
def _parted(x, SIZE: tl.constexpr):
    """Part x along its last dimension, of SIZE, a power of two above one."""
    if SIZE == 2:
        parts = tl.split(x)
    else:
        HALF: tl.constexpr = SIZE // 2
        even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], HALF, 2)))
        evens, odds = _parted(even, HALF), _parted(odd, HALF)
        parts = no_blocks()
        for i in tl.static_range(HALF):
            parts += (evens[i], odds[i])
    return parts


@triton.jit
def _joined(x, SIZE: tl.constexpr):
    """Join SIZE tensors, a power of two, along new last dimensions of two."""
    if SIZE > 1:
        HALF: tl.constexpr = SIZE // 2
        pairs = no_blocks()
        for i in tl.static_range(HALF):
            pairs += (tl.join(x[i], x[i + HALF]),)
        joined = _joined(pairs, HALF)
    else:
        joined = x[0]
    return joined


@triton.jit
def _conv_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, T, T_OUT, H_OUT,
    IN: tl.constexpr, OUT: tl.constexpr, WINDOW_Q: tl.constexpr, WINDOW_K: tl.constexpr,
    PADDING_Q: tl.constexpr, PADDING_K: tl.constexpr,
    DILATION_Q: tl.constexpr, DILATION_K: tl.constexpr,
    REVERSED: tl.constexpr, COMPUTE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TAPS_Q: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    HEIGHT: tl.constexpr = ROWS * BLOCK_I
    WIDTH: tl.constexpr = COLS * BLOCK_J
    TAPS: tl.constexpr = TAPS_Q * WINDOW_K
    STEP: tl.constexpr = -1 if REVERSED else 1
    SHARED_Q: tl.constexpr = DILATION_Q if DILATION_Q < ROWS else ROWS
    SHARED_K: tl.constexpr = DILATION_K if DILATION_K < COLS else COLS
    LEAD_K: tl.constexpr = -PADDING_K % COLS if ALIGNED and DILATION_K <= COLS else 0
    program = tl.program_id(0)
    first_j = program % tl.cdiv(T_OUT, WIDTH) * WIDTH
    program //= tl.cdiv(T_OUT, WIDTH)
    first_i = program % tl.cdiv(T_OUT, HEIGHT) * HEIGHT
    image = program // tl.cdiv(T_OUT, HEIGHT)
    head = image % H_OUT
    rows, cols = _neighbours(first_i, first_j, ROWS, COLS, BLOCK_I, BLOCK_J, True)
    y_ptr += image.to(tl.int64) * T_OUT * T_OUT + rows.to(tl.int64) * T_OUT

    if first_j < first_i + HEIGHT:
        first_h = image // OUT * IN
        if REVERSED:
            weight_ptr += (head // OUT * IN * OUT + head % OUT) * WINDOW_Q * WINDOW_K
            weight_ptr += WINDOW_Q * WINDOW_K - 1
        else:
            weight_ptr += head * IN * WINDOW_Q * WINDOW_K
        start = tl.zeros((BLOCK_I, BLOCK_J), COMPUTE)
        if bias_ptr is not None:
            start += tl.load(bias_ptr + head).to(COMPUTE)
        acc = no_blocks()
        for _ in tl.static_range(ROWS * COLS):
            acc += (start,)

        row, col = _neighbours(first_i, first_j, ROWS, COLS, BLOCK_I, BLOCK_J, ALIGNED)
        at, inside = _columns(col, T, WINDOW_K, PADDING_K, DILATION_K, COLS, ALIGNED)
        for step in range(IN * (WINDOW_Q // TAPS_Q)):
            h, first_q = step // (WINDOW_Q // TAPS_Q), step % (WINDOW_Q // TAPS_Q) * TAPS_Q
            of_h = h * OUT * WINDOW_Q if REVERSED else h * WINDOW_Q
            weight = _load_weight(
                weight_ptr + (of_h + STEP * first_q) * WINDOW_K, TAPS, STEP, COMPUTE
            )
            first_x = first_q * DILATION_Q - PADDING_Q
            for s in tl.static_range(ROWS + (TAPS_Q - 1) * SHARED_Q):
                x = _load_row(
                    x_ptr + (first_h + h).to(tl.int64) * T * T,
                    row + (first_x + s // SHARED_Q * DILATION_Q + s % SHARED_Q),
                    at, inside, T, COLS, REVERSED, COMPUTE, ALIGNED,
                )  # fmt: skip
                acc_next = no_blocks()
                for r in tl.static_range(ROWS):
                    for c in tl.static_range(COLS):
                        total = acc[r * COLS + c]
                        if s >= r and (s - r) % SHARED_Q == 0 and (s - r) // SHARED_Q < TAPS_Q:
                            for k in tl.static_range(WINDOW_K):
                                tap = weight[(s - r) // SHARED_Q * WINDOW_K + k]
                                total += tap * x[LEAD_K + c + k * SHARED_K]
                        acc_next += (total,)
                acc = acc_next

        for r in tl.static_range(ROWS):
            y = no_blocks()
            for c in tl.static_range(COLS):
                y += (acc[r * COLS + c],)
            y = tl.reshape(_joined(y, COLS), (BLOCK_I, BLOCK_J, COLS))
            y = tl.where(cols <= rows + r, y, 0.0)
            tl.store(y_ptr + r * T_OUT + cols, y, mask=(rows + r < T_OUT) & (cols < T_OUT))
    elif not REVERSED:
        zeros = tl.zeros((BLOCK_I, BLOCK_J, COLS), COMPUTE)
        for r in tl.static_range(ROWS):
            tl.store(y_ptr + r * T_OUT + cols, zeros, mask=(rows + r < T_OUT) & (cols < T_OUT))


def _conv_config(WINDOW_Q: int, WINDOW_K: int, itemsize: int, aligned: bool) -> dict:
    """A thread has 4 rows of 16 bytes, as much as it loads at once; of float64 2, for registers.

    The taps that it multiplies them by are in registers too, up to 36 of them: whole rows of the
    window, in equal steps. More would leave a multiprocessor too few threads. Rows that are not
    aligned are loaded element by element, which takes registers from the taps.
    """
    most = 36 if aligned else 12
    steps = [n for n in range(1, WINDOW_Q + 1) if WINDOW_Q % n == 0 and n * WINDOW_K <= most]
    tile = {
        2: {"ROWS": 4, "COLS": 8, "BLOCK_I": 16, "BLOCK_J": 8, "num_warps": 4},
        4: {"ROWS": 4, "COLS": 4, "BLOCK_I": 16, "BLOCK_J": 16, "num_warps": 8},
        8: {"ROWS": 2, "COLS": 2, "BLOCK_I": 16, "BLOCK_J": 16, "num_warps": 8},
    }[itemsize]
    return {**tile, "TAPS_Q": max(steps, default=1)}


def _aligned(T: int, T_out: int) -> bool:
    """Say whether every row begins where a vector may; Triton knows of no less than 16 numbers."""
    return T % 16 == T_out % 16 == 0


def causal_conv_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """Give y (B, O, T', T') of x (B, H, T, T), which is 0 above the diagonal; 0 there, too."""
    T_out = x.shape[-1] + 2 * padding[1] - dilation[1] * (weight.shape[-1] - 1)
    y = x.new_empty(x.shape[0], weight.shape[0], T_out, T_out)
    _convolve(x, weight, bias, y, padding, dilation, groups, reverse=False)
    return y


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    padding: Pair,
    dilation: Pair,
    groups: int,
    reverse: bool,
) -> None:
    if has_work(y):
        (H_in, T), (H_out, T_out), (Q, K) = x.shape[1:3], y.shape[1:3], weight.shape[-2:]
        aligned = _aligned(T, T_out)
        config = _conv_config(Q, K, x.element_size(), aligned)
        tiles = cdiv(T_out, config["ROWS"] * config["BLOCK_I"])
        tiles *= cdiv(T_out, config["COLS"] * config["BLOCK_J"])
        launch(
            _conv_kernel, (y.shape[0] * H_out * tiles,),
            unit_stride(x), unit_stride(weight), unit_stride(bias), y, T, T_out, H_out,
            IN=H_in // groups, OUT=H_out // groups, WINDOW_Q=Q, WINDOW_K=K,
            PADDING_Q=padding[0], PADDING_K=padding[1],
            DILATION_Q=dilation[0], DILATION_K=dilation[1],
            REVERSED=reverse, COMPUTE=triton_dtype(accumulator(x.dtype)),
            ALIGNED=aligned, **config,
        )  # fmt: skip


@triton.jit
def _tile_below(tile, T, SIDE: tl.constexpr):
    """Give the image of a tile, and its first row and column, of those not above the diagonal."""
    # The first row of tiles with the last, the second with the last but one: they are as long.
    half = tl.cdiv(tl.cdiv(T, SIDE), 2)
    tiles = 2 * half + 1
    pair, nth = tile % (half * tiles) // tiles, tile % tiles
    lower = nth > pair
    i = tl.where(lower, 2 * half - 1 - pair, pair)
    j = tl.where(lower, nth - pair - 1, nth)
    return tile // (half * tiles), i * SIDE, j * SIDE


@triton.jit(do_not_specialize=["tiles", "strip"])
def _conv_bwd_dweight_kernel(
    x_ptr, dy_ptr, dweight_part_ptr, dbias_part_ptr, T, T_OUT, H_OUT, tiles, strip,
    IN: tl.constexpr, OUT: tl.constexpr, WINDOW_Q: tl.constexpr, WINDOW_K: tl.constexpr,
    PADDING_Q: tl.constexpr, PADDING_K: tl.constexpr,
    DILATION_Q: tl.constexpr, DILATION_K: tl.constexpr, COMPUTE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TAPS_Q: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, TAPS_UP: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = TAPS_Q * WINDOW_K
    SHARED_Q: tl.constexpr = DILATION_Q if DILATION_Q < ROWS else ROWS
    SHARED_K: tl.constexpr = DILATION_K if DILATION_K < COLS else COLS
    LEAD_K: tl.constexpr = -PADDING_K % COLS if ALIGNED and DILATION_K <= COLS else 0
    strips = tl.cdiv(tiles, strip)
    nth, program = tl.program_id(0) % strips, tl.program_id(0) // strips
    first_q = program % (WINDOW_Q // TAPS_Q) * TAPS_Q
    pair = program // (WINDOW_Q // TAPS_Q)
    h, head = pair % IN, pair // IN
    first_x = first_q * DILATION_Q - PADDING_Q
    acc = no_blocks()
    for _ in tl.static_range(TAPS):
        acc += (tl.zeros((BLOCK_I, BLOCK_J), COMPUTE),)
    dbias = tl.zeros((BLOCK_I, BLOCK_J), COMPUTE)

    for tile in range(nth * strip, tl.minimum((nth + 1) * strip, tiles)):
        image, first_i, first_j = _tile_below(tile, T_OUT, ROWS * BLOCK_I)
        row, col = _neighbours(first_i, first_j, ROWS, COLS, BLOCK_I, BLOCK_J, ALIGNED)
        image = image * H_OUT + head
        of_dy = image.to(tl.int64) * T_OUT * T_OUT
        of_x = (image // OUT * IN + h).to(tl.int64) * T * T
        at, inside = _columns(col, T_OUT, 1, 0, 1, COLS, ALIGNED)
        dy = no_blocks()
        for r in tl.static_range(ROWS):
            dy += _load_row(
                dy_ptr + of_dy, row + r, at, inside, T_OUT, COLS, True, COMPUTE, ALIGNED
            )
        if dbias_part_ptr is not None:
            for n in tl.static_range(ROWS * COLS):
                dbias += dy[n]

        at, inside = _columns(col, T, WINDOW_K, PADDING_K, DILATION_K, COLS, ALIGNED)
        for s in tl.static_range(ROWS + (TAPS_Q - 1) * SHARED_Q):
            x = _load_row(
                x_ptr + of_x,
                row + (first_x + s // SHARED_Q * DILATION_Q + s % SHARED_Q),
                at, inside, T, COLS, False, COMPUTE, ALIGNED,
            )  # fmt: skip
            acc_next = no_blocks()
            for q in tl.static_range(TAPS_Q):
                for k in tl.static_range(WINDOW_K):
                    total = acc[q * WINDOW_K + k]
                    if s >= q * SHARED_Q and s - q * SHARED_Q < ROWS:
                        for c in tl.static_range(COLS):
                            at_r = dy[(s - q * SHARED_Q) * COLS + c]
                            total += at_r * x[LEAD_K + c + k * SHARED_K]
                    acc_next += (total,)
            acc = acc_next

    if dweight_part_ptr is not None:
        for _ in tl.static_range(TAPS_UP - TAPS):
            acc += (tl.zeros((BLOCK_I, BLOCK_J), COMPUTE),)
        dweight = tl.sum(tl.reshape(_joined(acc, TAPS_UP), (BLOCK_I * BLOCK_J, TAPS_UP)), axis=0)
        tap = tl.arange(0, TAPS_UP)
        part = (nth.to(tl.int64) * H_OUT * IN + pair) * WINDOW_Q + first_q
        tl.store(dweight_part_ptr + part * WINDOW_K + tap, dweight, mask=tap < TAPS)
    if dbias_part_ptr is not None and h == 0 and first_q == 0:
        tl.store(dbias_part_ptr + nth * H_OUT + head, tl.sum(tl.sum(dbias, axis=1), axis=0))


def _conv_bwd_dweight_config(WINDOW_Q: int, WINDOW_K: int, itemsize: int, aligned: bool) -> dict:
    """As forward: its tiles are square, and a sum is in registers for each tap that was there.

    That leaves registers for `per_sm` programs on a multiprocessor.
    """
    config = _conv_config(WINDOW_Q, WINDOW_K, itemsize, aligned)
    return {**config, "per_sm": 12 // config["num_warps"]}


def causal_conv_bwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dy: Tensor,
    padding: Pair,
    dilation: Pair,
    groups: int,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Give dx, which is not written above the diagonal, dweight and dbias, each if it is needed."""
    dx = dense_like(x) if need_dx else None
    if dx is not None:
        window = zip(weight.shape[-2:], padding, dilation, strict=True)
        past, behind = ((size - 1) * d - p for size, p, d in window)
        _convolve(dy, weight, None, dx, (past, behind), dilation, groups, reverse=True)
    like = [weight if need_dweight else None, bias if need_dbias else None]
    if not has_work(x):
        dweight, dbias = (None if t is None else dense_like(t).zero_() for t in like)
        return dx, dweight, dbias
    if not (need_dweight or need_dbias):
        return dx, None, None

    (H, T), (H_out, T_out), (Q, K) = x.shape[1:3], dy.shape[1:3], weight.shape[-2:]
    aligned = _aligned(T, T_out)
    config = _conv_bwd_dweight_config(Q, K, x.element_size(), aligned)
    at_once = config.pop("per_sm") * sm_count(x.device)
    half = cdiv(cdiv(T_out, config["ROWS"] * config["BLOCK_I"]), 2)
    tiles = x.shape[0] * half * (2 * half + 1)
    sums = weight.shape[0] * weight.shape[1] * (Q // config["TAPS_Q"])
    strips, strip = strips_of(tiles, 1, max(1, at_once // sums))
    dtype = accumulator(x.dtype)
    parts = [None if t is None else x.new_empty(strips, t.numel(), dtype=dtype) for t in like]
    launch(
        _conv_bwd_dweight_kernel, (sums * strips,),
        unit_stride(x), unit_stride(dy), *parts, T, T_out, H_out, tiles, strip,
        IN=H // groups, OUT=H_out // groups, WINDOW_Q=Q, WINDOW_K=K,
        PADDING_Q=padding[0], PADDING_K=padding[1],
        DILATION_Q=dilation[0], DILATION_K=dilation[1], COMPUTE=triton_dtype(dtype),
        TAPS_UP=next_power_of_2(config["TAPS_Q"] * K), ALIGNED=aligned, **config,
    )  # fmt: skip
    (dweight,), (dbias,) = (sums_of_parts(parts[i : i + 1], like[i : i + 1]) for i in range(2))
    return dx, dweight, dbias
