"""Rows of a table by their numbers.

    y_n       = weight[t_n]
    dweight_v = Σ over {n: t_n = v} of dy_n

Forward a row is copied: 4 bytes per element of a 2-byte y. Backward the numbers are sorted, so that
the rows of dy that belong to one row of the table are neighbours in that order, and a search finds
where each row's begin. Each row of the table, with what belongs to it or not, is then written once:
they are added in float32, in the order of n; 2 bytes per element of dy and of dweight, no atomics,
the same bits twice. That order is cut into chunks, for some rows (of padding, say) come thousands
of times: of a number that reaches beyond its chunk each chunk's part is added by itself, and then
the parts. The table is named by the backward pass for its shape and dtype; it is not read.
"""

import math

import torch
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
    sm_count,
    tl,
    triton,
    triton_dtype,
    unit_stride,
)
from liger_fn.functional.norm.rows import strips_of


def reference(input: Tensor, weight: Tensor, *, padding_idx: int | None = None) -> Tensor:
    return _reference(input, weight, padding_idx)


def _reference(input: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
    V = weight.shape[0]
    t = input.long()
    unknown = ((t < 0) | (t >= V))[..., None]
    # The gradient of `weight[t]` is summed in bfloat16, and PyTorch 2.11 does not trace that of
    # `index_select` with symbolic shapes.
    index = t.clamp(0, V - 1).reshape(-1, 1).expand(-1, weight.shape[1])
    rows = weight.gather(0, index).reshape(*t.shape, weight.shape[1])
    if padding_idx is not None:
        rows = torch.where((t == padding_idx)[..., None], rows.detach(), rows)
    return torch.where(unknown, math.nan, rows)


@triton.jit
def _embedding_fwd_kernel(
    input_ptr, weight_ptr, y_ptr, weight_stride_v, N, V, D,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(D, BLOCK_D)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = (tl.program_id(0) % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = tl.load(input_ptr + row, mask=row < N, other=0).to(tl.int64)
    inside = (row < N)[:, None] & (col < D)[None, :]
    known = ((t >= 0) & (t < V))[:, None]

    y = tl.load(
        weight_ptr + t[:, None] * weight_stride_v + col[None, :],
        mask=inside & known,
        other=float("nan"),
    )

    tl.store(y_ptr + row[:, None] * D + col[None, :], y, mask=inside)


@triton.jit(do_not_specialize=["N", "padding"])
def _embedding_numbers_kernel(input_ptr, numbers_ptr, N, V, padding, BLOCK_N: tl.constexpr):
    position = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.load(input_ptr + position, mask=position < N, other=0).to(tl.int64)
    # Beyond the table it belongs to no row.
    number = tl.where((t >= 0) & (t < V) & (t != padding), t, V)
    tl.store(numbers_ptr + position, number, mask=position < N)


@triton.jit(do_not_specialize=["N", "halvings"])
def _embedding_starts_kernel(numbers_ptr, starts_ptr, N, V, halvings, BLOCK_V: tl.constexpr):
    v = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    low, high = tl.zeros((BLOCK_V,), tl.int64), tl.zeros((BLOCK_V,), tl.int64) + N
    for _ in range(halvings):
        middle = (low + high) // 2
        open_ = low < high
        less = open_ & (tl.load(numbers_ptr + middle, mask=open_, other=0).to(tl.int64) < v)
        low = tl.where(less, middle + 1, low)
        high = tl.where(open_ & (less == 0), middle, high)
    tl.store(starts_ptr + v, low, mask=v <= V)


@triton.jit
def _sum_of_rows(
    dy_ptr, order_ptr, dy_stride_n, start, end, col, D, sums,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Add to each row of a tile the rows of dy at its positions from start to end, in order."""
    step = tl.zeros_like(start)
    more = tl.max(end - start, axis=0) > 0
    while more:
        for i in tl.static_range(ROWS):
            position = start + step + i
            row = tl.load(order_ptr + position, mask=position < end, other=0)
            inside = (position < end)[:, None] & (col < D)[None, :]
            dy = tl.load(dy_ptr + row[:, None] * dy_stride_n + col[None, :], mask=inside, other=0.0)
            sums += dy.to(sums.dtype)
        step += ROWS
        more = tl.max(end - start - step, axis=0) > 0
    return sums


@triton.jit(do_not_specialize=["N"])
def _embedding_bwd_parts_kernel(
    numbers_ptr, order_ptr, dy_ptr, parts_ptr, dy_stride_n, N, V, D,
    CHUNK: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(D, BLOCK_D)
    part = (tl.program_id(0) // tiles).to(tl.int64)
    col = (tl.program_id(0) % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = part // 2 * CHUNK + tl.zeros((1,), tl.int64)
    last = tl.minimum(first + CHUNK, N)
    at_first = tl.load(numbers_ptr + first)
    at_end = tl.load(numbers_ptr + last - 1)
    came_in = tl.load(numbers_ptr + first - 1, mask=first > 0, other=-1) == at_first
    goes_on = tl.load(numbers_ptr + last, mask=last < N, other=-1) == at_end

    position = first + tl.arange(0, CHUNK)
    number = tl.load(numbers_ptr + position, mask=position < last, other=-1)
    # Of a number that came in and goes on, the first part has what lies in this chunk.
    if part % 2 == 0:
        start = first
        end = first + tl.where(came_in, tl.sum((number == at_first).to(tl.int32), axis=0), 0)
        end = tl.where(at_first < V, end, start)
    else:
        begins = goes_on & ((at_first != at_end) | (came_in == 0)) & (at_end < V)
        start = last - tl.where(begins, tl.sum((number == at_end).to(tl.int32), axis=0), 0)
        end = last

    sums = tl.zeros((1, BLOCK_D), COMPUTE)
    sums = _sum_of_rows(dy_ptr, order_ptr, dy_stride_n, start, end, col, D, sums, ROWS)
    written = (start < end)[:, None] & (col < D)[None, :]
    tl.store(parts_ptr + part * D + tl.zeros((1, 1), tl.int64) + col[None, :], sums, mask=written)


@triton.jit(do_not_specialize=["N"])
def _embedding_bwd_long_kernel(
    numbers_ptr, parts_ptr, dweight_ptr, N, V, D,
    CHUNK: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(D, BLOCK_D)
    chunk = (tl.program_id(0) // tiles).to(tl.int64)
    col = (tl.program_id(0) % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, after = chunk * CHUNK, (chunk + 1) * CHUNK
    v = tl.load(numbers_ptr + after - 1, mask=after < N, other=-1)
    goes_on = tl.load(numbers_ptr + after, mask=after < N, other=-1) == v
    # Of a number that came into this chunk an earlier one takes care.
    at_first = tl.load(numbers_ptr + first)
    before = tl.load(numbers_ptr + first - 1, mask=first > 0, other=-1)
    live = goes_on & ((at_first != v) | (before != v)) & (v >= 0) & (v < V)

    written = col < tl.where(live, D, 0)
    total = tl.load(parts_ptr + (2 * chunk + 1) * D + col, mask=written, other=0.0)
    sums = tl.zeros((BLOCK_C, BLOCK_D), COMPUTE)
    start = chunk + 1
    more = live
    while more:
        c = start + tl.arange(0, BLOCK_C)
        mine = tl.load(numbers_ptr + c * CHUNK, mask=c * CHUNK < N, other=-1) == v
        inside = mine[:, None] & (col < D)[None, :]
        sums += tl.load(parts_ptr + 2 * c[:, None] * D + col[None, :], mask=inside, other=0.0)
        start += BLOCK_C
        more = tl.sum(mine.to(tl.int32), axis=0) == BLOCK_C

    # By way of float32: Triton's interpreter cannot round float64 to bfloat16.
    total = (total + tl.sum(sums, axis=0)).to(COMPUTE)
    tl.store(dweight_ptr + v.to(tl.int64) * D + col, total, mask=written)


@triton.jit(do_not_specialize=["strip"])
def _embedding_bwd_kernel(
    starts_ptr, order_ptr, dy_ptr, dweight_ptr, dy_stride_n, V, D, strip,
    CHUNK: tl.constexpr, COMPUTE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(D, BLOCK_D)
    program = (tl.program_id(0) // tiles).to(tl.int64)
    col = (tl.program_id(0) % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)

    for step in range(0, strip, BLOCK_V):
        v = program * strip + step + tl.arange(0, BLOCK_V)
        start = tl.load(starts_ptr + v, mask=v < V, other=0)
        end = tl.load(starts_ptr + v + 1, mask=v < V, other=0)
        sums = tl.zeros((BLOCK_V, BLOCK_D), COMPUTE)
        # What reaches beyond its chunk is added and written by parts.
        long = (end - 1) // CHUNK > start // CHUNK
        end = tl.where(long, start, end)
        sums = _sum_of_rows(dy_ptr, order_ptr, dy_stride_n, start, end, col, D, sums, ROWS)
        inside = ((v < V) & (long == 0))[:, None] & (col < D)[None, :]
        tl.store(dweight_ptr + v[:, None] * D + col[None, :], sums, mask=inside)


def _embedding_fwd_config(D: int) -> dict:
    """2048 elements for four warps: a thread has two 16-byte loads in flight."""
    block_d = min(2048, next_power_of_2(D))
    return {"BLOCK_D": block_d, "BLOCK_N": 2048 // block_d, "num_warps": 4}


# Positions whose sum is one program's work.
_CHUNK = 64

# Programs of a multiprocessor that divide the table: the last to end has little left to do alone.
_PER_SM = 64


def _embedding_bwd_config(D: int) -> dict:
    """4096 elements for eight warps: 16 sums a thread, of which two rows are on their way at once.

    That leaves registers for a thousand threads, whose stores of 8 KiB a program keep the memory
    busy: most rows of a table are only written.
    """
    block_d = min(4096, next_power_of_2(D))
    return {"BLOCK_D": block_d, "BLOCK_V": min(32, 4096 // block_d), "ROWS": 2, "num_warps": 8}


def _embedding_bwd_parts_config(D: int) -> dict:
    """Narrow tiles of many rows at once, for few programs have anything to add."""
    block_d = min(512, next_power_of_2(D))
    return {"BLOCK_D": block_d, "ROWS": 4, "num_warps": max(1, block_d // 256)}


def _embedding_bwd_long_config(D: int) -> dict:
    """Eight parts at a time: who has any may have thousands."""
    block_d = min(512, next_power_of_2(D))
    return {"BLOCK_D": block_d, "BLOCK_C": 8, "num_warps": max(1, block_d // 128)}


def _number_dtype(V: int) -> torch.dtype:
    """The narrowest that holds V: a sort by digits takes a pass for each byte."""
    if torch.iinfo(torch.int16).max >= V:
        return torch.int16
    return torch.int32 if torch.iinfo(torch.int32).max >= V else torch.int64


def embedding_fwd(input: Tensor, weight: Tensor, padding_idx: int | None) -> tuple[Tensor]:
    D = weight.shape[1]
    y = weight.new_empty((*input.shape, D))

    if has_work(y):
        numbers, weight = unit_stride(input.reshape(-1)), as_rows(weight)
        N = numbers.numel()
        config = _embedding_fwd_config(D)
        launch(
            _embedding_fwd_kernel, (cdiv(N, config["BLOCK_N"]) * cdiv(D, config["BLOCK_D"]),),
            numbers, weight, y, weight.stride(0), N, weight.shape[0], D, **config,
        )  # fmt: skip
    return (y,)


def embedding_bwd(
    input: Tensor, weight: Tensor, dy: Tensor, padding_idx: int | None
) -> tuple[Tensor]:
    dweight = dense_like(weight)
    if not has_work(dy):
        return (dweight.zero_(),)

    V, D = weight.shape
    input, dy, compute = unit_stride(input.reshape(-1)), as_rows(dy), accumulator(dy.dtype)
    N, chunks = input.numel(), cdiv(input.numel(), _CHUNK)
    numbers = torch.empty_like(input, dtype=_number_dtype(V))
    launch(
        _embedding_numbers_kernel, (cdiv(N, 256),),
        input, numbers, N, V, -1 if padding_idx is None else padding_idx,
        BLOCK_N=256, num_warps=4,
    )  # fmt: skip
    numbers, order = numbers.sort(stable=True)
    starts = order.new_empty(V + 1)
    launch(
        _embedding_starts_kernel, (cdiv(V + 1, 256),),
        numbers, starts, N, V, N.bit_length(), BLOCK_V=256, num_warps=4,
    )  # fmt: skip

    parts = dy.new_empty((2 * chunks, D), dtype=compute)
    options = {"CHUNK": _CHUNK, "COMPUTE": triton_dtype(compute)}
    config = _embedding_bwd_parts_config(D)
    launch(
        _embedding_bwd_parts_kernel, (2 * chunks * cdiv(D, config["BLOCK_D"]),),
        numbers, order, dy, parts, dy.stride(0), N, V, D, **options, **config,
    )  # fmt: skip
    config = _embedding_bwd_config(D)
    tiles = cdiv(D, config["BLOCK_D"])
    programs, strip = strips_of(V, config["BLOCK_V"], _PER_SM * sm_count(dy.device))
    launch(
        _embedding_bwd_kernel, (programs * tiles,),
        starts, order, dy, dweight, dy.stride(0), V, D, strip, **options, **config,
    )  # fmt: skip
    config = _embedding_bwd_long_config(D)
    launch(
        _embedding_bwd_long_kernel, (chunks * cdiv(D, config["BLOCK_D"]),),
        numbers, parts, dweight, N, V, D, **options, **config,
    )  # fmt: skip
    return (dweight,)


_embedding = custom_vjp(
    "embedding",
    reference=_reference,
    fwd=embedding_fwd,
    bwd=embedding_bwd,
    results="y",
    grads="weight",
    rows="input y",
)


def embedding(input: Tensor, weight: Tensor, *, padding_idx: int | None = None) -> Tensor:
    """Look up rows of a table; the gradient of the table is the same bits twice.

        y = weight[input]

    Args:
        input: (...), any integer dtype. A number outside [0, V) gives a row of NaN, and no
            gradient.
        weight: (V, D), floating point, any strides.
        padding_idx: a number whose row gets no gradient, between −V and V − 1; None: none.

    Returns:
        (..., D), dtype of weight, contiguous.

    Raises:
        TypeError: input is not of an integer dtype, weight is not floating point, padding_idx is
            no number.
        ValueError: weight is no matrix, has no row, or lies on another device; padding_idx is no
            row of it.

    Precision: rows are copied; dweight is summed in float32 (float64 for float64) and rounded once,
        in the order of the input and without atomics.
    Memory: input and weight live until the backward pass, which allocates dweight and, for a while,
        an eighth of a byte per element of y, 24 bytes per number and 8 per row of the table.
    Source: Mikolov et al., "Efficient Estimation of Word Representations in Vector Space", 2013.
    """
    check.integer("embedding", "input", input)
    check.floating("embedding", "weight", weight)
    check.device("embedding", "weight", weight, input, "input")
    if weight.dim() != 2:
        check.fail("embedding", "weight", "be a matrix", f"shape {check.spell(weight.shape)}")
    V = weight.shape[0]
    if V == 0:
        check.fail("embedding", "weight", "have at least one row", "none")
    if padding_idx is not None:
        whole = isinstance(padding_idx, (int, torch.SymInt))
        check.number("embedding", "padding_idx", padding_idx, "be an integer", whole)
        if not -V <= padding_idx < V:
            check.fail("embedding", "padding_idx", f"be between {-V} and {V - 1}", padding_idx)
        padding_idx = padding_idx % V
    return _embedding(input, weight, padding_idx)
