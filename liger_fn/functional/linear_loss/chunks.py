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

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from liger_fn.functional.core import check
from liger_fn.functional.core.launch import cdiv, unit_stride
from liger_fn.functional.linear_loss.products import AllRows, Counted, suits
from liger_fn.functional.loss.cross_entropy import check_target

_BUFFER_BYTES = 5 << 28


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
    """What bounds a chunk; beside each logit there may be a teacher's, of `beside` bytes.

    Sums in 16 bits are rounded once a chunk. Of two chunks the first takes 7/16 of the rows: then
    the error of the sum is √(1 + 7/16) = 1.2 times that of one rounding. More chunks are added in
    float32, unless the memory that this takes buys a buffer for which two suffice.
    """

    chunk_size: int | None
    memory_budget: int | None
    beside: int = 0

    def plan(self, N: int, weight: Tensor, sums: Tensor | None = None) -> Plan:
        """Choose the chunks, which add up in `sums`: few large products run at full speed."""
        if self.chunk_size is not None:
            most = self.chunk_size
        else:
            most, larger = self._most(weight), self._most(weight, with_sums=True)
            rounds = sums is not None and sums.itemsize == 2
            if rounds and not _half(most, N) and _half(larger, N):
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
        """Rows in the budget; `with_sums`, in that and the memory of sums in float32."""
        V, H = weight.shape
        room = _BUFFER_BYTES if self.memory_budget is None else self.memory_budget
        if with_sums and self.memory_budget is None:
            room += 4 * V * H
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
    weight: Tensor, bias: Tensor | None, head: AllRows, slices: Iterator[slice], buffer: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Give the logits of each slice of rows; all share one buffer."""
    for rows in slices:
        logits = buffer[: rows.stop - rows.start, : weight.shape[0]]
        head.logits(weight, bias, rows, logits)
        yield rows, logits


def new_kept(x: Tensor, rows: torch.Size, weight: Tensor, keep: bool) -> Tensor:
    """Memory for the logits of all rows, or, if they are not kept, for none."""
    return x.new_empty((*rows, width_of(weight.shape[0]) if keep else 0))


def rows_of_head(
    weight: Tensor, x: Tensor, y: Tensor, ignore_index: int,
    kept: Tensor | None = None, dweight: Tensor | None = None,
) -> AllRows:  # fmt: skip
    """The rows x (N, H) with targets y (N,): those that count in front, where the chip can skip the
    others, and no logits are kept, which stay where they are.

    A dweight that is the caller's may begin where no product of tiles can add to it.
    """
    if kept is not None and kept.shape[-1]:
        return AllRows(x, y)
    return Counted(x, y, ignore_index) if suits(weight, x, dweight) else AllRows(x, y)


def logits_to_keep(
    weight: Tensor, bias: Tensor | None, head: AllRows, limits: Limits, kept: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Give the logits of some rows at a time, or, where `kept` has room, of all in that."""
    V, N = weight.shape[0], len(head.x)
    if kept.shape[-1]:
        chunks, buffer = Plan(N, N), kept.view(N, -1)
        buffer[:, V:] = 0.0
    else:
        chunks = limits.plan(N, weight)
        buffer = kept.new_empty((chunks.rows, width_of(V)))
    return logits_of(weight, bias, head, chunks.slices(N), buffer)


def logits_again(
    weight: Tensor,
    bias: Tensor | None,
    head: AllRows,
    limits: Limits,
    sums: Tensor | None,
    kept: Tensor,
    donated: bool,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Give the logits again, kept or made anew, each time with memory for their gradient.

    That is the memory of the logits, unless they are kept for others, too.
    """
    V, N = weight.shape[0], len(head.x)
    if kept.shape[-1]:
        kept = unit_stride(kept).view(N, -1)
        yield slice(0, N), kept[:, :V], (kept if donated else torch.empty_like(kept))[:, :V]
    else:
        chunks = limits.plan(N, weight, sums)
        buffer = kept.new_empty((chunks.rows, width_of(V)))
        for rows, logits in logits_of(weight, bias, head, chunks.slices(N), buffer):
            yield rows, logits, logits


def pull_back(
    g: Tensor, weight: Tensor, head: AllRows, rows: slice,
    dweight: Tensor | None, dx: Tensor | None, dbias: Tensor | None, onto: bool = False,
) -> None:  # fmt: skip
    """Write these rows of dx; add their share to dweight and dbias, which the first rows write.

    With `onto` the first rows add to dweight, too.
    """
    later = rows.start > 0
    if dweight is not None:
        head.dweight(g, rows, dweight, add=later or onto)
    if dx is not None:
        head.dx(g, weight, rows, dx)
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
