"""Cross entropy of logits and integer targets, in one pass over the logits each way.

    z    = softcap · tanh(scale · x / softcap)               lse = log Σ_v exp z_v
    loss = (1 − ε) · w_t · (lse − z_t) + ε/V · Σ_v w_v · (lse − z_v) + z_loss · lse²

    p    = exp(z − lse)                                      W = Σ_v w_v
    pull = (1 − ε) · w_t + ε/V · W + 2 · z_loss · lse
    dz_v = pull · p_v − (1 − ε) · w_t · [v = t] − ε/V · w_v
    dx_v = dloss · dz_v · scale · (1 − (z_v / softcap)²)

with x the logits, t the target, w the class weights, ε the label smoothing. Memory traffic in bytes
per element of 2-byte logits: 2 forward (read), 4 backward (read, write the gradient); `lse`, 4
bytes a row, is kept. Ignored rows are not read.

One op gives the loss of every row, so that each may have its own upstream gradient, and rows may
live on different devices; another their mean, for autograd costs the host as much for a mean of its
own as for the rows. One kernel serves forward, backward and, for losses that hold the logits
themselves, both at once, over the logits.
"""

import functools
import math

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.direct import MOST, Bound, launch
from liger_fn.functional.core.kernels import columns_of
from liger_fn.functional.core.launch import (
    accumulator,
    cdiv,
    dense_like,
    has_work,
    next_power_of_2,
    per_row,
    tl,
    triton,
    triton_dtype,
    unit_stride,
)

REDUCTIONS = ("none", "mean", "sum")


def reference(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    loss = reference_rows(
        logits, target, class_weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale
    )
    return reduced(loss, target, class_weight, ignore_index, reduction)


def reference_rows(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """The loss of every row."""
    V = logits.shape[-1]
    target = target.long()
    ignored = target == ignore_index
    unknown = ~ignored & ((target < 0) | (target >= V))
    t = target.clamp(0, V - 1)

    x = logits.to(accumulator(logits.dtype)).masked_fill(ignored[..., None], 0.0)
    z = x * logit_scale if softcap is None else softcap * torch.tanh(x * (logit_scale / softcap))
    lse = z.logsumexp(-1)
    loss = (1.0 - label_smoothing) * (lse - z.gather(-1, t[..., None]).squeeze(-1))
    w = None if class_weight is None else class_weight.to(z.dtype)
    if w is not None:
        loss = loss * w[t]
    if label_smoothing:
        below = lse[..., None] - z
        loss = loss + label_smoothing / V * (below if w is None else below * w).sum(-1)
    if z_loss:
        loss = loss + z_loss * lse.square()
    # As a factor NaN reaches the gradient too.
    return torch.where(ignored, 0.0, loss * torch.where(unknown, math.nan, 1.0))


def reduced(
    loss: Tensor, target: Tensor, class_weight: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    """Reduce the losses of rows, by PyTorch's own operations."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else mean(total, target, class_weight, ignore_index)


def reference_mean(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    dims: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """The mean over the last `dims` dimensions of rows."""
    loss = reference_rows(
        logits, target, class_weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale
    )
    return _mean_and_weight(loss, target, class_weight, dims, ignore_index)[0]


def _mean_and_weight(
    loss: Tensor, target: Tensor, class_weight: Tensor | None, dims: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The mean over the last dimensions, and what it was divided by."""
    loss, target = _flat(loss, dims), _flat(target, dims)
    weight = weight_of(target, class_weight, ignore_index, loss.dtype, dim=-1)
    return loss.sum(-1) / weight, weight


def _flat(t: Tensor, dims: int) -> Tensor:
    """Make the last dimensions, or none, one."""
    outer = t.dim() - dims
    return t.reshape(*t.shape[:outer], math.prod(t.shape[outer:]))


def mean(total: Tensor, target: Tensor, class_weight: Tensor | None, ignore_index: int) -> Tensor:
    """Divide by the weight of the rows that count."""
    return total / weight_of(target, class_weight, ignore_index, total.dtype)


def weight_of(
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype,
    dim: int | None = None,
) -> Tensor:
    """The weight of the rows that count; of none, a number by which their loss, 0, divides to 0."""
    # uint8 holds no -100, and would compare with 156.
    target = target.long()
    counts = target != ignore_index
    if class_weight is None:
        return counts.sum(dim, dtype=dtype).clamp(min=1.0)
    t = target.clamp(0, class_weight.shape[0] - 1)
    # Detached, for class weights are constants: the losses give them no gradient either.
    weight = (class_weight.detach().to(dtype)[t] * counts).sum(dim)
    return weight.masked_fill(weight == 0, math.inf)


@triton.jit
def tanh_of(x):
    """Cephes's tanh, good to an ulp or two also near zero, where 1 − 2/(1 + exp 2x) cancels."""
    s = x * x
    p = (-0.964399179425052238628 * s - 99.2877231001918586564) * s - 1614.68768441708447952
    q = ((s + 112.811678491632931402) * s + 2235.48839060100448583) * s + 4844.06305325125486048
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, x + x * s * (p / q), tl.where(x < 0, -far, far))


@triton.jit
def scaled_and_capped(x, SCALE: tl.constexpr, CAP: tl.constexpr):
    if CAP is None:
        z = x * SCALE
    else:
        z = CAP * tanh_of(x * (SCALE / CAP))
    return z


@triton.jit
def times_slope(dz, z, SCALE: tl.constexpr, CAP: tl.constexpr):
    """dz · ∂z/∂x, from z. A scale with a name of its own would be rounded to float32."""
    dx = dz * SCALE
    if CAP is not None:
        dx *= 1.0 - (z / CAP) * (z / CAP)
    return dx


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, target_ptr, class_weight_ptr, total_weight_ptr,
    loss_ptr, lse_ptr, dloss_ptr, dlogits_ptr,
    logits_stride_b, logits_stride_t, dlogits_stride_n, dloss_stride_n,
    T, V, width, slab, ignore_index,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, CAP: tl.constexpr, SCALE: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr, HAS_DLOSS: tl.constexpr,
    NEED_LOSS: tl.constexpr, NEED_DLOGITS: tl.constexpr, PADDED: tl.constexpr,
    UNIT: tl.constexpr, LOWEST: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += (row // T) * logits_stride_b + (row % T) * logits_stride_t
    t = tl.load(target_ptr + row).to(tl.int64)
    live = t != ignore_index
    known = (t >= 0) & (t < V)
    t = tl.where(known, t, 0).to(tl.int32)
    hit = tl.full((), 1.0 - SMOOTHING, COMPUTE)
    total_weight = tl.full((), 1.0, COMPUTE) * V
    if HAS_CLASS_WEIGHT:
        hit *= tl.load(class_weight_ptr + t).to(COMPUTE)
        if SMOOTHING != 0.0:
            total_weight = tl.load(total_weight_ptr)

    if NEED_LOSS:
        # Read before the reductions, where warps wait for each other: dlogits may be logits itself,
        # and a warp that runs ahead writes it.
        x_t = tl.load(logits_ptr + t).to(COMPUTE)
        # Eight neighbours, which one thread loads, share a maximum and a sum relative to it: an
        # element costs one exponential and few instructions more, and no thread waits for another
        # before the end of the row.
        top = tl.full((BLOCK_V // 8,), LOWEST, COMPUTE)
        sums = tl.zeros((BLOCK_V // 8,), COMPUTE)
        weighted = tl.zeros((BLOCK_V // 8,), COMPUTE)
        for start in range(0, tl.where(live, V, 0), BLOCK_V):
            col = start + columns_of(BLOCK_V)
            x = tl.load(
                logits_ptr + col, mask=col < width, other=float("-inf"),
                eviction_policy="evict_last" if NEED_DLOGITS else "",
            ).to(COMPUTE)  # fmt: skip
            z = scaled_and_capped(x, SCALE, CAP)
            if PADDED or CAP is not None or SCALE <= 0.0:
                z = tl.where(col < V, z, float("-inf"))
            highest = tl.maximum(top, tl.max(z, axis=1))
            sums *= tl.exp(top - highest)
            sums += tl.sum(tl.exp(z - highest[:, None]), axis=1)
            top = highest
            if SMOOTHING != 0.0:
                z = tl.where(col < V, z, 0.0)
                if HAS_CLASS_WEIGHT:
                    z *= tl.load(class_weight_ptr + col, mask=col < V, other=0.0).to(COMPUTE)
                weighted += tl.sum(z, axis=1)

        highest = tl.where(live, tl.max(top, axis=0), 0.0)
        total = tl.where(live, tl.sum(sums * tl.exp(top - highest), axis=0), 1.0)
        lse = highest + tl.log(total)
        loss = hit * (lse - scaled_and_capped(x_t, SCALE, CAP))
        if SMOOTHING != 0.0:
            loss += SMOOTHING * (total_weight * lse - tl.sum(weighted, axis=0)) / V
        if Z_LOSS != 0.0:
            loss += Z_LOSS * lse * lse
        if HAS_DLOSS:
            loss *= tl.load(dloss_ptr + row * dloss_stride_n).to(COMPUTE)
        loss = tl.where(live, tl.where(known, loss, float("nan")), 0.0)
        tl.store(loss_ptr + row, loss)
        tl.store(lse_ptr + row, lse)
    else:
        lse = tl.load(lse_ptr + row)

    if NEED_DLOGITS:
        pull = hit + SMOOTHING * total_weight / V + 2.0 * Z_LOSS * lse
        share = tl.full((), SMOOTHING, COMPUTE) / V
        g = tl.full((), UNIT, COMPUTE)
        if HAS_DLOSS:
            g *= tl.load(dloss_ptr + row * dloss_stride_n).to(COMPUTE)
        # A row that does not count is read as zeros, and multiplied by zero.
        g = tl.where(live, tl.where(known, g, float("nan")), 0.0)
        pull, hit, share = g * pull, g * hit, g * share
        first = tl.program_id(1) * slab
        last = tl.minimum(first + slab, width)
        readable = tl.where(live, last, 0)
        last_block = first + (last - first - 1) // BLOCK_G * BLOCK_G
        for step in range(0, last - first, BLOCK_G):
            # Backwards: what the sum over the row read last is still in the caches.
            col = last_block - step + columns_of(BLOCK_G)
            x = tl.load(
                logits_ptr + col, mask=col < readable, other=0.0,
                eviction_policy="evict_first" if NEED_LOSS else "",
            ).to(COMPUTE)  # fmt: skip
            z = scaled_and_capped(x, SCALE, CAP)
            dz = pull * tl.exp(z - lse)
            if SMOOTHING != 0.0:
                if HAS_CLASS_WEIGHT:
                    w = tl.load(class_weight_ptr + col, mask=col < V, other=0.0).to(COMPUTE)
                    dz -= share * w
                else:
                    dz -= share
            dz = tl.where(col == t, dz - hit, dz)
            dx = times_slope(dz, z, SCALE, CAP)
            tl.store(
                dlogits_ptr + row * dlogits_stride_n + col, dx, mask=col < last,
                eviction_policy="evict_first" if NEED_LOSS else "",
            )  # fmt: skip


def _cross_entropy_config(V: int, reads_twice: bool, heavy: bool) -> dict:
    """The fastest of a sweep on an H100, over blocks of 1024 to 32768 and 2 to 32 warps.

    A row that is read twice wants all the threads of a multiprocessor, or two: then the rows in
    flight fit in the second-level cache. Where the arithmetic is heavy, half of them, for twice the
    registers. A row that is read once leaves the order to the hardware.
    """
    if not reads_twice:
        block_v = max(8, min(next_power_of_2(V), 4096))
        return {"BLOCK_V": block_v, "BLOCK_G": block_v, "num_warps": max(1, block_v // 512)}
    block_v = max(8, min(next_power_of_2(V), 8192 if heavy else 16384))
    block_g = max(8, min(block_v, 8192))
    return {"BLOCK_V": block_v, "BLOCK_G": block_g, "num_warps": max(1, block_v // 512)}


_SLAB = 16384


@functools.lru_cache(MOST)
def _cross_entropy_with(
    V: int,
    compute: torch.dtype,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    has_class_weight: bool,
    has_dloss: bool,
    need_loss: bool,
    need_dlogits: bool,
    padded: bool,
    unit: float,
) -> Bound:
    heavy = softcap is not None or label_smoothing != 0.0 or compute is torch.float64
    return Bound(
        _cross_entropy_kernel,
        SMOOTHING=label_smoothing, Z_LOSS=z_loss, CAP=softcap, SCALE=logit_scale,
        HAS_CLASS_WEIGHT=has_class_weight, HAS_DLOSS=has_dloss,
        NEED_LOSS=need_loss, NEED_DLOGITS=need_dlogits, PADDED=padded,
        UNIT=unit, LOWEST=torch.finfo(compute).min, COMPUTE=triton_dtype(compute),
        **_cross_entropy_config(V, need_loss and need_dlogits, heavy),
    )  # fmt: skip


def launch_rows(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    *,
    loss: Tensor | None = None,
    dloss: Tensor | None = None,
    dlogits: Tensor | None = None,
    unit: float = 1.0,
    width: int | None = None,
) -> None:
    """Write loss and lse if loss is given, and dlogits, which may be logits itself, if it is given.

    dlogits is the gradient of unit · Σ_rows dloss · loss, with dloss 1 if it is not given. Given
    with loss, dloss is the weight of the row in a sum, and loss is the row's term of that sum.
    logits (..., V) may have any strides; loss and lse are contiguous, and so is dlogits but for the
    stride of its rows. Rows may be padded to `width` elements of memory, which are then read and
    written too: with a width of whole vectors a vocabulary of any size moves at full speed.
    """
    V = logits.shape[-1]
    logits, strides, T = _rows_in_two_dimensions(logits)
    target, class_weight = unit_stride(target), unit_stride(class_weight)
    dloss, dloss_stride_n = (None, 0) if dloss is None else _in_one_dimension(dloss)
    smooth_weights = class_weight is not None and label_smoothing != 0.0
    total_weight = class_weight.sum(dtype=lse.dtype) if smooth_weights else None

    width = V if width is None else width
    slab = width if dlogits is None or loss is not None else _SLAB
    kernel = _cross_entropy_with(
        V, lse.dtype, label_smoothing, z_loss, softcap, logit_scale, class_weight is not None,
        dloss is not None, loss is not None, dlogits is not None, width != V, unit,
    )  # fmt: skip
    kernel(
        (target.numel(), cdiv(width, slab)),
        logits, target, class_weight, total_weight, loss, lse, dloss, dlogits, *strides,
        0 if dlogits is None or dlogits.dim() < 2 else dlogits.stride(-2),
        dloss_stride_n, T, V, width, slab, ignore_index,
    )  # fmt: skip


def _rows_in_two_dimensions(logits: Tensor) -> tuple[Tensor, tuple[int, int], int]:
    """Give logits (..., V) with unit stride, how far apart rows are, and how many are inner ones.

    Dense ones need no view: all their rows are equally far apart.
    """
    if logits.is_contiguous():
        return logits, (logits.shape[-1], 0), 1
    logits = logits[None] if logits.dim() == 1 else logits
    logits = logits.reshape(-1, *logits.shape[-2:])
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    return logits, (logits.stride(0), logits.stride(1)), logits.shape[1]


def _in_one_dimension(dloss: Tensor) -> tuple[Tensor, int]:
    """Give a number for each row, and how far apart they are: 0 if all are one."""
    if dloss.is_contiguous():
        return dloss, 1
    dloss = dloss.reshape(-1)
    return dloss, dloss.stride(0)


def cross_entropy_fwd(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    loss = per_row(logits, accumulator(logits.dtype))
    lse = torch.empty_like(loss)

    if has_work(loss):
        launch_rows(
            logits, target, class_weight, lse,
            ignore_index, label_smoothing, z_loss, softcap, logit_scale, loss=loss,
        )  # fmt: skip
    return loss, lse


def cross_entropy_bwd(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    lse: Tensor,
    dloss: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor]:
    dlogits = dense_like(logits)

    if has_work(dlogits):
        launch_rows(
            logits, target, class_weight, unit_stride(lse),
            ignore_index, label_smoothing, z_loss, softcap, logit_scale,
            dloss=dloss, dlogits=dlogits,
        )  # fmt: skip
    return (dlogits,)


_cross_entropy = custom_vjp(
    "cross_entropy",
    reference=reference_rows,
    fwd=cross_entropy_fwd,
    bwd=cross_entropy_bwd,
    results="loss",
    residuals="lse",
    grads="logits",
    rows="logits target loss lse",
)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def _mean_kernel(
    loss_ptr, target_ptr, class_weight_ptr, mean_ptr, weight_ptr, N, V, ignore_index,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    loss_ptr += b * N
    target_ptr += b * N
    COMPUTE: tl.constexpr = loss_ptr.dtype.element_ty
    losses, weights = tl.zeros((BLOCK_N,), COMPUTE), tl.zeros((BLOCK_N,), COMPUTE)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        losses += tl.load(loss_ptr + n, mask=n < N, other=0.0)
        t = tl.load(target_ptr + n, mask=n < N, other=0).to(tl.int64)
        counts = (n < N) & (t != ignore_index)
        if class_weight_ptr is None:
            weights += counts.to(COMPUTE)
        else:
            t = tl.minimum(tl.maximum(t, 0), V - 1)
            weights += tl.load(class_weight_ptr + t, mask=counts, other=0.0).to(COMPUTE)
    weight = tl.sum(weights, axis=0)
    if class_weight_ptr is None:
        weight = tl.maximum(weight, 1.0)
    else:
        weight = tl.where(weight == 0.0, float("inf"), weight)
    tl.store(mean_ptr + b, tl.sum(losses, axis=0) / weight)
    tl.store(weight_ptr + b, weight)


# No dimension of rows is independent of the others, by which DTensor could spread them.
_ALL_DIMS = 1 << 16

# Beyond these one program takes longer than the whole chip does in several launches.
_FEW_ROWS = 1 << 17


def _mean_config(N: int) -> dict:
    """One program: to add up what several have found would be another launch."""
    block_n = max(16, min(next_power_of_2(N), 8192))
    return {"BLOCK_N": block_n, "num_warps": max(1, block_n // 256)}


def _mean_of_rows(
    loss: Tensor, target: Tensor, class_weight: Tensor | None, dims: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Give the same of dense losses and targets, by one kernel unless there are too many."""
    outer = loss.dim() - dims
    N = math.prod(loss.shape[outer:])
    if not loss.is_meta and N > _FEW_ROWS:
        return _mean_and_weight(loss, target, class_weight, dims, ignore_index)
    mean = loss.new_empty(loss.shape[:outer])
    weight = torch.empty_like(mean)

    if has_work(mean):
        V = 0 if class_weight is None else len(class_weight)
        launch(
            _mean_kernel, (mean.numel(),),
            loss, target, unit_stride(class_weight), mean, weight, N, V, ignore_index,
            **_mean_config(N),
        )  # fmt: skip
    return mean, weight


def cross_entropy_mean_fwd(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    dims: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # Both kernels read it so. Of sizes that a compiler does not know, nothing is asked on meta.
    target = target if target.is_meta else unit_stride(target)
    loss, lse = cross_entropy_fwd(
        logits, target, class_weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale
    )
    mean, weight = _mean_of_rows(loss, target, class_weight, dims, ignore_index)
    return mean, lse, weight


def cross_entropy_mean_bwd(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    lse: Tensor,
    weight: Tensor,
    dmean: Tensor,
    dims: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor]:
    dloss = dmean / weight
    dloss = dloss.view((*dloss.shape, *[1] * dims)).expand(lse.shape)
    return cross_entropy_bwd(
        logits, target, class_weight, lse, dloss,
        ignore_index, label_smoothing, z_loss, softcap, logit_scale,
    )  # fmt: skip


_cross_entropy_mean = custom_vjp(
    "cross_entropy_mean",
    reference=reference_mean,
    fwd=cross_entropy_mean_fwd,
    bwd=cross_entropy_mean_bwd,
    results="mean",
    residuals="lse weight",
    grads="logits",
    rows="logits target mean lse weight",
    core_dims=_ALL_DIMS,
)


def check_options(
    op: str,
    of: Tensor,
    of_name: str,
    V: int,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
) -> None:
    """Check what every cross entropy takes beside its target and what its logits come from."""
    if class_weight is not None:
        check.floating(op, "class_weight", class_weight)
        check.shape(op, "class_weight", class_weight, (V,), "one weight per class")
        check.device(op, "class_weight", class_weight, of, of_name)
    check.one_of(op, "reduction", reduction, REDUCTIONS)
    whole = isinstance(ignore_index, (int, torch.SymInt))
    check.number(op, "ignore_index", ignore_index, "be an integer", whole)
    numbers = {
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": 1.0 if softcap is None else softcap,
        "logit_scale": logit_scale,
    }
    for name, value in numbers.items():
        check.number(op, name, value, "be a number", True)
    if not 0 <= label_smoothing <= 1:
        check.fail(op, "label_smoothing", "be between 0 and 1", label_smoothing)
    if softcap is not None and softcap <= 0:
        check.fail(op, "softcap", "be positive, or None", softcap)


def check_target(op: str, name: str, target: Tensor, of: Tensor, of_name: str) -> None:
    check.integer(op, name, target)
    check.shape(op, name, target, of.shape[:-1], f"that of `{of_name}` without its last dimension")
    check.device(op, name, target, of, of_name)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Compute the cross entropy of logits and integer targets.

        z    = softcap · tanh(logit_scale · logits / softcap), or logit_scale · logits
        loss = (1 − ε) · w_t · (lse − z_t) + ε/V · Σ_v w_v · (lse − z_v) + z_loss · lse²

    with lse = log Σ_v exp z_v, t the target, w the class weights and ε the label smoothing.

    Args:
        logits: (..., V), floating point, any strides. They are left as they are.
        target: (...), any integer dtype. A target outside [0, V) that is not ignore_index makes the
            loss and the gradient of its row NaN.
        class_weight: (V,), floating point: w above, a constant; None: ones.
        ignore_index: rows with this target have loss 0 and gradient exactly 0, whatever they hold.
        reduction: "none": a loss per row; "sum"; "mean": the sum divided by the sum of w_t over the
            rows that are not ignored, their number without class weights. Where that is 0 the mean
            is 0 with zero gradients (torch gives NaN): a batch of nothing but padding must not
            destroy a run.
        label_smoothing: ε above, between 0 and 1, as in torch.
        z_loss: the weight of lse², which keeps the logits from drifting; not scaled by w.
        softcap: bounds z by tanh, as Gemma 2 does; None: no bound.
        logit_scale: multiplies the logits before anything else.

    Returns:
        float32 (float64 for float64 logits): a scalar, or (...) for "none".

    Raises:
        TypeError: logits or class_weight is not floating point, target is not of an integer dtype,
            an option is no number.
        ValueError: a shape or device does not fit, an option is out of its range.

    Precision: float32 throughout (float64 for float64 logits); the gradient is rounded once.
    Memory: logits, target and 4 bytes a row live until the backward pass, which
        allocates the gradient.
    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016 (label
        smoothing); Chowdhery et al., "PaLM", 2022 (z-loss).
    """
    check.floating("cross_entropy", "logits", logits)
    check.at_least_1d("cross_entropy", "logits", logits)
    if logits.shape[-1] == 0:
        check.fail("cross_entropy", "logits", "have at least one class", "a last size of 0")
    check_target("cross_entropy", "target", target, logits, "logits")
    check_options(
        "cross_entropy", logits, "logits", logits.shape[-1], class_weight, ignore_index, reduction,
        label_smoothing, z_loss, softcap, logit_scale,
    )  # fmt: skip
    options = (ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    # DTensor, which alone has placements, knows how to add up rows that are spread over devices.
    if reduction == "mean" and not hasattr(logits, "placements"):
        return _cross_entropy_mean(logits, target, class_weight, target.dim(), *options)
    loss = _cross_entropy(logits, target, class_weight, *options)
    return reduced(loss, target, class_weight, ignore_index, reduction)
