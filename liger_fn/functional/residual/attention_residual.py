"""Attention residuals: each token attends over depth, to what the blocks before have given.

    rstd_l  = 1 / √(mean(v_l²) + ε)               score_l = rstd_l · (v_l · query)
    alpha   = softmax_l(score)                    out     = Σ_l alpha_l · v_l

    dalpha_l = dout · v_l             ds_l = alpha_l · (dalpha_l − Σ_j alpha_j · dalpha_j)
    dv_l     = alpha_l · dout + ds_l · rstd_l · (query − v_l · rstd_l · score_l / D)
    dquery   = Σ_tokens Σ_l ds_l · rstd_l · v_l

The weight of the norm is multiplied into the query, which is one row, beforehand. A token's L · D
numbers are read once and stay in registers, as long as they are 64 KiB at most, with L and D
rounded up to powers of two, and leave room for three rows more: one persistent launch a pass, each
program going over tokens while its next ones are on their way. Of more, and backward of large
tokens of more than eight blocks, a program goes over a token's columns twice, the second time out
of the cache. Memory traffic in bytes per token of a 2-byte v: 2·D·(L + 1) forward, 2·D·(2·L + 1)
backward (read v and dout, write dv). Kept are v, and 8 bytes of each output: score and rstd. The
shares of dquery are added in a fixed order, without atomics.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.direct import launch
from liger_fn.functional.core.kernels import times
from liger_fn.functional.core.launch import (
    HOPPERS_SHARED_MEMORY,
    accumulator,
    as_rows,
    cdiv,
    dense_like,
    has_work,
    in_vectors,
    next_power_of_2,
    shared_memory,
    sm_count,
    tl,
    triton,
    triton_dtype,
    unit_stride,
)
from liger_fn.functional.loss.divergence import batches
from liger_fn.functional.norm.blocks import (
    PER_SM,
    load_block,
    load_features,
    store_block,
)
from liger_fn.functional.norm.rows import strips_of, sums_of_parts


def reference(
    values: Tensor | Sequence[Tensor],
    query: Tensor,
    weight: Tensor | None = None,
    *,
    dim: int = 0,
    eps: float = 1e-6,
) -> Tensor:
    values = _stacked(values, dim)
    return _reference(values.movedim(dim, -2), _weighted(values, query, weight), eps)


def _reference(values: Tensor, query: Tensor, eps: float) -> Tensor:
    """The same of values (..., L, D)."""
    v = values.to(accumulator(values.dtype))
    keys = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    alpha = (keys * query.to(v.dtype)).sum(-1).softmax(-1)
    return (alpha[..., None] * v).sum(-2).to(values.dtype)


def _stacked(values: Tensor | Sequence[Tensor], dim: int) -> Tensor:
    return values if isinstance(values, Tensor) else torch.stack(tuple(values), dim)


def _weighted(values: Tensor, query: Tensor, weight: Tensor | None) -> Tensor:
    compute = accumulator(values.dtype)
    return query if weight is None else query.to(compute) * weight.to(compute)


@triton.jit
def _softmax(score, in_l, axis: tl.constexpr):
    """Give alpha of the depths that there are, and zero of the others."""
    score = tl.where(in_l, score, float("-inf"))
    alpha = tl.exp(score - tl.max(score, axis=axis, keep_dims=True))
    return alpha * (1.0 / tl.sum(alpha, axis=axis, keep_dims=True))


@triton.jit
def _load_token(ptr, row, stride_n, stride_l, inside, depth, D, BLOCK_D: tl.constexpr):
    """Load what all blocks have given to some tokens: a tile (BLOCK_N, BLOCK_L, BLOCK_D)."""
    col = tl.arange(0, BLOCK_D)
    at = row[:, None] * stride_n + depth[None, :].to(tl.int64) * stride_l
    mask = inside[:, :, None] & (col < D)[None, None, :]
    return tl.load(ptr + at[:, :, None] + col[None, None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["N", "L"])
def _attention_residual_fwd_kernel(
    values_ptr, query_ptr, out_ptr, score_ptr, rstd_ptr,
    values_stride_n, values_stride_l, N, L, D,
    EPS: tl.constexpr, COMPUTE: tl.constexpr, IN_VECTORS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    up_to: tl.constexpr = 256 if IN_VECTORS else None
    depth = tl.arange(0, BLOCK_L)
    in_l = (depth < L)[None, :]
    query = load_features(query_ptr, 0, D, COMPUTE, BLOCK_D)[None, :, :]
    # Every thread has every depth: a division is dear, and one is enough.
    of_one = 1.0 / tl.cast(D, COMPUTE)

    for step in tl.range(
        tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0), num_stages=STAGES
    ):
        row = tl.cast(step, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = row < N
        inside = in_n[:, None] & in_l
        v = _load_token(
            values_ptr, row, values_stride_n, values_stride_l, inside, depth, D, BLOCK_D
        ).to(COMPUTE)
        rstd = 1.0 / tl.sqrt(tl.sum(times(v, v), axis=2) * of_one + EPS)
        score = tl.sum(times(v, query), axis=2) * rstd
        alpha = _softmax(score, in_l, 1)
        at = row[:, None] * L + depth[None, :]
        tl.store(score_ptr + at, score, mask=inside)
        tl.store(rstd_ptr + at, rstd, mask=inside)
        out = tl.sum(times(v, alpha[:, :, None], up_to), axis=1)
        store_block(out_ptr, row, D, in_n, 0, D, out, BLOCK_D)


@triton.jit
def _in_threads(t, GROUP: tl.constexpr):
    """Add up neighbours that one thread has loaded together."""
    return tl.sum(tl.reshape(t, (t.shape[0], t.shape[1] // GROUP, GROUP)), axis=2)


@triton.jit(do_not_specialize=["L"])
def _attention_residual_fwd_wide_kernel(
    values_ptr, query_ptr, out_ptr, score_ptr, rstd_ptr,
    values_stride_n, values_stride_l, L, D,
    EPS: tl.constexpr, COMPUTE: tl.constexpr, IN_VECTORS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    up_to: tl.constexpr = 256 if IN_VECTORS else None
    row = tl.program_id(0).to(tl.int64)
    depth = tl.arange(0, BLOCK_L).to(tl.int64)
    in_l = depth < L
    v_ptr = values_ptr + row * values_stride_n

    # Of all depths at once: their loads wait together, and one reduction follows.
    squares = tl.zeros((BLOCK_L, BLOCK_D // GROUP), COMPUTE)
    dots = tl.zeros((BLOCK_L, BLOCK_D // GROUP), COMPUTE)
    for start in range(0, D, BLOCK_D):
        query = load_features(query_ptr, start, D, COMPUTE, BLOCK_D)
        v = load_block(v_ptr, depth, values_stride_l, in_l, start, D, COMPUTE, BLOCK_D)
        # Of more than 16 LLVM aborts where it may fuse both sums (triton 3.6, 2-byte queries).
        squares += _in_threads(times(v, v, up_to if BLOCK_L <= 16 else None), GROUP)
        dots += _in_threads(times(v, query, up_to), GROUP)
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / D + EPS)
    score = tl.sum(dots, axis=1) * rstd
    alpha = _softmax(score, in_l, 0)
    tl.store(score_ptr + row * L + depth, score, mask=in_l)
    tl.store(rstd_ptr + row * L + depth, rstd, mask=in_l)

    # From the end: what was read last is the likeliest to be in the cache.
    for done in range(0, D, BLOCK_D):
        start = (D - 1 - done) // BLOCK_D * BLOCK_D
        v = load_block(v_ptr, depth, values_stride_l, in_l, start, D, COMPUTE, BLOCK_D)
        col = start + tl.arange(0, BLOCK_D)
        out = tl.sum(times(v, alpha[:, None], up_to), axis=0)
        tl.store(out_ptr + row * D + col, out, mask=col < D)


@triton.jit(do_not_specialize=["N", "L"])
def _attention_residual_bwd_kernel(
    values_ptr, query_ptr, score_ptr, rstd_ptr, dout_ptr, dvalues_ptr, dquery_part_ptr,
    values_stride_n, values_stride_l, dout_stride_n, dvalues_stride_n, dvalues_stride_l,
    N, L, D,
    COMPUTE: tl.constexpr, IN_VECTORS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    up_to: tl.constexpr = 256 if IN_VECTORS else None
    depth = tl.arange(0, BLOCK_L)
    in_l = (depth < L)[None, :]
    col = tl.arange(0, BLOCK_D)
    query = load_features(query_ptr, 0, D, COMPUTE, BLOCK_D)[None, :, :]
    dquery = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)

    for step in tl.range(
        tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0), num_stages=STAGES
    ):
        row = tl.cast(step, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = row < N
        inside = in_n[:, None] & in_l
        at = row[:, None] * L + depth[None, :]
        score = tl.load(score_ptr + at, mask=inside, other=0.0)
        rstd = tl.load(rstd_ptr + at, mask=inside, other=0.0)
        v = _load_token(
            values_ptr, row, values_stride_n, values_stride_l, inside, depth, D, BLOCK_D
        ).to(COMPUTE)
        dout = load_block(dout_ptr, row, dout_stride_n, in_n, 0, D, COMPUTE, BLOCK_D)[:, None, :]

        alpha = _softmax(score, in_l, 1)
        dalpha = tl.sum(times(v, dout), axis=2)
        ds = alpha * (dalpha - tl.sum(times(alpha, dalpha), axis=1)[:, None])
        along_query = ds * rstd
        dquery += tl.sum(times(v, along_query[:, :, None], up_to), axis=1)
        if dvalues_ptr is not None:
            along_v = along_query * rstd * score / D
            dv = alpha[:, :, None] * dout + along_query[:, :, None] * query
            dv -= along_v[:, :, None] * v
            to = row[:, None] * dvalues_stride_n + depth[None, :].to(tl.int64) * dvalues_stride_l
            mask = inside[:, :, None] & (col < D)[None, None, :]
            tl.store(dvalues_ptr + to[:, :, None] + col[None, None, :], dv, mask=mask)

    if dquery_part_ptr is not None:
        part = dquery_part_ptr + tl.program_id(0).to(tl.int64) * D
        tl.store(part + col, tl.sum(dquery, axis=0), mask=col < D)


@triton.jit(do_not_specialize=["N", "L", "strip"])
def _attention_residual_bwd_wide_kernel(
    values_ptr, query_ptr, score_ptr, rstd_ptr, dout_ptr, dvalues_ptr, dquery_part_ptr,
    values_stride_n, values_stride_l, dout_stride_n, dvalues_stride_n, dvalues_stride_l,
    N, L, D, strip,
    COMPUTE: tl.constexpr, IN_VECTORS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    up_to: tl.constexpr = 256 if IN_VECTORS else None
    program = tl.program_id(0).to(tl.int64)
    depth = tl.arange(0, BLOCK_L).to(tl.int64)
    in_l = depth < L
    if dquery_part_ptr is not None:
        dquery_part_ptr += program * D
        for start in range(0, D, BLOCK_D):
            col = start + tl.arange(0, BLOCK_D)
            tl.store(dquery_part_ptr + col, tl.zeros((BLOCK_D,), COMPUTE), mask=col < D)

    for step in range(tl.minimum(strip, N - program * strip)):
        # What one thread has written of dquery, another may read.
        tl.debug_barrier()
        row = program * strip + step
        score = tl.load(score_ptr + row * L + depth, mask=in_l, other=0.0)
        rstd = tl.load(rstd_ptr + row * L + depth, mask=in_l, other=0.0)
        v_ptr = values_ptr + row * values_stride_n
        dout_row = dout_ptr + row * dout_stride_n

        to_dout = tl.zeros((BLOCK_L, BLOCK_D // GROUP), COMPUTE)
        for start in range(0, D, BLOCK_D):
            dout = load_features(dout_row, start, D, COMPUTE, BLOCK_D)
            v = load_block(v_ptr, depth, values_stride_l, in_l, start, D, COMPUTE, BLOCK_D)
            to_dout += _in_threads(times(v, dout, up_to), GROUP)
        alpha = _softmax(score, in_l, 0)
        dalpha = tl.sum(to_dout, axis=1)
        ds = alpha * (dalpha - tl.sum(times(alpha, dalpha), axis=0))
        along_query = (ds * rstd)[:, None]
        along_v = (ds * rstd * rstd * score / D)[:, None]

        # From the end: what was read last is the likeliest to be in the cache.
        for done in range(0, D, BLOCK_D):
            start = (D - 1 - done) // BLOCK_D * BLOCK_D
            v = load_block(v_ptr, depth, values_stride_l, in_l, start, D, COMPUTE, BLOCK_D)
            col = start + tl.arange(0, BLOCK_D)
            if dquery_part_ptr is not None:
                share = tl.sum(times(v, along_query, up_to), axis=0)
                share += tl.load(dquery_part_ptr + col, mask=col < D, other=0.0)
                tl.store(dquery_part_ptr + col, share, mask=col < D)
            if dvalues_ptr is not None:
                dv = alpha[:, None] * load_features(dout_row, start, D, COMPUTE, BLOCK_D)
                dv += along_query * load_features(query_ptr, start, D, COMPUTE, BLOCK_D)
                dv -= along_v * v
                dv_ptr = dvalues_ptr + row * dvalues_stride_n
                store_block(dv_ptr, depth, dvalues_stride_l, in_l, start, D, dv, BLOCK_D)


def _attention_residual_config(
    L: int, D: int, itemsize: int, shared: int, backward: bool = False
) -> dict:
    """Up to 64 KiB of values a step, 128 numbers a thread: half of the registers hold them.

    Backward it is half as many small tokens, and no large one of more than eight blocks: beside
    what a thread needs of that many weights, the values would not fit its registers.

    dout, the query and dquery are held as well. While they are at work the values of the next step
    or two are on their way into shared memory, as far as a program has room for them. Of larger
    tokens, which have no `per_sm`, 32 KiB: as many numbers a thread, whose loads all wait at once,
    and all depths of a column in one thread. Of more than 16 blocks half as many numbers a thread,
    and so backward of more than eight on chips before Hopper, which would spill. On an H200 both
    passes of 9x4096x7168 take 0.81 ms so, and with half as many backward 1.23.
    """
    block_l, block_d = next_power_of_2(L), next_power_of_2(D)
    words = (block_l + 3) * block_d * max(1, itemsize // 4)
    token, step = block_l * block_d * itemsize, (block_l + 1) * block_d * itemsize
    # What reductions exchange needs room too.
    room = shared - 16384
    large = words > 22528 or token > 32768
    if (backward and large and block_l > 8) or words > 45056 or token > 65536 or step > room:
        block_d = min(block_d, max(16, 32768 // (itemsize * max(8, block_l))))
        tile = {"BLOCK_L": block_l, "BLOCK_D": block_d, "GROUP": min(block_d, 16 // itemsize)}
        spills = backward and block_l > 8 and shared < HOPPERS_SHARED_MEMORY
        return tile | {"num_warps": 8 if spills or block_l > 16 else 4}
    most = 11264 if backward else 22528
    block_n = 1 if large else min(16, 1 << (max(1, most // words).bit_length() - 1))
    return {
        "BLOCK_N": block_n,
        "BLOCK_L": block_l,
        "BLOCK_D": block_d,
        "STAGES": 3 if 2 * block_n * step <= room else 2,
        "num_warps": 8 if large else 4,
        "per_sm": 1 if large else 2,
    }


def attention_residual_fwd(
    values: Tensor, query: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    *tokens, L, D = values.shape
    out = values.new_empty((*tokens, D))
    score = values.new_empty((*tokens, L), dtype=accumulator(values.dtype))
    rstd = torch.empty_like(score)

    if has_work(out):
        values, query = batches(values), unit_stride(query)
        N, chip = len(values), values.device
        config = _attention_residual_config(L, D, values.element_size(), shared_memory(chip))
        kernel, programs = _attention_residual_fwd_wide_kernel, N
        sizes: tuple[int, ...] = L, D
        if "per_sm" in config:
            kernel, sizes = _attention_residual_fwd_kernel, (N, L, D)
            programs = min(cdiv(N, config["BLOCK_N"]), config.pop("per_sm") * sm_count(chip))
        launch(
            kernel, (programs,),
            values, query, out, score, rstd, *values.stride()[:2], *sizes,
            EPS=eps, COMPUTE=triton_dtype(score.dtype), IN_VECTORS=in_vectors(values, query),
            **config,
        )  # fmt: skip
    return out, score, rstd


def attention_residual_bwd(
    values: Tensor,
    query: Tensor,
    score: Tensor,
    rstd: Tensor,
    dout: Tensor,
    eps: float,
    need_dvalues: bool,
    need_dquery: bool,
) -> tuple[Tensor | None, Tensor | None]:
    *tokens, L, D = values.shape
    # Depth first, as outputs are stacked: the gradient of each is then a dense tensor.
    dvalues = values.new_empty((L, *tokens, D)).movedim(0, -2) if need_dvalues else None
    if not has_work(dout):
        return dvalues, dense_like(query).zero_() if need_dquery else None

    values, dout, query = batches(values), as_rows(dout), unit_stride(query)
    score, rstd = unit_stride(score), unit_stride(rstd)
    N, chip = len(values), values.device
    config = _attention_residual_config(
        L, D, values.element_size(), shared_memory(chip), backward=True
    )
    programs, strip = strips_of(N, 1, PER_SM * sm_count(chip))
    kernel = _attention_residual_bwd_wide_kernel
    sizes: tuple[int, ...] = N, L, D, strip
    if "per_sm" in config:
        kernel, sizes = _attention_residual_bwd_kernel, (N, L, D)
        programs = min(cdiv(N, config["BLOCK_N"]), config.pop("per_sm") * sm_count(chip))
    part = values.new_empty((programs, D), dtype=rstd.dtype) if need_dquery else None
    dvalues_strides = batches(dvalues).stride()[:2] if need_dvalues else (0, 0)
    launch(
        kernel, (programs,),
        values, query, score, rstd, dout, dvalues, part,
        *values.stride()[:2], dout.stride(0), *dvalues_strides, *sizes,
        COMPUTE=triton_dtype(rstd.dtype), IN_VECTORS=in_vectors(values, query, dout), **config,
    )  # fmt: skip
    (dquery,) = sums_of_parts([part], [query if need_dquery else None])
    return dvalues, dquery


_attention_residual = custom_vjp(
    "attention_residual",
    reference=_reference,
    fwd=attention_residual_fwd,
    bwd=attention_residual_bwd,
    results="out",
    residuals="score rstd",
    grads="values query",
    rows="values out score rstd",
    core_dims=2,
)


def attention_residual(
    values: Tensor | Sequence[Tensor],
    query: Tensor,
    weight: Tensor | None = None,
    *,
    dim: int = 0,
    eps: float = 1e-6,
) -> Tensor:
    """Attend over depth: mix the outputs of earlier blocks by a softmax of each token's own.

        out = Σ_l softmax_l(query · (RMSNorm(v_l) · weight)) · v_l

    Args:
        values: (L, ..., D), floating point, any strides: the outputs of L blocks, the embedding
            among them. A list of L tensors (..., D) is stacked, which copies it: who attends to
            the same outputs more than once stacks them first.
        query: (D,), floating point: the pseudo-query of this layer; zeros mix all blocks alike.
        weight: (D,), floating point: the norm's; None: 1.
        dim: the dimension of values that is depth; neither the last, nor the last of a list's
            tensors.
        eps: added to the mean square.

    Returns:
        (..., D), dtype of values, contiguous.

    Raises:
        TypeError: a tensor is not floating point, or eps or dim is no number.
        ValueError: a shape or device does not fit, there are no blocks, or dim is out of range.

    Precision: computed in float32 (float64 for float64 values), as is the sum dquery; every output
        is rounded once.
    Memory: values, query and 8 bytes of each block's output of a token live until the backward
        pass; the gradient of values is dense in the order (L, ..., D).
    Source: Kimi Team, "Attention Residuals", 2026; arXiv:2603.15031.
    """
    op = "attention_residual"
    outputs = tuple(values) if isinstance(values, (list, tuple)) and values else (values,)
    for t in outputs:
        check.floating(op, "values", t)
        check.device(op, "values", t, outputs[0], "values[0]")
        check.shape(op, "values", t, outputs[0].shape, "that of `values[0]`")
    dims = outputs[0].dim() + (outputs[0] is not values)
    if dims < 2:
        got = f"shape {check.spell(outputs[0].shape)}"
        check.fail(op, "values", "have shape (L, ..., D)", got)
    check.number(op, "dim", dim, "be an integer", isinstance(dim, int))
    if not -dims <= dim < dims - 1 or dim == -1:
        check.fail(op, "dim", "name a dimension of `values` but the last", dim)
    values = _stacked(values, dim)
    if values.shape[dim] == 0:
        check.fail(op, "values", "be of at least one block", f"shape {check.spell(values.shape)}")
    for name, t in (("query", query), ("weight", weight)):
        if t is not None:
            check.floating(op, name, t)
            check.shape(op, name, t, values.shape[-1:], "the last size of `values`")
            check.device(op, name, t, values, "values")
    check.number(op, "eps", eps, "be a number", True)
    return _attention_residual(values.movedim(dim, -2), _weighted(values, query, weight), eps)
