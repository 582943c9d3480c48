"""What losses of two heads, a student's and a teacher's, share: chunks of both logits, one kernel.

    z = x · weightᵀ + bias                     log q = log_softmax(z / temperature)
    log p = log_softmax((teacher_x · teacher_weightᵀ + teacher_bias) / temperature)

    loss = Σ_v term(log q_v, log p_v) + hard_weight · cross_entropy(z, labels)

    slope_v = ∂term/∂log q_v                   pull = Σ_v slope_v
    g_v     = (slope_v − q_v · pull) / temperature + hard_weight · (softmax(z)_v − [v = label])
    dweight = gᵀ · x                           dx   = g · weight         dbias = Σ_rows g

The terms are those of loss/divergence.py; 1 − cosine of the angle between z and the teacher's
logits y is a loss of its own, with the gradient (cos/|z| · z − y/|y|) / |z|. `z` and `g` share one
buffer, the teacher's logits have another, and both together keep to the budget of memory: 4·N·H·V
operations for the loss of two heads of one width, 4·N·H·V for the gradients. The kernel goes over a
row of both logits two or three times: for their sums of exponentials (or lengths), for `pull` and
the loss, for `g`. Of KL(p ‖ q) `pull` is −1, and the last two are one, as they are of the cosine.

A weighted sum has one upstream number, so its gradients are made in the forward pass, as those of
cross_entropy.py are, and the backward pass multiplies them by it. Losses by row have an upstream
number each: their backward pass makes both logits again. The teacher gets no gradient.
"""

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.direct import launch
from liger_fn.functional.core.kernels import columns_of, exp_of, with_block
from liger_fn.functional.core.launch import (
    accumulator,
    has_work,
    next_power_of_2,
    tl,
    triton,
    triton_dtype,
    unit_stride,
)
from liger_fn.functional.core.rules import dtype_inside
from liger_fn.functional.linear_loss.chunks import (
    Limits,
    check_factors,
    dtypes_as_given,
    logits_of,
    pull_back,
    width_of,
)
from liger_fn.functional.linear_loss.cross_entropy import (
    check_items,
    items_of,
    narrowest,
    times_scalar,
    unit_of,
)
from liger_fn.functional.linear_loss.products import AllRows, Counted, suits
from liger_fn.functional.loss import divergence
from liger_fn.functional.loss.cross_entropy import REDUCTIONS
from liger_fn.functional.loss.cross_entropy import reference_rows as reference_cross_entropy
from liger_fn.functional.loss.divergence import compute_dtype, term_of

# A vector shorter than this counts as so long, as in torch's cosine_similarity.
SHORTEST = 1e-8


class Head(NamedTuple):
    """A linear head and its inputs, (N, H)."""

    weight: Tensor
    x: Tensor
    bias: Tensor | None


class Terms(NamedTuple):
    """What is summed; `kind` is one of loss/divergence.py's that take log probabilities, or tvd, or
    cosine, which takes the logits themselves.
    """

    kind: str
    beta: float
    temperature: float
    hard_weight: float
    ignore_index: int


def reference_of_rows(
    weight: Tensor,
    x: Tensor,
    teacher_weight: Tensor,
    teacher_x: Tensor,
    labels: Tensor | None,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    chunk_size: int | None,
    memory_budget: int | None,
    wide: bool,
    kind: str,
    beta: float,
    temperature: float,
    hard_weight: float,
    ignore_index: int,
) -> Tensor:
    compute = compute_dtype(x, teacher_x)
    z = F.linear(x, weight, bias).to(compute)
    teacher_z = F.linear(teacher_x, teacher_weight, teacher_bias).detach().to(compute)
    if labels is not None:
        # Before the softmax, so that NaN in an ignored row reaches no gradient.
        ignored = (labels.long() == ignore_index)[..., None]
        z, teacher_z = z.masked_fill(ignored, 0.0), teacher_z.masked_fill(ignored, 0.0)
    if kind == "cosine":
        loss = 1.0 - F.cosine_similarity(z, teacher_z, -1, eps=SHORTEST)
        loss = loss if labels is None else loss.masked_fill(ignored[..., 0], 0.0)
    else:
        softmax = torch.softmax if kind == "tvd" else torch.log_softmax
        q, p = softmax(z / temperature, -1), softmax(teacher_z / temperature, -1)
        loss = divergence.reference_rows(q, p, labels, kind, beta, ignore_index)
    if labels is not None and hard_weight:
        hard = reference_cross_entropy(z, labels, None, ignore_index, 0.0, 0.0, None, 1.0)
        loss = loss + hard_weight * hard
    return loss


def reference_of_sum(row_weight: Tensor | None, **arguments: Any) -> Tensor:
    loss = reference_of_rows(**arguments)
    return loss.sum() if row_weight is None else (loss * row_weight.to(loss.dtype)).sum()


@triton.jit
def _of_lanes(top, sums, live):
    """The maximum of a row, and the logarithm of its sum of exponentials relative to that."""
    highest = tl.where(live, tl.max(top, axis=0), 0.0)
    total = tl.sum(sums * exp_of(top - highest), axis=0)
    return highest, tl.log(tl.where(live, total, 1.0))


@triton.jit
def _term_of_logs(log_q, log_p, KIND: tl.constexpr, BETA: tl.constexpr):
    """Give a term and its slope in log q, but for multiples of q, which no softmax lets through."""
    if KIND == "tvd":
        q = exp_of(log_q)
        term, slope, _ = term_of(q, exp_of(log_p), KIND, BETA)
        slope *= q
    else:
        term, slope, _ = term_of(log_q, log_p, KIND, BETA)
        if KIND == "reverse_kl":
            slope = term
    return term, slope


@triton.jit
def _fused_linear_divergence_kernel(
    logits_ptr, teacher_ptr, labels_ptr, dloss_ptr, loss_ptr,
    stride_n, dloss_stride_n, V, width, ignore_index,
    KIND: tl.constexpr, BETA: tl.constexpr, SCALE: tl.constexpr, HARD: tl.constexpr,
    HAS_LABELS: tl.constexpr, HAS_DLOSS: tl.constexpr,
    NEED_LOSS: tl.constexpr, NEED_DLOGITS: tl.constexpr,
    UNIT: tl.constexpr, LOWEST: tl.constexpr, SHORTEST: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_n
    teacher_ptr += row * stride_n
    live = tl.full((), True, tl.int1)
    known = live
    if HAS_LABELS:
        label = tl.load(labels_ptr + row).to(tl.int64)
        live = label != ignore_index
        if HARD != 0.0:
            known = (label >= 0) & (label < V)
            t = tl.where(known, label, 0).to(tl.int32)
            # Read before the reductions, where warps wait for each other: a warp that runs ahead
            # writes the gradient over the logits.
            z_t = tl.load(logits_ptr + t).to(COMPUTE)
    weight = tl.full((), 1.0, COMPUTE)
    if HAS_DLOSS:
        weight = tl.load(dloss_ptr + row * dloss_stride_n).to(COMPUTE)
    columns = tl.where(live, V, 0)

    top_q = tl.full((BLOCK_V // 8,), LOWEST, COMPUTE)
    top_p = tl.full((BLOCK_V // 8,), LOWEST, COMPUTE)
    top_z = tl.full((BLOCK_V // 8,), LOWEST, COMPUTE)
    sums_q = tl.zeros((BLOCK_V // 8,), COMPUTE)
    sums_p = tl.zeros((BLOCK_V // 8,), COMPUTE)
    sums_z = tl.zeros((BLOCK_V // 8,), COMPUTE)
    zz = tl.zeros((BLOCK_V // 8,), COMPUTE)
    yy = tl.zeros((BLOCK_V // 8,), COMPUTE)
    zy = tl.zeros((BLOCK_V // 8,), COMPUTE)
    for start in range(0, columns, BLOCK_V):
        col = start + columns_of(BLOCK_V)
        z = tl.load(
            logits_ptr + col, mask=col < width, other=0.0, eviction_policy="evict_last"
        ).to(COMPUTE)  # fmt: skip
        y = tl.load(
            teacher_ptr + col, mask=col < width, other=0.0, eviction_policy="evict_last"
        ).to(COMPUTE)  # fmt: skip
        if KIND == "cosine":
            z = tl.where(col < V, z, 0.0)
            y = tl.where(col < V, y, 0.0)
            zz += tl.sum(z * z, axis=1)
            yy += tl.sum(y * y, axis=1)
            zy += tl.sum(z * y, axis=1)
        z = tl.where(col < V, z, float("-inf"))
        y = tl.where(col < V, y, float("-inf"))
        top_q, sums_q = with_block(top_q, sums_q, z * SCALE)
        top_p, sums_p = with_block(top_p, sums_p, y * SCALE)
        if HARD != 0.0 and SCALE != 1.0:
            top_z, sums_z = with_block(top_z, sums_z, z)
    highest_q, log_sum_q = _of_lanes(top_q, sums_q, live)
    highest_p, log_sum_p = _of_lanes(top_p, sums_p, live)
    highest_z, log_sum_z = highest_q, log_sum_q
    if HARD != 0.0 and SCALE != 1.0:
        highest_z, log_sum_z = _of_lanes(top_z, sums_z, live)

    terms = tl.zeros((BLOCK_V // 8,), COMPUTE)
    pull = tl.full((), -1.0, COMPUTE)
    if KIND == "cosine":
        length_z = tl.maximum(tl.sqrt(tl.sum(zz, axis=0)), SHORTEST)
        length_y = tl.maximum(tl.sqrt(tl.sum(yy, axis=0)), SHORTEST)
        cosine = tl.sum(zy, axis=0) / length_z / length_y
    elif KIND != "kl_log" or not NEED_DLOGITS:
        slopes = tl.zeros((BLOCK_V // 8,), COMPUTE)
        last_block = (columns - 1) // BLOCK_V * BLOCK_V
        for step in range(0, columns, BLOCK_V):
            # Backwards: what was read last is still in the caches.
            col = last_block - step + columns_of(BLOCK_V)
            z = tl.load(logits_ptr + col, mask=col < width, other=0.0).to(COMPUTE)
            y = tl.load(teacher_ptr + col, mask=col < width, other=0.0).to(COMPUTE)
            log_q = (z * SCALE - highest_q) - log_sum_q
            log_p = (y * SCALE - highest_p) - log_sum_p
            term, slope = _term_of_logs(log_q, log_p, KIND, BETA)
            terms += tl.sum(tl.where(col < V, term, 0.0), axis=1)
            slopes += tl.sum(tl.where(col < V, slope, 0.0), axis=1)
        if KIND != "kl_log":
            pull = tl.sum(slopes, axis=0)

    if NEED_DLOGITS:
        # A row that does not count is not read, and multiplied by zero.
        g = tl.where(live, tl.where(known, UNIT * weight, float("nan")), 0.0)
        readable = tl.where(live, width, 0)
        for start in range(0, width, BLOCK_V):
            col = start + columns_of(BLOCK_V)
            z = tl.load(
                logits_ptr + col, mask=col < readable, other=0.0, eviction_policy="evict_first"
            ).to(COMPUTE)  # fmt: skip
            y = tl.load(
                teacher_ptr + col, mask=col < readable, other=0.0, eviction_policy="evict_first"
            ).to(COMPUTE)  # fmt: skip
            if KIND == "cosine":
                dz = (z / length_z * cosine - y / length_y) / length_z
            else:
                log_q = (z * SCALE - highest_q) - log_sum_q
                log_p = (y * SCALE - highest_p) - log_sum_p
                term, slope = _term_of_logs(log_q, log_p, KIND, BETA)
                if KIND == "kl_log":
                    terms += tl.sum(tl.where(live & (col < V), term, 0.0), axis=1)
                dz = (slope - exp_of(log_q) * pull) * SCALE
            if HARD != 0.0:
                chosen = exp_of((z - highest_z) - log_sum_z)
                dz += HARD * tl.where(col == t, chosen - 1.0, chosen)
            dz = tl.where(live, g * dz, 0.0)
            tl.store(logits_ptr + col, dz, mask=col < width, eviction_policy="evict_first")

    if NEED_LOSS:
        loss = tl.sum(terms, axis=0)
        if KIND == "cosine":
            loss = 1.0 - cosine
        if HARD != 0.0:
            hard = ((highest_z - z_t) + log_sum_z) * HARD
            loss += tl.where(known, hard, float("nan"))
        tl.store(loss_ptr + row, tl.where(live, weight * loss, 0.0))


def _fused_linear_divergence_config(V: int) -> dict:
    """16 elements of both logits a thread, in four 16-byte loads, as many as the registers allow.

    Wide blocks keep the rows in flight few, so that later reads find them in the caches.
    """
    block_v = max(8, min(next_power_of_2(V), 16384))
    return {"BLOCK_V": block_v, "num_warps": max(1, block_v // 512)}


def launch_rows(
    logits: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    terms: Terms,
    *,
    width: int,
    loss: Tensor | None = None,
    dloss: Tensor | None = None,
    need_dlogits: bool = False,
    unit: float = 1.0,
) -> None:
    """Write loss if it is given, and the gradient over the logits if it is wanted.

    The gradient is that of unit · Σ_rows dloss · loss, with dloss 1 if it is not given. Given with
    loss, dloss is the weight of the row in a sum, and loss is the row's term of that sum. Rows of
    both logits have a stride of `width`, and all of that is read and written.
    """
    compute = compute_dtype(logits, teacher)
    launch(
        _fused_linear_divergence_kernel, (logits.shape[0],),
        logits, teacher, labels, dloss, loss,
        width, 0 if dloss is None else dloss.stride(0), logits.shape[1], width, terms.ignore_index,
        KIND=terms.kind, BETA=terms.beta, SCALE=1.0 / terms.temperature, HARD=terms.hard_weight,
        HAS_LABELS=labels is not None, HAS_DLOSS=dloss is not None,
        NEED_LOSS=loss is not None, NEED_DLOGITS=need_dlogits,
        UNIT=unit, LOWEST=torch.finfo(compute).min / 2, SHORTEST=SHORTEST,
        COMPUTE=triton_dtype(compute),
        **_fused_linear_divergence_config(logits.shape[1]),
    )  # fmt: skip


def _each_chunk(
    student: Head,
    teacher: Head,
    labels: Tensor | None,
    limits: Limits,
    terms: Terms,
    *,
    loss: Tensor | None = None,
    dloss: Tensor | None = None,
    dweight: Tensor | None = None,
    dx: Tensor | None = None,
    dbias: Tensor | None = None,
    unit: float = 1.0,
) -> None:
    """Write what is given: loss, its `unit` gradients, for dloss of each row."""
    weight, x, bias = student
    (V, H), N = weight.shape, prod(x.shape[:-1])
    x = x.reshape(N, H)
    teacher_x = teacher.x.reshape(N, teacher.x.shape[-1])
    labels = None if labels is None else unit_stride(labels.reshape(-1))
    loss, dloss = (None if t is None else t.reshape(-1) for t in (loss, dloss))
    head, teacher_head = AllRows(x, labels), AllRows(teacher_x)
    if labels is not None and suits(weight, x) and suits(teacher.weight, teacher_x):
        head = Counted(x, labels, terms.ignore_index)
        teacher_head = head.beside(teacher_x)
    dloss = None if dloss is None else head.in_order(dloss)
    (each_loss,) = head.new_numbers(loss)
    dx = None if dx is None else dx.view(x.shape)
    wanted = any(d is not None for d in (dweight, dx, dbias))

    chunks, width = limits.plan(N, weight, dweight), width_of(V)
    buffer, teacher_buffer = (t.new_empty((chunks.rows, width)) for t in (x, teacher_x))
    with dtypes_as_given(x.device):
        both = zip(
            logits_of(weight, bias, head, chunks.slices(N), buffer),
            logits_of(teacher.weight, teacher.bias, teacher_head, chunks.slices(N), teacher_buffer),
            strict=True,
        )
        for (rows, logits), (_, teacher_logits) in both:
            launch_rows(
                logits, teacher_logits, None if labels is None else head.y[rows], terms,
                width=width, loss=None if each_loss is None else each_loss[rows],
                dloss=None if dloss is None else dloss[rows], need_dlogits=wanted, unit=unit,
            )  # fmt: skip
            pull_back(logits, weight, head, rows, dweight, dx, dbias)
    head.put_back((each_loss,), (loss,))


def fused_linear_divergence_fwd(
    weight: Tensor,
    x: Tensor,
    teacher_weight: Tensor,
    teacher_x: Tensor,
    labels: Tensor | None,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    row_weight: Tensor | None,
    chunk_size: int | None,
    memory_budget: int | None,
    wide: bool,
    kind: str,
    beta: float,
    temperature: float,
    hard_weight: float,
    ignore_index: int,
    need_dweight: bool,
    need_dx: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    acc, compute = accumulator(x.dtype), compute_dtype(x, teacher_x)
    held = acc if wide else narrowest(x.dtype)
    loss = x.new_empty(x.shape[:-1], dtype=compute)
    # The sum over no rows is 0; other sums are written before they are read.
    make = x.new_empty if has_work(loss) else x.new_zeros
    unit_dweight = make(weight.shape, dtype=held) if need_dweight else None
    unit_dx = make(x.shape, dtype=narrowest(x.dtype)) if need_dx else None
    unit_dbias = make(weight.shape[:1], dtype=acc) if need_dbias else None

    if has_work(loss):
        _each_chunk(
            Head(weight, x, bias),
            Head(teacher_weight, teacher_x, teacher_bias),
            labels,
            Limits(chunk_size, memory_budget, teacher_x.itemsize),
            Terms(kind, beta, temperature, hard_weight, ignore_index),
            loss=loss,
            dloss=row_weight,
            dweight=unit_dweight,
            dx=unit_dx,
            dbias=unit_dbias,
            unit=unit_of(x.dtype),
        )
    return loss.sum(), unit_dweight, unit_dx, unit_dbias


def fused_linear_divergence_bwd(
    weight: Tensor,
    x: Tensor,
    teacher_weight: Tensor,
    teacher_x: Tensor,
    labels: Tensor | None,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    row_weight: Tensor | None,
    unit_dweight: Tensor | None,
    unit_dx: Tensor | None,
    unit_dbias: Tensor | None,
    dloss: Tensor,
    chunk_size: int | None,
    memory_budget: int | None,
    wide: bool,
    kind: str,
    beta: float,
    temperature: float,
    hard_weight: float,
    ignore_index: int,
    need_dweight: bool,
    need_dx: bool,
    need_dbias: bool,
    donated: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (
        times_scalar(unit_dweight, dloss, x.dtype, donated) if need_dweight else None,
        times_scalar(unit_dx, dloss, x.dtype, donated) if need_dx else None,
        times_scalar(unit_dbias, dloss, x.dtype, donated) if need_dbias else None,
    )


_of_sum = custom_vjp(
    "fused_linear_divergence",
    reference=reference_of_sum,
    fwd=fused_linear_divergence_fwd,
    bwd=fused_linear_divergence_bwd,
    results="loss",
    residuals="unit_dweight unit_dx unit_dbias",
    grads="weight x bias",
    rows="x teacher_x labels row_weight unit_dx",
    sums="unit_dweight unit_dbias",
    autocast="weight x bias teacher_weight teacher_x teacher_bias",
)


def fused_linear_divergence_rows_fwd(
    weight: Tensor,
    x: Tensor,
    teacher_weight: Tensor,
    teacher_x: Tensor,
    labels: Tensor | None,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    chunk_size: int | None,
    memory_budget: int | None,
    wide: bool,
    kind: str,
    beta: float,
    temperature: float,
    hard_weight: float,
    ignore_index: int,
) -> tuple[Tensor]:
    loss = x.new_empty(x.shape[:-1], dtype=compute_dtype(x, teacher_x))

    if has_work(loss):
        _each_chunk(
            Head(weight, x, bias),
            Head(teacher_weight, teacher_x, teacher_bias),
            labels,
            Limits(chunk_size, memory_budget, teacher_x.itemsize),
            Terms(kind, beta, temperature, hard_weight, ignore_index),
            loss=loss,
        )
    return (loss,)


def fused_linear_divergence_rows_bwd(
    weight: Tensor,
    x: Tensor,
    teacher_weight: Tensor,
    teacher_x: Tensor,
    labels: Tensor | None,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    dloss: Tensor,
    chunk_size: int | None,
    memory_budget: int | None,
    wide: bool,
    kind: str,
    beta: float,
    temperature: float,
    hard_weight: float,
    ignore_index: int,
    need_dweight: bool,
    need_dx: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    acc = accumulator(x.dtype)
    make = x.new_empty if has_work(dloss) else x.new_zeros
    dweight = make(weight.shape, dtype=acc if wide else x.dtype) if need_dweight else None
    dx = make(x.shape) if need_dx else None
    dbias = make(weight.shape[:1], dtype=acc) if need_dbias else None

    if has_work(dloss):
        _each_chunk(
            Head(weight, x, bias),
            Head(teacher_weight, teacher_x, teacher_bias),
            labels,
            Limits(chunk_size, memory_budget, teacher_x.itemsize),
            Terms(kind, beta, temperature, hard_weight, ignore_index),
            dloss=dloss,
            dweight=dweight,
            dx=dx,
            dbias=dbias,
        )
    return (
        None if dweight is None else dweight.to(x.dtype),
        dx,
        None if dbias is None else dbias.to(x.dtype),
    )


_of_rows = custom_vjp(
    "fused_linear_divergence_rows",
    reference=reference_of_rows,
    fwd=fused_linear_divergence_rows_fwd,
    bwd=fused_linear_divergence_rows_bwd,
    results="loss",
    grads="weight x bias",
    rows="x teacher_x labels loss",
    autocast="weight x bias teacher_weight teacher_x teacher_bias",
)


def _check(
    op: str,
    student: Head,
    teacher: Head,
    labels: Tensor | None,
    chunk_size: int | None,
    memory_budget: int | None,
    num_items: Tensor | float | None,
    reduction: str,
    terms: Terms,
) -> None:
    check_factors(op, *student)
    check_factors(op, *teacher, of="teacher_")
    V, rows = student.weight.shape[0], student.x.shape[:-1]
    because = "one row per class of `weight`"
    check.shape(op, "teacher_weight", teacher.weight, (V, teacher.x.shape[-1]), because)
    because = "the shape of `x` but for its last size"
    check.shape(op, "teacher_x", teacher.x, (*rows, teacher.x.shape[-1]), because)
    check.device(op, "teacher_x", teacher.x, student.x, "x")
    check.one_of(op, "reduction", reduction, REDUCTIONS)

    whole = isinstance(terms.ignore_index, (int, torch.SymInt))
    check.number(op, "ignore_index", terms.ignore_index, "be an integer", whole)
    if labels is not None:
        check.integer(op, "labels", labels)
        check.shape(op, "labels", labels, rows, "that of `x` without its last dimension")
        check.device(op, "labels", labels, student.x, "x")
    check.number(op, "beta", terms.beta, "be a number", True)
    if not 0 <= terms.beta <= 1:
        check.fail(op, "beta", "be between 0 and 1", terms.beta)
    check.number(op, "temperature", terms.temperature, "be a number", True)
    if terms.temperature <= 0:
        check.fail(op, "temperature", "be positive", terms.temperature)
    check.number(op, "hard_weight", terms.hard_weight, "be a number", True)
    if terms.hard_weight and labels is None:
        check.fail(op, "hard_weight", "be 0 unless `labels` are given", terms.hard_weight)
    for name, value in (("chunk_size", chunk_size), ("memory_budget", memory_budget)):
        if value is not None:
            positive = isinstance(value, (int, torch.SymInt)) and value > 0
            check.number(op, name, value, "be a positive integer, or None", positive)
    check_items(op, num_items, reduction)


def _divisor(
    num_items: Tensor | float | None, student: Head, labels: Tensor | None, ignore_index: int
) -> Tensor:
    if labels is None and num_items is None:
        num_items = max(prod(student.x.shape[:-1]), 1)
    return items_of(num_items, student.x, labels, None, ignore_index)


def computed(
    op: str,
    student: Head,
    teacher: Head,
    labels: Tensor | None,
    chunk_size: int | None,
    terms: Terms,
    *,
    memory_budget: int | None,
    num_items: Tensor | float | None,
    reduction: str,
) -> Tensor:
    """Check the arguments of a public op, and compute it."""
    _check(op, student, teacher, labels, chunk_size, memory_budget, num_items, reduction, terms)
    (weight, x, bias), N = student, prod(student.x.shape[:-1])
    inside = dtype_inside(x)
    # What the backward pass gets depends on it, so a compiler that leaves the number of rows open
    # gets what is right for all.
    limits = Limits(chunk_size, memory_budget, beside=teacher.x.itemsize)
    wide = not limits.two_chunks(N, weight)
    tensors = (weight, x, teacher.weight, teacher.x, labels, bias, teacher.bias)
    numbers = (float(terms.beta), float(terms.temperature), float(terms.hard_weight))
    options = (chunk_size, memory_budget, wide, terms.kind, *numbers, terms.ignore_index)
    if reduction == "none":
        return _of_rows(*tensors, *options)

    row_weight = divisor = None
    if reduction == "mean":
        divisor = _divisor(num_items, student, labels, terms.ignore_index)
        # In float16 the gradients of a mean would lose their low bits.
        if inside is not torch.float16:
            row_weight = divisor.reciprocal().expand(x.shape[:-1])
    loss = _of_sum(*tensors, row_weight, *options)
    return loss if divisor is None or row_weight is not None else loss / divisor


def reference_of(
    student: Head,
    teacher: Head,
    labels: Tensor | None,
    terms: Terms,
    *,
    num_items: Tensor | float | None,
    reduction: str,
) -> Tensor:
    """The meaning of a public op."""
    (weight, x, bias), (teacher_weight, teacher_x, teacher_bias) = student, teacher
    loss = reference_of_rows(
        weight, x, teacher_weight, teacher_x, labels, bias, teacher_bias, None, None, False, *terms
    )
    if reduction == "mean" and num_items is not None:
        return loss.sum() / num_items
    return divergence.reduced(loss, labels, terms.ignore_index, reduction)
