"""The kernels of all divergences between two rows: a sum over terms of two numbers.

    loss = Σ_v term(x_v, y_v)          dx_v = dloss · ∂term/∂x          dy_v = dloss · ∂term/∂y

with x the input (of a student) and y the target (of a teacher):

    kind          x, y               term
    kl            log q, p           p · (log p − log q)
    kl_log        log q, log p       p · (log p − log q)
    reverse_kl    log q, log p       q · (log q − log p)
    jsd           log q, log p       β · p · (log p − log m) + (1 − β) · q · (log q − log m)
    tvd           q, p               ½ · |q − p|

and m = β · p + (1 − β) · q. A term of probability 0 is 0 whatever the other side is, and so are its
derivatives in the log of that probability. Of jsd the derivatives are the two summands, for what
comes by way of m cancels.

Memory traffic in bytes per element of two 2-byte inputs: 4 forward (read both), backward 6 (read
both, write the gradient of the input), of kl and kl_log 4, since the input need not be read. Only
the inputs are kept. Ignored rows are not read.
"""

import math

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.core.direct import launch
from liger_fn.functional.core.kernels import exp_of
from liger_fn.functional.core.launch import (
    accumulator,
    as_rows,
    cdiv,
    dense_like,
    has_work,
    interpreted,
    next_power_of_2,
    tl,
    triton,
    triton_dtype,
    unit_stride,
)
from liger_fn.functional.loss.cross_entropy import mean

# The chip's own logarithm is out of reach of Triton's language, and of its interpreter.
_PTX = tl.constexpr(not interpreted() and torch.version.hip is None)

# The exponential of this is 0 in every type, and a difference with it is finite.
_LOWEST_LOG = -1e4


def reference_terms(input: Tensor, target: Tensor, kind: str, beta: float) -> Tensor:
    """The term of every element, in the type of the arithmetic."""
    compute = compute_dtype(input, target)
    x, y = input.to(compute), target.to(compute)
    if kind == "tvd":
        gap = x - y
        # Not `abs`, whose second derivative PyTorch 2.11 cannot trace with symbolic shapes.
        return 0.5 * gap * gap.sign()
    if kind == "jsd":
        x, y = x.clamp(min=_LOWEST_LOG), y.clamp(min=_LOWEST_LOG)
        log_m = torch.logaddexp(x + math.log1p(-beta), y + math.log(beta))
        return beta * y.exp() * (y - log_m) + (1 - beta) * x.exp() * (x - log_m)
    if kind == "reverse_kl":
        x, y = y, x
    p = y if kind == "kl" else y.exp()
    none = p == 0
    x = x.masked_fill(none, 0.0)
    y = y.masked_fill(none, 1.0)
    terms = y * (y.log() - x) if kind == "kl" else y.exp() * (y - x)
    return terms.masked_fill(none, 0.0)


def reference_rows(
    input: Tensor, target: Tensor, labels: Tensor | None, kind: str, beta: float, ignore_index: int
) -> Tensor:
    """The divergence of every row."""
    if labels is None:
        return reference_terms(input, target, kind, beta).sum(-1)
    ignored = (labels.long() == ignore_index)[..., None]
    # Before the terms, so that NaN in an ignored row reaches no gradient.
    input, target = input.masked_fill(ignored, 0.0), target.masked_fill(ignored, 0.0)
    return reference_terms(input, target, kind, beta).masked_fill(ignored, 0.0).sum(-1)


def compute_dtype(input: Tensor, target: Tensor) -> torch.dtype:
    return accumulator(torch.promote_types(input.dtype, target.dtype))


@triton.jit
def _kl_term(log_q, p, log_p, IN_LOG: tl.constexpr):
    """Give p · (log p − log q), its derivative in log q, and in log p or p."""
    none = p == 0.0
    gap = log_p - log_q
    if IN_LOG:
        slope = p * gap + p
    else:
        slope = gap + 1.0
    return tl.where(none, 0.0, p * gap), -p, tl.where(none, 0.0, slope)


@triton.jit
def _log_of(x, NARROW: tl.constexpr, NORMAL: tl.constexpr):
    """One instruction, good to 2⁻²² (between ½ and 2 of 1, else of itself), not `tl.log`'s twenty.

    Of inputs of 2 bytes: the exponentials beside it are no better, and float32 has twice the time.
    NORMAL: x is no subnormal number, of which the instruction alone takes none.
    """
    if _PTX and NARROW:
        LOG2: tl.constexpr = "lg2.approx.ftz.f32 $0, $1;" if NORMAL else "lg2.approx.f32 $0, $1;"
        log2 = tl.inline_asm_elementwise(LOG2, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
        log = log2 * 0.6931471805599453
    else:
        log = tl.log(x)
    return log


@triton.jit
def _jsd_term(x, y, BETA: tl.constexpr, NARROW: tl.constexpr):
    """Give the term of log probabilities and its two derivatives.

    By the gap of the logs and not by log m itself, which would lose the digits that x and y share.
    """
    LOWEST_LOG: tl.constexpr = -1e4
    x = tl.maximum(x, LOWEST_LOG, propagate_nan=tl.PropagateNan.ALL)
    y = tl.maximum(y, LOWEST_LOG, propagate_nan=tl.PropagateNan.ALL)
    gap = x - y
    # The greater of q and p, the lesser as a share of it, and m as another.
    greater, share = exp_of(tl.maximum(x, y)), exp_of(tl.abs(gap), -1.0)
    weight = tl.where(gap >= 0.0, tl.full((), BETA, x.dtype), tl.full((), 1.0 - BETA, x.dtype))
    # Written so that equal sides, whose share is 1, give exactly 0.
    mix = 1.0 + weight * (share - 1.0)
    log_mix = _log_of(mix, NARROW, True)
    term = greater * (-weight * (tl.abs(gap) * share) - mix * log_mix)
    dx = (1.0 - BETA) * exp_of(x) * (tl.minimum(gap, 0.0) - log_mix)
    dy = BETA * exp_of(y) * (tl.minimum(-gap, 0.0) - log_mix)
    return term, dx, dy


@triton.jit
def term_of(x, y, KIND: tl.constexpr, BETA: tl.constexpr, NARROW: tl.constexpr = False):
    """Give the term and its derivatives in x and y; the compiler leaves out what is not used.

    NARROW: x and y are numbers of 2 bytes.
    """
    if KIND == "kl":
        term, dx, dy = _kl_term(x, y, _log_of(tl.where(y == 0.0, 1.0, y), NARROW, False), False)
    elif KIND == "kl_log":
        term, dx, dy = _kl_term(x, exp_of(y), y, True)
    elif KIND == "reverse_kl":
        term, dy, dx = _kl_term(y, exp_of(x), x, True)
    elif KIND == "jsd":
        term, dx, dy = _jsd_term(x, y, BETA, NARROW)
    else:
        gap = x - y
        term = 0.5 * tl.abs(gap)
        dx = tl.where(gap > 0.0, 0.5, tl.where(gap < 0.0, -0.5, 0.0 * gap))
        dy = -dx
    return term, dx, dy


@triton.jit
def _divergence_fwd_kernel(
    input_ptr, target_ptr, labels_ptr, loss_ptr,
    input_stride_b, input_stride_t, target_stride_b, target_stride_t, T, V, ignore_index,
    KIND: tl.constexpr, BETA: tl.constexpr, HAS_LABELS: tl.constexpr, PER_ELEMENT: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    NARROW: tl.constexpr = (input_ptr.dtype.element_ty.primitive_bitwidth == 16) and (
        target_ptr.dtype.element_ty.primitive_bitwidth == 16
    )
    row = tl.program_id(0).to(tl.int64)
    input_ptr += (row // T) * input_stride_b + (row % T) * input_stride_t
    target_ptr += (row // T) * target_stride_b + (row % T) * target_stride_t
    columns = V
    if HAS_LABELS:
        columns = tl.where(tl.load(labels_ptr + row) != ignore_index, V, 0)

    # What makes a term exactly 0.
    NOTHING: tl.constexpr = 0.0 if KIND == "kl" or KIND == "tvd" else float("-inf")
    sums = tl.zeros((BLOCK_V,), COMPUTE)
    for start in range(0, columns, BLOCK_V):
        col = start + tl.arange(0, BLOCK_V)
        x = tl.load(input_ptr + col, mask=col < V, other=NOTHING).to(COMPUTE)
        y = tl.load(target_ptr + col, mask=col < V, other=NOTHING).to(COMPUTE)

        term, _, _ = term_of(x, y, KIND, BETA, NARROW)

        if PER_ELEMENT:
            tl.store(loss_ptr + row * V + col, term, mask=col < V)
        else:
            sums += term

    if not PER_ELEMENT:
        tl.store(loss_ptr + row, tl.sum(sums, axis=0))


@triton.jit
def _divergence_bwd_kernel(
    input_ptr, target_ptr, labels_ptr, dloss_ptr, dinput_ptr, dtarget_ptr,
    input_stride_b, input_stride_t, target_stride_b, target_stride_t, dloss_stride_n,
    T, V, slab, ignore_index,
    KIND: tl.constexpr, BETA: tl.constexpr, HAS_LABELS: tl.constexpr, PER_ELEMENT: tl.constexpr,
    NEED_DINPUT: tl.constexpr, NEED_DTARGET: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    NARROW: tl.constexpr = (input_ptr.dtype.element_ty.primitive_bitwidth == 16) and (
        target_ptr.dtype.element_ty.primitive_bitwidth == 16
    )
    row = tl.program_id(0).to(tl.int64)
    input_ptr += (row // T) * input_stride_b + (row % T) * input_stride_t
    target_ptr += (row // T) * target_stride_b + (row % T) * target_stride_t
    dloss_ptr += row * dloss_stride_n
    first = tl.program_id(1) * slab
    last = tl.minimum(first + slab, V)
    readable = last
    if HAS_LABELS:
        readable = tl.where(tl.load(labels_ptr + row) != ignore_index, last, 0)
    if not PER_ELEMENT:
        dloss = tl.load(dloss_ptr).to(COMPUTE)

    for start in range(first, last, BLOCK_V):
        col = start + tl.arange(0, BLOCK_V)
        x = tl.load(input_ptr + col, mask=col < readable, other=0.0).to(COMPUTE)
        y = tl.load(target_ptr + col, mask=col < readable, other=0.0).to(COMPUTE)
        if PER_ELEMENT:
            dloss = tl.load(dloss_ptr + col, mask=col < readable, other=0.0).to(COMPUTE)

        _, dx, dy = term_of(x, y, KIND, BETA, NARROW)

        if NEED_DINPUT:
            dx = tl.where(col < readable, dloss * dx, 0.0)
            tl.store(dinput_ptr + row * V + col, dx, mask=col < last)
        if NEED_DTARGET:
            dy = tl.where(col < readable, dloss * dy, 0.0)
            tl.store(dtarget_ptr + row * V + col, dy, mask=col < last)


def _divergence_config(V: int) -> dict:
    """16 elements of each input a thread: four 16-byte loads are in flight."""
    block_v = min(next_power_of_2(V), 2048)
    return {"BLOCK_V": block_v, "num_warps": max(1, block_v // 512)}


_SLAB = 16384


def batches(x: Tensor) -> Tensor:
    """View x (..., V) as (B, T, V), which shifted logits allow too; copy only if no view can."""
    x = x[None] if x.dim() == 1 else x
    x = x.reshape(-1, *x.shape[-2:])
    return x if x.stride(-1) == 1 else x.contiguous()


def divergence_fwd(
    input: Tensor,
    target: Tensor,
    labels: Tensor | None,
    kind: str,
    beta: float,
    ignore_index: int,
    per_element: bool = False,
) -> tuple[Tensor]:
    """Launch the forward pass: the divergence of every row, or the term of every element."""
    compute = compute_dtype(input, target)
    if per_element:
        loss = input.new_empty(input.shape, dtype=torch.promote_types(input.dtype, target.dtype))
    else:
        loss = input.new_empty(input.shape[:-1], dtype=compute)

    if has_work(loss):
        input, target = batches(input), batches(target)
        T, V = input.shape[1:]
        launch(
            _divergence_fwd_kernel, (input.shape[0] * T,),
            input, target, _flat(labels), loss,
            input.stride(0), input.stride(1), target.stride(0), target.stride(1),
            T, V, ignore_index,
            KIND=kind, BETA=beta, HAS_LABELS=labels is not None, PER_ELEMENT=per_element,
            COMPUTE=triton_dtype(compute), **_divergence_config(V),
        )  # fmt: skip
    return (loss,)


def divergence_bwd(
    input: Tensor,
    target: Tensor,
    labels: Tensor | None,
    dloss: Tensor,
    kind: str,
    beta: float,
    ignore_index: int,
    need_dinput: bool,
    need_dtarget: bool,
    per_element: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Launch the backward pass, for a cotangent of every row or of every element."""
    dinput = dense_like(input) if need_dinput else None
    dtarget = dense_like(target) if need_dtarget else None

    if has_work(input) and (need_dinput or need_dtarget):
        compute = compute_dtype(input, target)
        dloss = as_rows(dloss) if per_element else dloss.reshape(-1)
        input, target = batches(input), batches(target)
        T, V = input.shape[1:]
        launch(
            _divergence_bwd_kernel, (input.shape[0] * T, cdiv(V, _SLAB)),
            input, target, _flat(labels), dloss, dinput, dtarget,
            input.stride(0), input.stride(1), target.stride(0), target.stride(1), dloss.stride(0),
            T, V, _SLAB, ignore_index,
            KIND=kind, BETA=beta, HAS_LABELS=labels is not None, PER_ELEMENT=per_element,
            NEED_DINPUT=need_dinput, NEED_DTARGET=need_dtarget,
            COMPUTE=triton_dtype(compute), **_divergence_config(V),
        )  # fmt: skip
    return dinput, dtarget


def _flat(labels: Tensor | None) -> Tensor | None:
    return None if labels is None else unit_stride(labels.reshape(-1))


def reduced(loss: Tensor, labels: Tensor | None, ignore_index: int, reduction: str) -> Tensor:
    """Reduce the divergences of rows; the mean is over the rows that count, and 0 if none does."""
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    if labels is not None:
        return mean(total, labels, None, ignore_index)
    return total / max(loss.numel(), 1)


def check_pair(op: str, input: Tensor, target: Tensor, input_name: str = "input") -> None:
    """Check the two sides of a divergence."""
    check.floating(op, input_name, input)
    check.at_least_1d(op, input_name, input)
    if input.shape[-1] == 0:
        check.fail(op, input_name, "have at least one class", "a last size of 0")
    check.floating(op, "target", target)
    check.shape(op, "target", target, input.shape, f"the shape of `{input_name}`")
    check.device(op, "target", target, input, input_name)


def check_labels(op: str, input: Tensor, labels: Tensor | None, ignore_index: int) -> None:
    """Check what says which rows are ignored."""
    whole = isinstance(ignore_index, (int, torch.SymInt))
    check.number(op, "ignore_index", ignore_index, "be an integer", whole)
    if labels is not None:
        check.integer(op, "labels", labels)
        because = "that of `input` without its last dimension"
        check.shape(op, "labels", labels, input.shape[:-1], because)
        check.device(op, "labels", labels, input, "input")
