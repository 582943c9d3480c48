"""The products of a linear head, of all rows or of those that count.

    logits = x · weightᵀ + bias         dx = g · weight         dweight = gᵀ · x

PyTorch's products multiply what they are given. How many targets count is known to the device
alone, and to ask it would be to wait for it. For 16-bit inputs on Hopper there are products here
that ask it themselves: rows whose target counts are put in front of the others, and tiles past them
are skipped. So what is ignored costs nothing.

One program per multiprocessor walks over tiles of 128 x 256, and the loads of a tile begin while
the one before is written. Where tiles of dx are no multiple of the programs, the last ones are
divided along V, and their parts added, in a fixed order, as rows go back to their places. With all
rows counted this takes as long as cuBLAS does, or less.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from liger_fn.functional.core.backend import interpreting
from liger_fn.functional.core.direct import by_triton, launch
from liger_fn.functional.core.launch import (
    HOPPERS_SHARED_MEMORY,
    TensorDescriptor,
    cdiv,
    next_power_of_2,
    shared_memory,
    sm_count,
    tl,
    triton,
    triton_dtype,
    unit_stride,
)

# Rows that a tile holds: a row past those that count is multiplied, with zeros, if it shares a tile
# with one of them.
_TILE: int = 128
_PART_BYTES = 1 << 27


def suits(weight: Tensor, x: Tensor, dweight: Tensor | None = None) -> bool:
    """Say whether these products are for such a head on such a chip, and for adding to dweight."""
    tiled = (weight,) if dweight is None else (weight, dweight)
    if x.itemsize != 2 or x.numel() == 0 or x.shape[-1] % 8 or not copies_tiles(*tiled):
        return False
    if interpreting():
        # The interpreter would cut bfloat16 off.
        return x.dtype is torch.float16
    return x.is_cuda and _is_hopper(x.device)


def _is_hopper(device: torch.device) -> bool:
    # AMD numbers its own chips.
    return not torch.version.hip and torch.cuda.get_device_capability(device)[0] == 9


def copies_tiles(*ts: Tensor) -> bool:
    """Say whether a chip that can copy tiles can copy those of these.

    Their rows begin on 16 bytes and lie apart; those of an expanded tensor do not.
    """
    return all(
        t.stride(-1) == 1
        and t.data_ptr() % 16 == t.stride(0) * t.itemsize % 16 == 0
        and t.stride(0) >= t.shape[1]
        for t in ts
    )


@triton.jit(do_not_specialize=["N", "ignore_index"])
def _places_kernel(y_ptr, places_ptr, count_ptr, N, ignore_index, BLOCK: tl.constexpr):
    """Write where rows are, those that count first, each in their order, and how many count."""
    at = tl.arange(0, BLOCK)
    count = 0
    for start in range(0, N, BLOCK):
        row = start + at
        y = tl.load(y_ptr + row, mask=row < N, other=0).to(tl.int64)
        count += tl.sum(((y != ignore_index) & (row < N)).to(tl.int32), axis=0)
    tl.store(count_ptr, count)

    front, back = 0, count
    for start in range(0, N, BLOCK):
        row = start + at
        y = tl.load(y_ptr + row, mask=row < N, other=0).to(tl.int64)
        live = (y != ignore_index) & (row < N)
        before = tl.cumsum(live.to(tl.int32), axis=0)
        to = tl.where(live, front + before - 1, back + at - before)
        tl.store(places_ptr + to, row, mask=row < N)
        lives = tl.sum(live.to(tl.int32), axis=0)
        front += lives
        back += BLOCK - lives


@triton.jit(do_not_specialize=["N"])
def _gather_kernel(
    x_ptr, places_ptr, count_ptr, out_ptr, stride_n, N, H,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Write the rows that count, and as many zeros after them as one tile may want."""
    count = tl.load(count_ptr)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    place = tl.load(places_ptr + row, mask=row < count, other=0)
    inside = (h < H)[None, :]
    x_at = x_ptr + place[:, None] * stride_n + h[None, :]
    x = tl.load(x_at, mask=(row < count)[:, None] & inside, other=0.0)
    written = (row < N) & (row < count + TILE)
    tl.store(out_ptr + row[:, None].to(tl.int64) * H + h[None, :], x, written[:, None] & inside)


@triton.jit
def tile_of(i, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Give the row and the column of the i-th tile.

    GROUP rows of tiles at a time, column by column: what they share stays in the cache.
    """
    first = i // (GROUP * tiles_n) * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    return first + i % (GROUP * tiles_n) % rows, i % (GROUP * tiles_n) // rows


@triton.jit
def halves(t):
    """The left and the right columns."""
    return tl.split(tl.permute(tl.reshape(t, (t.shape[0], 2, t.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _write(desc, m, n, t, ADD: tl.constexpr):
    if ADD == "there":
        desc.atomic_add([m, n], t)
    else:
        if ADD == "here":
            t += desc.load([m, n]).to(tl.float32)
        desc.store([m, n], t.to(desc.dtype))


@triton.jit
def _write_tile(desc, m, n, t, ADD: tl.constexpr, PIECES: tl.constexpr):
    """Write a tile, or add it, in one piece, two or four: as there is memory for at once."""
    if PIECES == 1:
        _write(desc, m, n, t, ADD)
    else:
        WIDTH: tl.constexpr = t.shape[1] // 2
        left, right = halves(t)
        _write_tile(desc, m, n, left, ADD, PIECES // 2)
        _write_tile(desc, m, n + WIDTH, right, ADD, PIECES // 2)


@triton.jit
def rows_of_chunk(count_ptr, first, N):
    """How many of N rows, from the first on, count."""
    return tl.minimum(tl.maximum(tl.load(count_ptr) - first, 0), N)


@triton.jit
def tile_of_logits(
    x_desc, weight_desc, first, n, v, H, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Multiply the rows of a chunk from n on by classes from v on; the chunk begins at `first`."""
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for h in range(0, H, BLOCK_K):
        x = x_desc.load([first + n, h]).to(DTYPE)
        w = weight_desc.load([v, h]).to(DTYPE)
        z = tl.dot(x, tl.trans(w), z)
    return z


@triton.jit(do_not_specialize=["first", "N", "V"])
def _logits_kernel(
    x_desc, weight_desc, bias_ptr, logits_desc, count_ptr, first, N, V, H,
    DTYPE: tl.constexpr, PROGRAMS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.cdiv(rows_of_chunk(count_ptr, first, N), BLOCK_M)
    columns = tl.cdiv(V, BLOCK_N)
    for i in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=True):
        row, column = tile_of(i, rows, columns, GROUP)
        n, v = row * BLOCK_M, column * BLOCK_N
        z = tile_of_logits(x_desc, weight_desc, first, n, v, H, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K)
        if bias_ptr is not None:
            col = v + tl.arange(0, BLOCK_N)
            z += tl.load(bias_ptr + col, mask=col < V, other=0.0).to(tl.float32)[None, :]
        logits_desc.store([n, v], z.to(logits_desc.dtype))


@triton.jit
def _division(tiles, PROGRAMS: tl.constexpr):
    """Give how many tiles are whole, and into how many parts each of the others is divided.

    The others are fewer than the programs. All programs walk along the same part of V at a time:
    shares that are even, but begin anywhere, would read each its own part of the weight, and take a
    third longer on an H200.
    """
    whole = tiles // PROGRAMS * PROGRAMS
    return whole, PROGRAMS // tl.maximum(tiles - whole, 1)


@triton.jit(do_not_specialize=["first", "N", "V"])
def _dx_kernel(
    g_desc, weight_desc, dx_desc, parts_desc, count_ptr, first, N, V, H,
    DTYPE: tl.constexpr, PROGRAMS: tl.constexpr, GROUP: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.cdiv(rows_of_chunk(count_ptr, first, N), BLOCK_M)
    columns = tl.cdiv(H, BLOCK_N)
    tiles = rows * columns
    whole, parts = _division(tiles, PROGRAMS)
    steps = tl.cdiv(tl.cdiv(V, BLOCK_K), parts)
    work = whole + (tiles - whole) * parts
    for i in tl.range(tl.program_id(0), work, PROGRAMS, flatten=True):
        divided = (i >= whole) & (parts > 1)
        part = tl.where(divided, (i - whole) % parts, 0)
        tile = tl.where(divided, whole + (i - whole) // parts, i)
        start = part * steps * BLOCK_K
        stop = tl.where(divided, tl.minimum(start + steps * BLOCK_K, V), V)
        row, column = tile_of(tile, rows, columns, GROUP)
        dx = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for v in range(start, stop, BLOCK_K):
            g = g_desc.load([row * BLOCK_M, v]).to(DTYPE)
            w = weight_desc.load([v, column * BLOCK_N]).to(DTYPE)
            dx = tl.dot(g, w, dx)
        if divided:
            _write_tile(parts_desc, (i - whole) * BLOCK_M, 0, dx, None, 4)
        else:
            _write_tile(dx_desc, row * BLOCK_M, column * BLOCK_N, dx, None, PIECES)


@triton.jit(do_not_specialize=["first", "N"])
def _spread_kernel(
    dx_ptr, parts_ptr, places_ptr, count_ptr, out_ptr, first, N, H,
    PROGRAMS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write the rows of dx to their places, and zeros to those of rows that do not count."""
    counted = rows_of_chunk(count_ptr, first, N)
    rows, columns = tl.cdiv(counted, BLOCK_M), tl.cdiv(H, BLOCK_N)
    whole, parts = _division(rows * columns, PROGRAMS)
    n = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_R // BLOCK_M
    above = row // GROUP * GROUP
    tile = above * columns + column * tl.minimum(rows - above, GROUP) + row - above
    divided = (tile >= whole) & (parts > 1) & (row < rows)

    at = tl.arange(0, BLOCK_N)
    h = column * BLOCK_N + at
    in_h = (h < H)[None, :]
    dx_at = dx_ptr + n[:, None].to(tl.int64) * H + h[None, :]
    readable = tl.where(divided, 0, counted)
    dx = tl.load(dx_at, mask=(n < readable)[:, None] & in_h, other=0.0).to(tl.float32)
    part_at = ((tile - whole) * parts * BLOCK_M + n % BLOCK_M)[:, None] * BLOCK_N + at[None, :]
    for _ in range(tl.where(divided, parts, 0)):
        dx += tl.load(parts_ptr + part_at, mask=(n < counted)[:, None] & in_h, other=0.0)
        part_at += BLOCK_M * BLOCK_N
    place = tl.load(places_ptr + first + n, mask=n < N, other=0)
    tl.store(out_ptr + place[:, None] * H + h[None, :], dx, mask=(n < N)[:, None] & in_h)


# If Triton knew that a sum is over one row, it would let the loop over tiles fetch ahead, for which
# there is no memory.
@triton.jit(do_not_specialize=["first", "N", "V", "H"])
def _dweight_kernel(
    g_desc, x_desc, dweight_desc, count_ptr, first, N, V, H,
    DTYPE: tl.constexpr, PROGRAMS: tl.constexpr, GROUP: tl.constexpr, ADD: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.cdiv(V, BLOCK_M), tl.cdiv(H, BLOCK_N)
    tiles = rows * columns
    if count_ptr is not None:
        N = rows_of_chunk(count_ptr, first, N)
        if ADD is not None:
            tiles = tl.where(N > 0, tiles, 0)
    for i in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        row, column = tile_of(i, rows, columns, GROUP)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for n in range(0, N, BLOCK_K):
            g = g_desc.load([n, row * BLOCK_M]).to(DTYPE)
            x = x_desc.load([first + n, column * BLOCK_N]).to(DTYPE)
            total = tl.dot(tl.trans(g), x, total)
        _write_tile(dweight_desc, row * BLOCK_M, column * BLOCK_N, total, ADD, PIECES)


def tiles_config() -> dict:
    """Half of a multiprocessor's registers for a tile's sums; three steps are on their way.

    On an H200 four steps, groups of 4 to 64 rows of tiles and tiles of 256 x 128 are no faster, and
    two programs of half the size 10 % slower.
    """
    tile = {"BLOCK_M": _TILE, "BLOCK_N": 256, "BLOCK_K": 64}
    return tile | {"GROUP": 8, "num_warps": 8, "num_stages": 3}


def descriptor(t: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(t, list(block))


def dtype_of_products(x: Tensor):
    return triton_dtype(torch.float32 if interpreting() else x.dtype)


def _pieces(out: Tensor, buffers: int) -> int:
    """How many pieces a tile is written in: beside three steps there is room for 64 KiB."""
    return out.itemsize * buffers // 2


def _writing(out: Tensor, add: bool) -> dict[str, Any]:
    """Where a tile is added to what `out` holds, and in how many pieces it goes there.

    The cache adds float32, and nobody waits for what was there: every element has one writer, so
    the bits are those of a sum made here, but for subnormal numbers, which are zero to it. Of 16
    bits it would round the tile first. The interpreter has no such sums.
    """
    there = out.dtype is torch.float32 and not interpreting()
    adds = None if not add else "there" if there else "here"
    return {"ADD": adds, "PIECES": _pieces(out, buffers=2 if adds == "here" else 1)}


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """Write a · b to out, or add it, in the dtype of out, which may be wider than theirs."""
    options: dict[str, Any] = {}
    if a.dtype is not out.dtype and a.is_cuda:
        options = {"out_dtype": out.dtype}
    elif a.dtype is not out.dtype:
        # PyTorch has this product for CUDA alone.
        a, b = a.to(out.dtype), b.to(out.dtype)
    if add:
        torch.addmm(out, a, b, out=out, **options)
    else:
        torch.mm(a, b, out=out, **options)


def _add_by_parts(g: Tensor, x: Tensor, dweight: Tensor) -> None:
    """Make the product in float32, of some classes at a time."""
    V, H = dweight.shape
    step = cdiv(_PART_BYTES, 4 * max(1, H))
    for v in range(0, V, step):
        part = dweight.new_empty((min(step, V - v), H), dtype=torch.float32)
        _product(g[:, v : v + step].t(), x, part)
        dweight[v : v + step].copy_(part.add_(dweight[v : v + step]))


def _add_rounding_once(g: Tensor, x: Tensor, dweight: Tensor) -> None:
    """Add gᵀ · x to dweight of 16 bits, and round nothing but the sum.

    cuBLAS, asked for the same, rounds the product, too: two chunks would err 1.48 times as much as
    one.
    """
    x = unit_stride(x)
    # The interpreter would cut bfloat16 off.
    hopper = shared_memory(g.device) >= HOPPERS_SHARED_MEMORY
    if not interpreting() and hopper and copies_tiles(g, x, dweight):
        _product_of_tiles(g, x, None, 0, dweight, add=True)
    else:
        _add_by_parts(g, x, dweight)


class AllRows:
    """The rows of a head as they are, and PyTorch's products, which multiply all of them.

    Attributes:
        x: (N, H).
        y: (N,): their targets, of an op that has such.
    """

    def __init__(self, x: Tensor, y: Tensor | None = None) -> None:
        self.x, self.y = x, y

    def in_order(self, t: Tensor) -> Tensor:
        """Take numbers of rows, (N,), into the order of these."""
        return t

    def new_numbers(self, *ts: Tensor | None) -> tuple[Tensor | None, ...]:
        """Memory for numbers of rows in this order, that is for those of `ts`."""
        return ts

    def put_back(self, ordered: Sequence[Tensor | None], ts: Sequence[Tensor | None]) -> None:
        """Write numbers of rows, held in what new_numbers gave, to where the rows are."""

    def logits(self, weight: Tensor, bias: Tensor | None, rows: slice, out: Tensor) -> None:
        """Write the logits of these rows."""
        if bias is None:
            torch.mm(self.x[rows], weight.t(), out=out)
        else:
            torch.addmm(bias, self.x[rows], weight.t(), out=out)

    def dx(self, g: Tensor, weight: Tensor, rows: slice, dx: Tensor) -> None:
        """Write dx of these rows, for the gradient g of their logits, to where they are.

        It is the last that is done with these rows.
        """
        _product(g, weight, dx[rows])

    def dweight(self, g: Tensor, rows: slice, dweight: Tensor, add: bool) -> None:
        """Write what these rows have of dweight, or add it."""
        last_of_two = 0 < 2 * rows.start <= len(self.x) == rows.stop
        if add and last_of_two and dweight.itemsize == 2:
            _add_rounding_once(g, self.x[rows], dweight)
        else:
            _product(g.t(), self.x[rows], dweight, add)


class Counted(AllRows):
    """The rows of a head whose targets count, in front of the others.

    Attributes:
        x, y: the rows and targets in that order. Of x, rows past those that count are not written.
        places: (N,) int64: where each of them was.
        count: (1,) int32: how many count.
    """

    def __init__(self, x: Tensor, y: Tensor, ignore_index: int) -> None:
        N = len(x)
        self.places = torch.empty(N, dtype=torch.int64, device=x.device)
        self.count = torch.empty(1, dtype=torch.int32, device=x.device)
        block = min(4096, max(16, next_power_of_2(N)))
        launch(
            _places_kernel, (1,), unit_stride(y), self.places, self.count, N, ignore_index,
            BLOCK=block, num_warps=8,
        )  # fmt: skip
        super().__init__(self._in_front(x), self.in_order(y))

    def beside(self, x: Tensor) -> "Counted":
        """Put the same rows of another x in the same order."""
        other = copy.copy(self)
        other.x = other._in_front(x)
        return other

    def _in_front(self, x: Tensor) -> Tensor:
        (N, H), x = x.shape, x if x.stride(-1) == 1 else x.contiguous()
        ordered = x.new_empty(x.shape)
        launch(
            _gather_kernel, (cdiv(N, 8), cdiv(H, 1024)),
            x, self.places, self.count, ordered, x.stride(0), N, H,
            TILE=_TILE, BLOCK_N=8, BLOCK_H=1024, num_warps=4,
        )  # fmt: skip
        return ordered

    def in_order(self, t: Tensor) -> Tensor:
        # One number for all rows is that in every order.
        return t if t.stride(0) == 0 else t.index_select(0, self.places)

    def new_numbers(self, *ts: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else torch.empty_like(t) for t in ts)

    def put_back(self, ordered: Sequence[Tensor | None], ts: Sequence[Tensor | None]) -> None:
        for source, t in zip(ordered, ts, strict=True):
            if t is not None:
                t.index_copy_(0, self.places, source)

    def logits(self, weight: Tensor, bias: Tensor | None, rows: slice, out: Tensor) -> None:
        config, programs = tiles_config(), sm_count(out.device)
        m, n, k = (config[f"BLOCK_{a}"] for a in "MNK")
        (N, V), H = out.shape, self.x.shape[1]
        # Triton's own launch, for it makes the chip's descriptors; beside a product that is little.
        by_triton(
            _logits_kernel, (min(programs, cdiv(N, m) * cdiv(V, n)),),
            descriptor(self.x, m, k), descriptor(weight, n, k), unit_stride(bias),
            descriptor(out, m, n), self.count, rows.start, N, V, H,
            dtype_of_products(out), programs, **config,
        )  # fmt: skip

    def dx(self, g: Tensor, weight: Tensor, rows: slice, dx: Tensor) -> None:
        config, programs = tiles_config(), sm_count(g.device)
        m, n, k = (config[f"BLOCK_{a}"] for a in "MNK")
        (N, V), H = g.shape, weight.shape[1]
        # These rows of x are of no use any more.
        in_order = self.x[rows] if dx.dtype is self.x.dtype else dx.new_empty((N, H))
        parts = dx.new_empty((programs * m, n), dtype=torch.float32)
        # Where dx has 16 bits, parts have a buffer of their own.
        pieces = _pieces(dx, buffers=2)
        by_triton(
            _dx_kernel, (programs,),
            descriptor(g, m, k), descriptor(weight, k, n), descriptor(in_order, m, n // pieces),
            descriptor(parts, m, n // 4), self.count, rows.start, N, V, H,
            dtype_of_products(g), programs, PIECES=pieces, **config,
        )  # fmt: skip
        launch(
            _spread_kernel, (cdiv(N, 16), cdiv(H, n)),
            in_order, parts, self.places, self.count, dx, rows.start, N, H,
            PROGRAMS=programs, GROUP=config["GROUP"], BLOCK_M=m, BLOCK_N=n, BLOCK_R=16, num_warps=4,
        )  # fmt: skip

    def dweight(self, g: Tensor, rows: slice, dweight: Tensor, add: bool) -> None:
        _product_of_tiles(g, self.x, self.count, rows.start, dweight, add)


def _product_of_tiles(
    g: Tensor, x: Tensor, count: Tensor | None, first: int, dweight: Tensor, add: bool
) -> None:
    """Write gᵀ · x to dweight, or add it and round the sum alone."""
    config, programs = tiles_config(), sm_count(g.device)
    m, n, k = (config[f"BLOCK_{a}"] for a in "MNK")
    (N, V), H = g.shape, x.shape[1]
    writing = _writing(dweight, add)
    by_triton(
        _dweight_kernel, (min(programs, cdiv(V, m) * cdiv(H, n)),),
        descriptor(g, k, m), descriptor(x, k, n), descriptor(dweight, m, n // writing["PIECES"]),
        count, first, N, V, H, dtype_of_products(g), programs,
        **writing, **config,
    )  # fmt: skip
