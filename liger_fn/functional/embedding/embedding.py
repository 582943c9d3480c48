"""Rows of a table by their numbers.

    y_n       = weight[t_n]
    dweight_v = Σ over {n: t_n = v} of dy_n

Forward a row is copied: 4 bytes per element of a 2-byte y. Backward the numbers are sorted, so that
the rows of dy that belong to one row of the table are neighbours in that order; they are added in
float32, in the order of n, and written once: 2 bytes per element of dy and of dweight, no atomics,
the same bits twice. That order is cut into chunks, for some rows (of padding, say) come thousands
of times: a program adds what one number has in one chunk, and a second launch adds the parts of the
numbers that reach beyond theirs. The table is named by the backward pass for its shape and dtype;
it is not read.
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
    has_work,
    next_power_of_2,
    tl,
    triton,
    triton_dtype,
    unit_stride,
)


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


@triton.jit
def _embedding_bwd_kernel(
    numbers_ptr, order_ptr, dy_ptr, dweight_ptr, parts_ptr, dy_stride_n, N, V, D,
    CHUNK: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(D, BLOCK_D)
    first = (tl.program_id(0) // tiles).to(tl.int64)
    col = (tl.program_id(0) % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    v = tl.load(numbers_ptr + first)
    before = tl.load(numbers_ptr + first - 1, mask=first > 0, other=-1)
    live = ((before != v) | (first % CHUNK == 0)) & (v >= 0) & (v < V)
    last = tl.minimum((first // CHUNK + 1) * CHUNK, N)

    sums = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    start = first
    more = live
    while more:
        position = start + tl.arange(0, BLOCK_N)
        number = tl.load(numbers_ptr + position, mask=position < last, other=-1)
        row = tl.load(order_ptr + position, mask=number == v, other=0)
        inside = (number == v)[:, None] & (col < D)[None, :]
        dy = tl.load(dy_ptr + row[:, None] * dy_stride_n + col[None, :], mask=inside, other=0.0)
        sums += dy.to(COMPUTE)
        start += BLOCK_N
        more = tl.sum((number == v).to(tl.int32), axis=0) == BLOCK_N

    total = tl.sum(sums, axis=0)
    # Only the last number of a chunk can go on in the next one.
    at_end = tl.load(numbers_ptr + last - 1)
    after = tl.load(numbers_ptr + last, mask=last < N, other=-1)
    whole = (before != v) & ((at_end != v) | (after != v))
    apart = (before == v) | ((at_end == v) & (after == v))
    # A chunk has two parts at most: of a number that came into it, and of one that goes on.
    part = 2 * (first // CHUNK) + (first % CHUNK != 0).to(tl.int64)
    tl.store(dweight_ptr + v * D + col, total, mask=col < tl.where(live & whole, D, 0))
    tl.store(parts_ptr + part * D + col, total, mask=col < tl.where(live & apart, D, 0))


@triton.jit
def _embedding_bwd_parts_kernel(
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

    part = 2 * chunk + (at_first != v).to(tl.int64)
    written = col < tl.where(live, D, 0)
    total = tl.load(parts_ptr + part * D + col, mask=written, other=0.0)
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
    tl.store(dweight_ptr + v * D + col, total, mask=written)


def _embedding_fwd_config(D: int) -> dict:
    """2048 elements for four warps: a thread has two 16-byte loads in flight."""
    block_d = min(2048, next_power_of_2(D))
    return {"BLOCK_D": block_d, "BLOCK_N": 2048 // block_d, "num_warps": 4}


# Positions whose sum is one program's work.
_CHUNK = 64


def _embedding_bwd_config(D: int) -> dict:
    """Four rows at a time, for most numbers come no more often."""
    block_d = min(512, next_power_of_2(D))
    return {"BLOCK_D": block_d, "BLOCK_N": 4, "num_warps": max(1, block_d // 128)}


def _embedding_bwd_parts_config(D: int) -> dict:
    block_d = min(512, next_power_of_2(D))
    return {"BLOCK_D": block_d, "BLOCK_C": 4, "num_warps": max(1, block_d // 128)}


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
    # Most rows of a table get no gradient at all.
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format)

    if has_work(dy):
        V, D = weight.shape
        numbers = input.reshape(-1).long()
        if padding_idx is not None:
            # Beyond the table it belongs to no row.
            numbers = numbers.masked_fill(numbers == padding_idx, V)
        numbers, order = numbers.sort(stable=True)
        N, chunks = numbers.numel(), cdiv(numbers.numel(), _CHUNK)
        dy, compute = as_rows(dy), accumulator(dy.dtype)
        parts = dy.new_empty((2 * chunks, D), dtype=compute)

        options = {"CHUNK": _CHUNK, "COMPUTE": triton_dtype(compute)}
        config = _embedding_bwd_config(D)
        launch(
            _embedding_bwd_kernel, (N * cdiv(D, config["BLOCK_D"]),),
            numbers, order, dy, dweight, parts, dy.stride(0), N, V, D, **options, **config,
        )  # fmt: skip
        config = _embedding_bwd_parts_config(D)
        launch(
            _embedding_bwd_parts_kernel, (chunks * cdiv(D, config["BLOCK_D"]),),
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
        an eighth of a byte per element of y and 24 bytes per number.
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
