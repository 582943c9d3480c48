"""Log-probabilities of K tokens a row under a linear head, C rows of logits at a time.

    z = softcap · tanh(logit_scale · (x · weightᵀ + bias) / softcap) / temperature
    logp_k = z[indices_k] − lse                        lse = log Σ_v exp z_v

    g_v = (Σ_k [v = indices_k] · dlogp_k − exp(z_v − lse) · Σ_k dlogp_k) · ∂z_v/∂logits_v
    dweight = gᵀ · x          dx = g · weight          dbias = Σ_rows g

The sums over a row and the part of g that all classes have are those of loss/logprobs.py; to them
come K elements a row, read and written by the kernels here. What is kept is what
fused_linear_logprobs keeps, with K numbers a row for one.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.direct import launch
from liger_fn.functional.core.launch import (
    accumulator,
    has_work,
    next_power_of_2,
    tl,
    triton,
    triton_dtype,
    unit_stride,
)
from liger_fn.functional.linear_loss.chunks import (
    Limits,
    check_head,
    dtypes_as_given,
    logits_of,
    pull_back,
    width_of,
)
from liger_fn.functional.linear_loss.products import AllRows
from liger_fn.functional.loss.cross_entropy import scaled_and_capped, times_slope
from liger_fn.functional.loss.logprobs import (
    check_options,
    launch_bwd,
    launch_fwd,
    new_rows,
    tempered,
)


def reference(
    weight: Tensor,
    x: Tensor,
    indices: Tensor,
    chunk_size: int | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    scale, cap = tempered(logit_scale, softcap, temperature)
    return reference_of_rows(weight, x, indices, bias, chunk_size, cap, scale, ignore_index)


def reference_of_rows(
    weight: Tensor,
    x: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    chunk_size: int | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> Tensor:
    logits, V = F.linear(x, weight, bias), weight.shape[0]
    z = logits.to(accumulator(logits.dtype)) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    indices = indices.long()
    ignored = indices == ignore_index
    unknown = ~ignored & ((indices < 0) | (indices >= V))
    logp = z.log_softmax(-1).gather(-1, indices.clamp(0, V - 1))
    # As a factor NaN reaches the gradient too.
    return torch.where(ignored, 0.0, logp * torch.where(unknown, math.nan, 1.0))


@triton.jit
def _fused_linear_selected_logprobs_fwd_kernel(
    logits_ptr, indices_ptr, highest_ptr, log_sum_ptr, logp_ptr, stride_n, K, V, ignore_index,
    CAP: tl.constexpr, SCALE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    v = tl.load(indices_ptr + row * K + k, mask=k < K, other=0).to(tl.int64)
    live = v != ignore_index
    known = (v >= 0) & (v < V)
    x = tl.load(logits_ptr + row * stride_n + v, mask=known & (k < K), other=0.0).to(COMPUTE)

    z = scaled_and_capped(x, SCALE, CAP)
    logp = (z - tl.load(highest_ptr + row)) - tl.load(log_sum_ptr + row)

    logp = tl.where(live, tl.where(known, logp, float("nan")), 0.0)
    tl.store(logp_ptr + row * K + k, logp, mask=k < K)


@triton.jit
def _fused_linear_selected_logprobs_bwd_kernel(
    indices_ptr, logp_ptr, dlogp_ptr, highest_ptr, log_sum_ptr, dlogits_ptr,
    stride_n, K, V, ignore_index,
    CAP: tl.constexpr, SCALE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the selected elements of a row anew: their own part and the part of all classes."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    v = tl.load(indices_ptr + row * K + k, mask=k < K, other=0).to(tl.int64)
    chosen = (k < K) & (v != ignore_index) & (v >= 0) & (v < V)
    logp = tl.load(logp_ptr + row * K + k, mask=k < K, other=0.0)
    # One token may be selected more than once: all its places write one number, the whole.
    total = tl.zeros((BLOCK_K,), COMPUTE)
    pull = tl.zeros((), COMPUTE)
    for j in range(K):
        v_j = tl.load(indices_ptr + row * K + j).to(tl.int64)
        d_j = tl.load(dlogp_ptr + row * K + j).to(COMPUTE)
        d_j = tl.where(v_j != ignore_index, d_j, 0.0)
        # A token outside the vocabulary makes the row NaN.
        d_j = tl.where((v_j == ignore_index) | ((v_j >= 0) & (v_j < V)), d_j, float("nan"))
        pull += d_j
        total += tl.where(v == v_j, d_j, 0.0)

    z = logp + (tl.load(highest_ptr + row) + tl.load(log_sum_ptr + row))
    g = times_slope(total - tl.exp(logp) * pull, z, SCALE, CAP)

    tl.store(dlogits_ptr + row * stride_n + v, g, mask=chosen)


def _options(K: int, softcap: float | None, logit_scale: float, dtype: torch.dtype) -> dict:
    """One block holds all K: a few hundred tokens at most."""
    return {
        "CAP": softcap,
        "SCALE": logit_scale,
        "COMPUTE": triton_dtype(dtype),
        "BLOCK_K": next_power_of_2(K),
        "num_warps": 1 if K <= 128 else 4,
    }


def fused_linear_selected_logprobs_fwd(
    weight: Tensor,
    x: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    chunk_size: int | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    (V, H), K, rows_shape = weight.shape, indices.shape[-1], indices.shape[:-1]
    logp = x.new_empty(indices.shape, dtype=accumulator(x.dtype))
    first, lse, _, _, highest, log_sum = new_rows(x, rows_shape, False, False)

    if has_work(logp):
        N = logp.numel() // K
        x, flat = x.reshape(N, H), unit_stride(indices.reshape(N, K))
        # The sums of a row come with the log-probability of some token: here of the first class.
        some = torch.zeros((N,), dtype=torch.int32, device=x.device)
        each = tuple(t.view(-1) for t in (first, lse, highest, log_sum))
        chunks = Limits(chunk_size, None).plan(N, weight)
        buffer = x.new_empty((chunks.rows, width_of(V)))
        with dtypes_as_given(x.device):
            for rows, logits in logits_of(weight, bias, AllRows(x), chunks.slices(N), buffer):
                one, of_all, top, log = (t[rows] for t in each)
                launch_fwd(
                    logits, some[rows], softcap, logit_scale, -1,
                    (one, of_all, None, None, top, log), buffer.shape[1],
                )  # fmt: skip
                launch(
                    _fused_linear_selected_logprobs_fwd_kernel, (len(logits),),
                    logits, flat[rows], top, log, logp.view(N, K)[rows],
                    logits.stride(0), K, V, ignore_index,
                    **_options(K, softcap, logit_scale, logp.dtype),
                )  # fmt: skip
    return logp, highest, log_sum


def fused_linear_selected_logprobs_bwd(
    weight: Tensor,
    x: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    chunk_size: int | None,
    logp: Tensor,
    highest: Tensor,
    log_sum: Tensor,
    dlogp: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    need_dweight: bool,
    need_dx: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    (V, H), K, acc = weight.shape, indices.shape[-1], logp.dtype
    N, limits = logp.numel() // K, Limits(chunk_size, None)
    # The sum over no rows is 0; other sums are written before they are read.
    make = x.new_empty if has_work(dlogp) else x.new_zeros
    held = x.dtype if limits.two_chunks(N, weight) else acc
    dweight = make(weight.shape, dtype=held) if need_dweight else None
    dx = make(x.shape) if need_dx else None
    dbias = make((V,), dtype=acc) if need_dbias else None

    if has_work(dlogp):
        head = AllRows(x.reshape(N, H))
        flat, logp, dlogp = (unit_stride(t.reshape(N, K)) for t in (indices, logp, dlogp))
        highest, log_sum = (unit_stride(t.reshape(-1)) for t in (highest, log_sum))
        known = (flat >= 0) & (flat < V)
        given = torch.where(known, dlogp, math.nan).masked_fill(flat.long() == ignore_index, 0.0)
        dlse = -given.sum(-1)
        some = torch.zeros((N,), dtype=torch.int32, device=x.device)
        each_dx = None if dx is None else dx.view(N, H)
        chunks = Limits(chunk_size, None).plan(N, weight, dweight)
        buffer = x.new_empty((chunks.rows, width_of(V)))
        with dtypes_as_given(x.device):
            for rows, logits in logits_of(weight, bias, head, chunks.slices(N), buffer):
                top, log = highest[rows], log_sum[rows]
                launch_bwd(
                    logits, some[rows], softcap, logit_scale, -1,
                    (top, log, None), (None, dlse[rows], None), logits, buffer.shape[1],
                )  # fmt: skip
                launch(
                    _fused_linear_selected_logprobs_bwd_kernel, (len(logits),),
                    flat[rows], logp[rows], dlogp[rows], top, log, logits,
                    logits.stride(0), K, V, ignore_index,
                    **_options(K, softcap, logit_scale, acc),
                )  # fmt: skip
                pull_back(logits, weight, head, rows, dweight, each_dx, dbias)
    return (
        None if dweight is None else dweight.to(x.dtype),
        dx,
        None if dbias is None else dbias.to(x.dtype),
    )


_fused_linear_selected_logprobs = custom_vjp(
    "fused_linear_selected_logprobs",
    reference=reference_of_rows,
    fwd=fused_linear_selected_logprobs_fwd,
    bwd=fused_linear_selected_logprobs_bwd,
    results="logp",
    residuals="highest log_sum",
    grads="weight x bias",
    autocast="weight x bias",
)


def fused_linear_selected_logprobs(
    weight: Tensor,
    x: Tensor,
    indices: Tensor,
    chunk_size: int | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Compute the log-probabilities of K tokens a row under a linear head without its logits.

        logp[..., k] = log_softmax(x · weightᵀ + bias)[..., indices[..., k]]

    Distillation from a teacher that gives its likeliest tokens, or samples, is one step more:

        logp = fused_linear_selected_logprobs(weight, x, teacher_indices)
        loss = preference.distillation_loss(logp, teacher_logps, mask, support="tail")

    Args:
        weight: (V, H), floating point: the head, as torch.nn.Linear holds it.
        x: (..., H), the dtype of weight (under autocast all are cast as F.linear casts them).
        indices: (..., K), any integer dtype: the tokens, of which some may be equal. One outside
            [0, V) that is not ignore_index makes its logp and the gradients of its row NaN.
        chunk_size: rows of logits held at once; None: as `fused_linear_cross_entropy` chooses.
            Results agree for every size up to rounding.
        bias: (V,), the dtype of weight; None: no bias.
        temperature, logit_scale, softcap: as in `logprobs`; all apply after the bias.
        ignore_index: places that hold it have logp 0 and no gradient.

    Returns:
        (..., K), float32 (float64 for float64 x).

    Raises:
        TypeError: weight, x or bias is not floating point, their dtypes differ, indices are not of
            an integer dtype, an option is no number.
        ValueError: a shape or device does not fit, an option is out of its range.

    Precision: that of `fused_linear_logprobs`.
    Memory: one buffer of chunk_size · V logits while a pass runs. weight, x, indices, logp and 8
        bytes a row live until the backward pass, which makes the logits again. The reference, which
        is what runs on a CPU, holds all logits.
    Source: Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs",
        2025.
    """
    op = "fused_linear_selected_logprobs"
    check.integer(op, "indices", indices)
    check.at_least_1d(op, "indices", indices)
    if indices.shape[-1] == 0:
        check.fail(op, "indices", "name at least one token a row", "a last size of 0")
    check.floating(op, "x", x)
    check.at_least_1d(op, "x", x)
    rows = x.shape[:-1]
    because = "that of `x` but for its last size"
    check.shape(op, "indices", indices, (*rows, indices.shape[-1]), because)
    check.device(op, "indices", indices, x, "x")
    check_head(op, weight, x, indices.select(-1, 0), bias, chunk_size)
    check_options(op, temperature, logit_scale, softcap, ignore_index)
    scale, cap = tempered(logit_scale, softcap, temperature)
    return _fused_linear_selected_logprobs(
        weight, x, indices, bias, chunk_size, cap, scale, ignore_index
    )
