"""Attention residuals: each token attends over depth, to what the blocks before have given.

    rstd_l  = 1 / √(mean(v_l²) + ε)               score_l = rstd_l · (v_l · query)
    alpha   = softmax_l(score)                    out     = Σ_l alpha_l · v_l

    dalpha_l = dout · v_l             ds_l = alpha_l · (dalpha_l − Σ_j alpha_j · dalpha_j)
    dv_l     = alpha_l · dout + ds_l · rstd_l · (query − v_l · rstd_l · score_l / D)
    dquery   = Σ_tokens Σ_l ds_l · rstd_l · v_l

The weight of the norm is multiplied into the query, which is one row, beforehand. A program takes a
token, or some, and goes over the L outputs of each twice, the second time out of the cache: as long
as a token's L · D numbers are 128 KiB at most. Memory traffic in bytes per token of a 2-byte v:
2·D·(L + 1) forward, 2·D·(2·L + 1) backward (read v and dout, write dv). Kept are v, and 8 bytes of
each output: alpha and rstd. The shares of dquery are added in a fixed order, without atomics.
"""

from collections.abc import Sequence

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
from liger_fn.functional.loss.divergence import batches
from liger_fn.functional.norm.blocks import (
    PER_SM,
    add_to_part,
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
def _put(t, depth, block, column):
    """Write the column of one depth into a tile (BLOCK_N, BLOCK_L)."""
    return tl.where(depth[None, :] == block, column[:, None], t)


@triton.jit
def _pick(t, depth, block):
    """Give the column of one depth of a tile (BLOCK_N, BLOCK_L), as a column."""
    return tl.sum(tl.where(depth[None, :] == block, t, 0.0), axis=1)[:, None]


@triton.jit(do_not_specialize=["N", "L"])
def _attention_residual_fwd_kernel(
    values_ptr, query_ptr, out_ptr, alpha_ptr, rstd_ptr,
    values_stride_n, values_stride_l, N, L, D,
    EPS: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = row < N
    depth = tl.arange(0, BLOCK_L)
    inside = in_n[:, None] & (depth < L)[None, :]

    score = tl.full((BLOCK_N, BLOCK_L), float("-inf"), COMPUTE)
    rstd = tl.zeros((BLOCK_N, BLOCK_L), COMPUTE)
    v_ptr = values_ptr
    for block in range(L):
        squares = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
        dots = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
        for start in range(0, D, BLOCK_D):
            v = load_block(v_ptr, row, values_stride_n, in_n, start, D, COMPUTE, BLOCK_D)
            squares += v * v
            dots += v * load_features(query_ptr, start, D, COMPUTE, BLOCK_D)
        rstd_l = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / D + EPS)
        rstd = _put(rstd, depth, block, rstd_l)
        score = _put(score, depth, block, tl.sum(dots, axis=1) * rstd_l)
        v_ptr += values_stride_l

    alpha = tl.exp(score - tl.max(score, axis=1)[:, None])
    alpha /= tl.sum(alpha, axis=1)[:, None]
    at = row[:, None] * L + depth[None, :]
    tl.store(alpha_ptr + at, alpha, mask=inside)
    tl.store(rstd_ptr + at, rstd, mask=inside)

    for start in range(0, D, BLOCK_D):
        out = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
        v_ptr = values_ptr
        for block in range(L):
            v = load_block(v_ptr, row, values_stride_n, in_n, start, D, COMPUTE, BLOCK_D)
            out += _pick(alpha, depth, block) * v
            v_ptr += values_stride_l
        store_block(out_ptr, row, D, in_n, start, D, out, BLOCK_D)


@triton.jit(do_not_specialize=["N", "L", "strip"])
def _attention_residual_bwd_kernel(
    values_ptr, query_ptr, alpha_ptr, rstd_ptr, dout_ptr, dvalues_ptr, dquery_part_ptr,
    values_stride_n, values_stride_l, dout_stride_n, dvalues_stride_n, dvalues_stride_l,
    N, L, D, strip,
    COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    depth = tl.arange(0, BLOCK_L)
    if dquery_part_ptr is not None:
        dquery_part_ptr += program * D

    for step in range(0, strip, BLOCK_N):
        in_strip = step + tl.arange(0, BLOCK_N)
        row = program * strip + in_strip
        in_n = (row < N) & (in_strip < strip)
        inside = in_n[:, None] & (depth < L)[None, :]
        at = row[:, None] * L + depth[None, :]
        alpha = tl.load(alpha_ptr + at, mask=inside, other=0.0)
        rstd = tl.load(rstd_ptr + at, mask=inside, other=0.0)

        dalpha = tl.zeros((BLOCK_N, BLOCK_L), COMPUTE)
        dots = tl.zeros((BLOCK_N, BLOCK_L), COMPUTE)
        v_ptr = values_ptr
        for block in range(L):
            to_dout = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
            to_query = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
            for start in range(0, D, BLOCK_D):
                v = load_block(v_ptr, row, values_stride_n, in_n, start, D, COMPUTE, BLOCK_D)
                to_dout += v * load_block(
                    dout_ptr, row, dout_stride_n, in_n, start, D, COMPUTE, BLOCK_D
                )
                to_query += v * load_features(query_ptr, start, D, COMPUTE, BLOCK_D)
            dalpha = _put(dalpha, depth, block, tl.sum(to_dout, axis=1))
            dots = _put(dots, depth, block, tl.sum(to_query, axis=1))
            v_ptr += values_stride_l
        ds = alpha * (dalpha - tl.sum(alpha * dalpha, axis=1)[:, None])
        along_query = ds * rstd
        along_v = along_query * rstd * rstd * dots / D

        for start in range(0, D, BLOCK_D):
            dout = load_block(dout_ptr, row, dout_stride_n, in_n, start, D, COMPUTE, BLOCK_D)
            query = load_features(query_ptr, start, D, COMPUTE, BLOCK_D)
            dquery = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
            v_ptr, dv_ptr = values_ptr, dvalues_ptr
            for block in range(L):
                v = load_block(v_ptr, row, values_stride_n, in_n, start, D, COMPUTE, BLOCK_D)
                slope = _pick(along_query, depth, block)
                dquery += slope * v
                if dvalues_ptr is not None:
                    dv = _pick(alpha, depth, block) * dout + slope * query
                    dv -= _pick(along_v, depth, block) * v
                    store_block(dv_ptr, row, dvalues_stride_n, in_n, start, D, dv, BLOCK_D)
                    dv_ptr += dvalues_stride_l
                v_ptr += values_stride_l
            if dquery_part_ptr is not None:
                add_to_part(dquery_part_ptr, step, start, D, tl.sum(dquery, axis=0), BLOCK_D)
        tl.debug_barrier()


def _attention_residual_config(L: int, D: int, itemsize: int) -> dict:
    """One 16-byte load of 2-byte values a thread, and a warp more for each 8 KiB of a token.

    Of 1024 threads on each of 132 multiprocessors, that makes 34 MB of values at work, which a
    cache of 50 MB still holds when they are read again.
    """
    token = L * D * itemsize
    num_warps = min(16, max(4, next_power_of_2(cdiv(token, 8192))))
    block_d = min(256 * num_warps, next_power_of_2(D))
    fitting = max(1, 8192 * num_warps // token)
    block_n = min(32, 256 * num_warps // block_d, 1 << (fitting.bit_length() - 1))
    return {
        "BLOCK_N": block_n,
        "BLOCK_L": next_power_of_2(L),
        "BLOCK_D": block_d,
        "num_warps": num_warps,
    }


def attention_residual_fwd(
    values: Tensor, query: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    *tokens, L, D = values.shape
    out = values.new_empty((*tokens, D))
    alpha = values.new_empty((*tokens, L), dtype=accumulator(values.dtype))
    rstd = torch.empty_like(alpha)

    if has_work(out):
        values, query = batches(values), unit_stride(query)
        N, config = len(values), _attention_residual_config(L, D, values.element_size())
        launch(
            _attention_residual_fwd_kernel, (cdiv(N, config["BLOCK_N"]),),
            values, query, out, alpha, rstd, *values.stride()[:2], N, L, D,
            EPS=eps, COMPUTE=triton_dtype(alpha.dtype), **config,
        )  # fmt: skip
    return out, alpha, rstd


def attention_residual_bwd(
    values: Tensor,
    query: Tensor,
    alpha: Tensor,
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
    alpha, rstd = unit_stride(alpha), unit_stride(rstd)
    N, config = len(values), _attention_residual_config(L, D, values.element_size())
    programs, strip = strips_of(N, config["BLOCK_N"], 2 * PER_SM * sm_count(values.device))
    part = values.new_empty((programs, D), dtype=rstd.dtype) if need_dquery else None
    dvalues_strides = batches(dvalues).stride()[:2] if need_dvalues else (0, 0)
    launch(
        _attention_residual_bwd_kernel, (programs,),
        values, query, alpha, rstd, dout, dvalues, part,
        *values.stride()[:2], dout.stride(0), *dvalues_strides, N, L, D, strip,
        COMPUTE=triton_dtype(rstd.dtype), **config,
    )  # fmt: skip
    (dquery,) = sums_of_parts([part], [query if need_dquery else None])
    return dvalues, dquery


_attention_residual = custom_vjp(
    "attention_residual",
    reference=_reference,
    fwd=attention_residual_fwd,
    bwd=attention_residual_bwd,
    results="out",
    residuals="alpha rstd",
    grads="values query",
    rows="values out alpha rstd",
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
