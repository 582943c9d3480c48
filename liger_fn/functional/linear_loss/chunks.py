"""The chunks of a linear head: how many rows of logits at once, and what is done with them.

    logits = x · weightᵀ + bias         dx = g · weight         dweight = gᵀ · x

`logits` and their gradient `g` share one buffer, in the dtype of x. Few large products run at full
speed, and sums over chunks in 16 bits lose with every chunk: so a chunk is as large as a budget of
memory allows.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from liger_fn.functional.core import check
from liger_fn.functional.core.backend import interpreting
from liger_fn.functional.core.launch import (
    TensorDescriptor,
    cdiv,
    shared_memory,
    sm_count,
    tl,
    triton,
    triton_dtype,
    unit_stride,
)
from liger_fn.functional.loss.cross_entropy import check_target

_BUFFER_BYTES = 5 << 28
_PART_BYTES = 1 << 27


@dataclass(frozen=True)
class Plan:
    """How N rows are taken: `first` of them, then `rows` at a time."""

    first: int
    rows: int

    def slices(self, N: int) -> Iterator[slice]:
        start, stop = 0, self.first
        while start < N:
            yield slice(start, stop)
            start, stop = stop, stop + self.rows


@dataclass(frozen=True)
class Limits:
    """What bounds a chunk; `wide` says that sums over chunks are held in float32.

    Beside each logit there may be another's, of `beside` bytes: those of a teacher.

    Sums in 16 bits are rounded once a chunk. Of two chunks the first takes 7/16 of the rows: then
    the error of the sum is √(1 + 7/16) = 1.2 times that of one rounding. More chunks are added in
    float32, unless the memory that this takes buys a buffer for which two suffice.
    """

    chunk_size: int | None
    memory_budget: int | None
    wide: bool = False
    beside: int = 0

    def plan(self, N: int, weight: Tensor) -> Plan:
        """Choose the chunks: few large products run at full speed."""
        if self.chunk_size is not None:
            most = self.chunk_size
        else:
            most, larger = self._most(weight), self._most(weight, with_sums=True)
            if not self.wide and not _half(most, N) and _half(larger, N):
                most = min(larger, cdiv(cdiv(9 * N, 16), 128) * 128)
        if most >= N:
            return Plan(N, N)
        count = cdiv(N, most)
        if self.chunk_size is None:
            share = cdiv(9 * N, 16) if count == 2 else cdiv(N, count)
            most = min(most, cdiv(share, 128) * 128)
        return Plan(N - (count - 1) * most, most)

    def one_chunk(self, N: int, weight: Tensor) -> bool:
        """Say whether one chunk surely holds N rows, which a compiler may not know."""
        return statically_known_true((self.chunk_size or self._most(weight)) >= N)

    def two_chunks(self, N: int, weight: Tensor) -> bool:
        """Say whether two chunks surely hold N rows, and err little."""
        if self.chunk_size is not None:
            return statically_known_true(2 * self.chunk_size >= N)
        return statically_known_true(_half(self._most(weight, with_sums=True), N))

    def _most(self, weight: Tensor, with_sums: bool = False) -> int:
        """Rows in the budget; `with_sums`, in that and the memory that wide sums would take."""
        V, H = weight.shape
        room = _BUFFER_BYTES if self.memory_budget is None else self.memory_budget
        if with_sums and self.memory_budget is None:
            room += V * H * weight.itemsize
        rows = room // (width_of(V) * (weight.itemsize + self.beside))
        # Multiples of 128 rows fill the tiles of the products.
        return rows // 128 * 128 if rows >= 128 else max(1, rows)


def _half(rows: int, N: int) -> bool:
    """Say whether so many rows and the rest make two chunks whose sum errs at most 1.2 times."""
    return 25 * rows >= 14 * N


@contextlib.contextmanager
def dtypes_as_given(device: torch.device) -> Iterator[None]:
    """Autocast has cast the inputs already, and must not cast the float32 sums."""
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield


def width_of(V: int) -> int:
    """Columns of memory for V logits: rows that begin on 16 bytes keep products and kernel fast."""
    return cdiv(V, 16) * 16


def logits_of(
    weight: Tensor, x: Tensor, bias: Tensor | None, slices: Iterator[slice], buffer: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Give the logits of each slice of rows; all share one buffer."""
    for rows in slices:
        logits = buffer[: rows.stop - rows.start, : weight.shape[0]]
        if bias is None:
            torch.mm(x[rows], weight.t(), out=logits)
        else:
            torch.addmm(bias, x[rows], weight.t(), out=logits)
        yield rows, logits


def new_kept(x: Tensor, rows: torch.Size, weight: Tensor, keep: bool) -> Tensor:
    """Memory for the logits of all rows, or, if they are not kept, for none."""
    return x.new_empty((*rows, width_of(weight.shape[0]) if keep else 0))


def logits_to_keep(
    weight: Tensor, x: Tensor, bias: Tensor | None, limits: Limits, kept: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Give the logits of some rows at a time, or, where `kept` has room, of all in that."""
    V, N = weight.shape[0], x.shape[0]
    if kept.shape[-1]:
        chunks, buffer = Plan(N, N), kept.view(N, -1)
        buffer[:, V:] = 0.0
    else:
        chunks = limits.plan(N, weight)
        buffer = x.new_empty((chunks.rows, width_of(V)))
    return logits_of(weight, x, bias, chunks.slices(N), buffer)


def logits_again(
    weight: Tensor, x: Tensor, bias: Tensor | None, limits: Limits, kept: Tensor, donated: bool
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Give the logits again, kept or made anew, each time with memory for their gradient.

    That is the memory of the logits, unless they are kept for others, too.
    """
    V, N = weight.shape[0], x.shape[0]
    if kept.shape[-1]:
        kept = unit_stride(kept).view(N, -1)
        yield slice(0, N), kept[:, :V], (kept if donated else torch.empty_like(kept))[:, :V]
    else:
        chunks = limits.plan(N, weight)
        buffer = x.new_empty((chunks.rows, width_of(V)))
        for rows, logits in logits_of(weight, x, bias, chunks.slices(N), buffer):
            yield rows, logits, logits


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


# If Triton knew that a sum is over one row, it would let the loop over tiles fetch ahead, for which
# there is no memory.
@triton.jit(do_not_specialize=["V", "H", "K"])
def _add_product_kernel(
    g_desc, x_desc, total_desc, V, H, K,
    DTYPE: tl.constexpr, PROGRAMS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_v, tiles_h = tl.cdiv(V, BLOCK_V), tl.cdiv(H, BLOCK_H)
    for tile in tl.range(tl.program_id(0), tiles_v * tiles_h, PROGRAMS):
        # GROUP rows of tiles at a time, column by column: what they share stays in the cache.
        first = tile // (GROUP * tiles_h) * GROUP
        rows = tl.minimum(tiles_v - first, GROUP)
        v = (first + tile % (GROUP * tiles_h) % rows) * BLOCK_V
        h = tile % (GROUP * tiles_h) // rows * BLOCK_H

        total = tl.zeros((BLOCK_V, BLOCK_H), tl.float32)
        for k in range(0, K, BLOCK_K):
            g = g_desc.load([k, v]).to(DTYPE)
            x = x_desc.load([k, h]).to(DTYPE)
            total = tl.dot(tl.trans(g), x, total)
        total += total_desc.load([v, h]).to(tl.float32)
        total_desc.store([v, h], total.to(total_desc.dtype))


def _add_product_config() -> dict:
    """Half of a multiprocessor's registers for a tile's sums; three steps are on their way.

    On an H200 within 3 % of cuBLAS; without a loop over tiles, or with four steps, within 5 %.
    """
    tile = {"BLOCK_V": 128, "BLOCK_H": 256, "BLOCK_K": 64}
    return tile | {"GROUP": 8, "num_warps": 8, "num_stages": 3}


def _copies_tiles(*ts: Tensor) -> bool:
    """Say whether the chip, Hopper or later, can copy tiles of these.

    Their rows begin on 16 bytes and lie apart; those of an expanded tensor do not.
    """
    return shared_memory(ts[0].device) >= 220_000 and all(
        t.data_ptr() % 16 == t.stride(0) * t.itemsize % 16 == 0 and t.stride(0) >= t.shape[1]
        for t in ts
    )


def _add_by_tiles(g: Tensor, x: Tensor, dweight: Tensor) -> None:
    (K, V), H = g.shape, x.shape[1]
    config, programs = _add_product_config(), sm_count(g.device)
    block_v, block_h, block_k = (config[f"BLOCK_{n}"] for n in "VHK")
    tiles = cdiv(V, block_v) * cdiv(H, block_h)
    # Triton's own launch, for it makes the chip's descriptors; beside the product that is little.
    _add_product_kernel[(min(programs, tiles),)](
        TensorDescriptor.from_tensor(g, [block_k, block_v]),
        TensorDescriptor.from_tensor(x, [block_k, block_h]),
        TensorDescriptor.from_tensor(dweight, [block_v, block_h]),
        V, H, K, triton_dtype(torch.float32 if interpreting() else g.dtype), programs, **config,
    )  # fmt: skip


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
    by_tiles = _copies_tiles(g, x, dweight) and not interpreting()
    (_add_by_tiles if by_tiles else _add_by_parts)(g, x, dweight)


def pull_back(
    g: Tensor, weight: Tensor, x: Tensor, rows: slice,
    dweight: Tensor | None, dx: Tensor | None, dbias: Tensor | None, onto: bool = False,
) -> None:  # fmt: skip
    """Write these rows of dx; add their share to dweight and dbias, which the first rows write.

    With `onto` the first rows add to dweight, too.
    """
    later = rows.start > 0
    if dx is not None:
        _product(g, weight, dx[rows])
    last_of_two = later and rows.stop == len(x) and 2 * rows.start <= len(x)
    if dweight is not None and last_of_two and dweight.itemsize == 2:
        _add_rounding_once(g, x[rows], dweight)
    elif dweight is not None:
        _product(g.t(), x[rows], dweight, add=later or onto)
    if dbias is not None:
        total = g.sum(0, dtype=dbias.dtype)
        torch.add(dbias, total, out=dbias) if later else dbias.copy_(total)


def first_valid(
    x: Tensor, y: Tensor, ignore_index: int, max_valid: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give the rows that count, `max_valid` rows in all, their places, and NaN if there are more.

    The order is found on the device: a stable sort by whether a row counts.
    """
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1)
    # uint8 holds no -100, and would compare with 156.
    ignored = y.long() == ignore_index
    places = torch.argsort(ignored.to(torch.uint8), stable=True)[:max_valid]
    valid = ignored.numel() - ignored.sum()
    sound = torch.where(valid > max_valid, math.nan, 1.0)
    return x.index_select(0, places), y.index_select(0, places), places, sound


def among_all(rows: Tensor, places: Tensor, whole: torch.Size, ignored: float = 0.0) -> Tensor:
    """Put what is known of the rows that count among those that do not."""
    return rows.new_full((whole.numel(),), ignored).index_copy(0, places, rows).view(whole)


def check_head(
    op: str, weight: Tensor, x: Tensor, y: Tensor, bias: Tensor | None, chunk_size: int | None
) -> None:
    """Check a linear head, its inputs and targets, and how many rows it takes at once."""
    check_factors(op, weight, x, bias)
    check_target(op, "y", y, x, "x")
    if chunk_size is not None:
        positive = isinstance(chunk_size, (int, torch.SymInt)) and chunk_size > 0
        check.number(op, "chunk_size", chunk_size, "be a positive integer, or None", positive)


def check_factors(op: str, weight: Tensor, x: Tensor, bias: Tensor | None, of: str = "") -> None:
    """Check a head and its inputs, whose names begin with `of`."""
    check.floating(op, f"{of}x", x)
    check.at_least_1d(op, f"{of}x", x)
    for name, t in ((f"{of}weight", weight), (f"{of}bias", bias)):
        if t is None:
            continue
        check.floating(op, name, t)
        check.dtype_inside(op, name, t, x, f"{of}x")
        check.device(op, name, t, x, f"{of}x")
    if weight.dim() != 2 or weight.shape[0] == 0:
        shape = check.spell(weight.shape)
        check.fail(op, f"{of}weight", "have shape (V, H) with at least one class", shape)
    V, because = weight.shape[0], f"(V, H) with the last size of `{of}x`"
    check.shape(op, f"{of}weight", weight, (V, x.shape[-1]), because)
    if bias is not None:
        check.shape(op, f"{of}bias", bias, (V,), "one per class")


def check_memory(
    op: str, max_valid: int | None, memory_budget: int | None,
    accum_dtype: torch.dtype | None, accumulators: Sequence[torch.dtype], inside: torch.dtype,
) -> None:  # fmt: skip
    """Check how many rows count, the bytes that logits may take, and the dtype of sums."""
    if accum_dtype not in (None, *accumulators):
        either = " or ".join(dict.fromkeys(map(str, accumulators)))
        check.fail(op, "accum_dtype", f"be {either} for `x` of {inside}, or None", accum_dtype)
    if max_valid is not None:
        natural = isinstance(max_valid, (int, torch.SymInt)) and max_valid >= 0
        check.number(op, "max_valid", max_valid, "be a whole number of rows, or None", natural)
    check_budget(op, memory_budget)


def check_budget(op: str, memory_budget: int | None) -> None:
    """Check the bytes that logits may take."""
    if memory_budget is not None:
        positive = isinstance(memory_budget, (int, torch.SymInt)) and memory_budget > 0
        contract = "be a positive number of bytes, or None"
        check.number(op, "memory_budget", memory_budget, contract, positive)
