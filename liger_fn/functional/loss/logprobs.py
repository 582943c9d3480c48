"""Log-probabilities of tokens, with lse, entropy and most likely token, in one pass each way.

    z     = softcap · tanh(scale · x / softcap) / temperature
    lse   = log Σ_v exp z_v              p    = exp(z − lse)
    logp  = z_t − lse                    top1 = argmax_v z_v
    H     = lse − Σ_v p_v · z_v          the entropy

    dz_v  = dlogp · ([v = t] − p_v) + dlse · p_v − dH · p_v · (z_v − lse + H)
    dx_v  = dz_v · scale / temperature · (1 − (tanh(scale · x / softcap))²)

with x the logits and t the target. Memory traffic in bytes per element of 2-byte logits: 2 forward
(read), 4 backward (read, write the gradient). The highest z of a row, lse less that and, if asked
for, H are kept, 4 bytes a row each: what all logits of a row share costs no digits. Ignored rows
are not read.

The kernels know no temperature: it divides scale and softcap before they are called. They give top1
as a floating-point number, since what an op returns has derivatives.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.direct import launch
from liger_fn.functional.core.kernels import columns_of, exp_of, times
from liger_fn.functional.core.launch import (
    accumulator,
    cdiv,
    has_work,
    in_vectors,
    next_power_of_2,
    tl,
    triton,
    triton_dtype,
    unit_stride,
)
from liger_fn.functional.loss.cross_entropy import (
    check_target,
    scaled_and_capped,
    times_slope,
)


class LogProbs(NamedTuple):
    """What is known of each token: a field is None unless it was asked for."""

    logp: Tensor
    lse: Tensor | None
    entropy: Tensor | None
    top1: Tensor | None


def reference(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    lse: bool = False,
    entropy: bool = False,
    top1: bool = False,
) -> Tensor | LogProbs:
    scale, cap = tempered(logit_scale, softcap, temperature)
    rows = reference_rows(logits, target, cap, scale, ignore_index, entropy, top1)
    return asked_for(rows, lse, entropy, top1)


def reference_rows(
    logits: Tensor,
    target: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    with_entropy: bool,
    with_top1: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Everything about every row."""
    V = logits.shape[-1]
    target = target.long()
    ignored = target == ignore_index
    unknown = ~ignored & ((target < 0) | (target >= V))
    t = target.clamp(0, V - 1)

    x = logits.to(accumulator(logits.dtype)).masked_fill(ignored[..., None], 0.0)
    z = x * logit_scale if softcap is None else softcap * torch.tanh(x * (logit_scale / softcap))
    log_p = z.log_softmax(-1)
    logp = log_p.gather(-1, t[..., None]).squeeze(-1)
    # As a factor NaN reaches the gradient too.
    logp = torch.where(ignored, 0.0, logp * torch.where(unknown, math.nan, 1.0))
    entropy = top1 = None
    if with_entropy:
        # A forbidden class has p = 0 and log p = −∞, and adds nothing.
        terms = log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)
        entropy = torch.where(ignored, 0.0, -terms.sum(-1))
    if with_top1:
        top1 = z.argmax(-1).masked_fill(ignored, -1).to(z.dtype)
    return logp, torch.where(ignored, 0.0, z.logsumexp(-1)), entropy, top1


def tempered(
    logit_scale: float, softcap: float | None, temperature: float
) -> tuple[float, float | None]:
    """The scale and cap of logits that are divided by a temperature after both."""
    return logit_scale / temperature, None if softcap is None else softcap / temperature


def asked_for(
    rows: tuple[Tensor, Tensor, Tensor | None, Tensor | None], lse: bool, entropy: bool, top1: bool
) -> Tensor | LogProbs:
    logp, each_lse, each_entropy, each_top1 = rows
    if not (lse or entropy or top1):
        return logp
    token = None if each_top1 is None else each_top1.to(torch.int64)
    return LogProbs(logp, each_lse if lse else None, each_entropy, token)


@triton.jit
def _product_or_0(e, d):
    """e · d, and 0 where e is 0, for d may be −∞ there."""
    return tl.where(e > 0.0, e * d, 0.0)


@triton.jit
def _load_logits(
    logits_ptr, col, V, width,
    CAP: tl.constexpr, SCALE: tl.constexpr, PADDED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Load z; past V it is −∞."""
    x = tl.load(logits_ptr + col, mask=col < width, other=float("-inf")).to(COMPUTE)
    z = scaled_and_capped(x, SCALE, CAP)
    if PADDED or CAP is not None or SCALE <= 0.0:
        z = tl.where(col < V, z, float("-inf"))
    return z


@triton.jit
def _logprobs_fwd_kernel(
    logits_ptr, target_ptr,
    logp_ptr, lse_ptr, entropy_ptr, top1_ptr, highest_ptr, log_sum_ptr,
    logits_stride_b, logits_stride_t, T, V, width, ignore_index,
    CAP: tl.constexpr, SCALE: tl.constexpr, ENTROPY: tl.constexpr, TOP1: tl.constexpr,
    PADDED: tl.constexpr, LOWEST: tl.constexpr, IN_VECTORS: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += (row // T) * logits_stride_b + (row % T) * logits_stride_t
    t = tl.load(target_ptr + row).to(tl.int64)
    live = t != ignore_index
    known = (t >= 0) & (t < V)
    x_t = tl.load(logits_ptr + tl.where(known, t, 0), mask=live, other=0.0).to(COMPUTE)

    # A lane reads 16 bytes of 2-byte logits at a time, and keeps a maximum and sums relative to it:
    # no lane waits for another before the end of the row.
    lane = tl.arange(0, BLOCK_V // 8) * 8
    top = tl.full((BLOCK_V // 8,), LOWEST, COMPUTE)
    where = lane
    sums = tl.zeros((BLOCK_V // 8,), COMPUTE)
    moments = tl.zeros((BLOCK_V // 8,), COMPUTE)
    for start in range(0, tl.where(live, V, 0), BLOCK_V):
        z = _load_logits(
            logits_ptr, start + columns_of(BLOCK_V), V, width, CAP, SCALE, PADDED, COMPUTE
        )
        peak = tl.max(z, axis=1)
        if TOP1:
            where = tl.where(peak > top, start + lane, where)
        higher = tl.maximum(top, peak)
        d = z - higher[:, None]
        e = exp_of(d)
        rise = top - higher
        shrink = exp_of(rise)
        if ENTROPY:
            # Σ e^(z − top) · (z − top): a sum of small terms, whatever number all logits share.
            # Where e is 0, d may be −∞.
            moments = shrink * moments + _product_or_0(shrink, rise) * sums
            moments += tl.sum(times(e, tl.maximum(d, -1e4), 0 if IN_VECTORS else None), axis=1)
        sums = shrink * sums + tl.sum(e, axis=1)
        top = higher

    highest = tl.where(live, tl.max(top, axis=0), 0.0)
    rise = top - highest
    shrink = exp_of(rise)
    total = tl.where(live, tl.sum(shrink * sums, axis=0), 1.0)
    log_sum = tl.log(total)
    logp = (scaled_and_capped(x_t, SCALE, CAP) - highest) - log_sum
    logp = tl.where(live, tl.where(known, logp, float("nan")), 0.0)
    tl.store(logp_ptr + row, logp)
    tl.store(lse_ptr + row, highest + log_sum)
    tl.store(highest_ptr + row, highest)
    tl.store(log_sum_ptr + row, log_sum)
    if ENTROPY:
        moment = tl.sum(shrink * moments + _product_or_0(shrink, rise) * sums, axis=0)
        tl.store(entropy_ptr + row, tl.where(live, log_sum - moment / total, 0.0))
    if TOP1:
        # The lanes have kept which eight logits hold their maximum, not which of the eight it is.
        first = tl.min(tl.where(top == highest, where, V), axis=0)
        col = first + tl.arange(0, 8)
        z = _load_logits(logits_ptr, col, tl.where(live, V, 0), width, CAP, SCALE, True, COMPUTE)
        first += tl.argmax(z, axis=0)
        tl.store(top1_ptr + row, tl.where(live, first, -1).to(COMPUTE))


@triton.jit
def _logprobs_bwd_kernel(
    logits_ptr, target_ptr, highest_ptr, log_sum_ptr, entropy_ptr,
    dlogp_ptr, dlse_ptr, dentropy_ptr, dlogits_ptr,
    logits_stride_b, logits_stride_t, dlogits_stride_n,
    dlogp_stride_n, dlse_stride_n, dentropy_stride_n, T, V, width, slab, ignore_index,
    CAP: tl.constexpr, SCALE: tl.constexpr,
    HAS_DLOGP: tl.constexpr, HAS_DLSE: tl.constexpr, HAS_DENTROPY: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += (row // T) * logits_stride_b + (row % T) * logits_stride_t
    t = tl.load(target_ptr + row).to(tl.int64)
    live = t != ignore_index
    known = (t >= 0) & (t < V)
    t = tl.where(known, t, 0).to(tl.int32)
    highest = tl.load(highest_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    hit = tl.zeros((), COMPUTE)
    pull = tl.zeros((), COMPUTE)
    if HAS_DLOGP:
        hit = tl.load(dlogp_ptr + row * dlogp_stride_n).to(COMPUTE)
        hit = tl.where(known, hit, float("nan"))
        pull -= hit
    if HAS_DLSE:
        pull += tl.load(dlse_ptr + row * dlse_stride_n).to(COMPUTE)
    if HAS_DENTROPY:
        dentropy = tl.load(dentropy_ptr + row * dentropy_stride_n).to(COMPUTE)
        entropy = tl.load(entropy_ptr + row)

    first = tl.program_id(1) * slab
    last = tl.minimum(first + slab, width)
    readable = tl.where(live, last, 0)
    block = tl.arange(0, BLOCK_V)
    for start in range(0, last - first, BLOCK_V):
        col = first + start + block
        x = tl.load(logits_ptr + col, mask=col < readable, other=0.0).to(COMPUTE)
        z = scaled_and_capped(x, SCALE, CAP)
        log_p = (z - highest) - log_sum
        p = exp_of(log_p)
        dz = pull * p
        if HAS_DENTROPY:
            # A forbidden class has p = 0 and log p = −∞.
            dz -= tl.where(p > 0.0, dentropy * p * (log_p + entropy), 0.0)
        dz = tl.where(col == t, dz + hit, dz)
        dx = tl.where(live, times_slope(dz, z, SCALE, CAP), 0.0)
        tl.store(dlogits_ptr + row * dlogits_stride_n + col, dx, mask=col < last)


def _logprobs_config(V: int) -> dict:
    """16 elements a thread keep two 16-byte loads in flight, as in cross entropy."""
    block_v = max(8, min(next_power_of_2(V), 2048))
    return {"BLOCK_V": block_v, "num_warps": max(1, block_v // 512)}


_SLAB = 16384


def _by_row(logits: Tensor) -> Tensor:
    """View logits (..., V) as (B, T, V) with unit stride along V; copy only if no view can do it.

    Two dimensions of rows let a shifted view, logits[:, :-1], be read where it lies.
    """
    logits = logits[None] if logits.dim() == 1 else logits
    logits = logits.reshape(-1, *logits.shape[-2:])
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def launch_fwd(
    logits: Tensor,
    target: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    rows: tuple[Tensor | None, ...],
    width: int | None = None,
) -> None:
    """Write the `rows` of new_rows, each of them contiguous.

    Rows may be padded to `width` elements of memory, which are then read too.
    """
    V = logits.shape[-1]
    logits = _by_row(logits)
    lse, entropy, top1 = rows[1:4]
    launch(
        _logprobs_fwd_kernel, (target.numel(),),
        logits, unit_stride(target.reshape(-1)), *rows,
        logits.stride(0), logits.stride(1), logits.shape[1], V, V if width is None else width,
        ignore_index,
        CAP=softcap, SCALE=logit_scale, ENTROPY=entropy is not None, TOP1=top1 is not None,
        PADDED=width is not None, LOWEST=torch.finfo(lse.dtype).min,
        IN_VECTORS=entropy is None or in_vectors(logits),
        COMPUTE=triton_dtype(lse.dtype), **_logprobs_config(V),
    )  # fmt: skip


def launch_bwd(
    logits: Tensor,
    target: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    kept: tuple[Tensor | None, ...],
    cotangents: tuple[Tensor | None, ...],
    dlogits: Tensor,
    width: int | None = None,
) -> None:
    """Write dlogits, which may be logits itself, the gradient for `cotangents` of any strides.

    `kept` are highest, log_sum and entropy; the cotangents those of logp, lse and entropy, of which
    some may be missing.
    dlogits is contiguous but for the stride of its rows, which may be padded to `width` elements:
    these are read and written too.
    """
    V = logits.shape[-1]
    logits = _by_row(logits)
    width = V if width is None else width
    highest, log_sum, entropy = (unit_stride(t) for t in kept)
    dlogp, dlse, dentropy = (None if d is None else d.reshape(-1) for d in cotangents)
    launch(
        _logprobs_bwd_kernel, (target.numel(), cdiv(width, _SLAB)),
        logits, unit_stride(target.reshape(-1)), highest, log_sum, entropy,
        dlogp, dlse, dentropy, dlogits,
        logits.stride(0), logits.stride(1), dlogits.stride(-2) if dlogits.dim() > 1 else 0,
        *(0 if d is None else d.stride(0) for d in (dlogp, dlse, dentropy)),
        logits.shape[1], V, width, _SLAB, ignore_index,
        CAP=softcap, SCALE=logit_scale,
        HAS_DLOGP=dlogp is not None, HAS_DLSE=dlse is not None, HAS_DENTROPY=dentropy is not None,
        COMPUTE=triton_dtype(log_sum.dtype), **_logprobs_config(V),
    )  # fmt: skip


def new_rows(
    like: Tensor, shape: torch.Size, with_entropy: bool, with_top1: bool
) -> tuple[Tensor | None, ...]:
    """Allocate logp, lse, entropy, top1, highest and log_sum."""
    wanted = (True, True, with_entropy, with_top1, True, True)
    dtype = accumulator(like.dtype)
    return tuple(like.new_empty(shape, dtype=dtype) if w else None for w in wanted)


def logprobs_fwd(
    logits: Tensor,
    target: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    with_entropy: bool,
    with_top1: bool,
) -> tuple[Tensor | None, ...]:
    rows = new_rows(logits, target.shape, with_entropy, with_top1)

    if has_work(rows[0]):
        launch_fwd(logits, target, softcap, logit_scale, ignore_index, rows)
    return rows


def logprobs_bwd(
    logits: Tensor,
    target: Tensor,
    entropy: Tensor | None,
    highest: Tensor,
    log_sum: Tensor,
    dlogp: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    dtop1: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    with_entropy: bool,
    with_top1: bool,
) -> tuple[Tensor]:
    dlogits = logits.new_empty(logits.shape)

    if has_work(dlogits):
        launch_bwd(
            logits, target, softcap, logit_scale, ignore_index,
            (highest, log_sum, entropy), (dlogp, dlse, dentropy), dlogits,
        )  # fmt: skip
    return (dlogits,)


_logprobs = custom_vjp(
    "logprobs",
    reference=reference_rows,
    fwd=logprobs_fwd,
    bwd=logprobs_bwd,
    results="logp lse entropy top1",
    residuals="highest log_sum",
    grads="logits",
    unused=True,
    rows="logits target logp lse entropy top1 highest log_sum",
)


def check_options(
    op: str,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
) -> None:
    """Check the numbers that every log-probability takes."""
    whole = isinstance(ignore_index, (int, torch.SymInt))
    check.number(op, "ignore_index", ignore_index, "be an integer", whole)
    check.number(op, "logit_scale", logit_scale, "be a number", True)
    check.number(op, "temperature", temperature, "be a number", True)
    if temperature <= 0:
        check.fail(op, "temperature", "be positive", temperature)
    if softcap is not None:
        check.number(op, "softcap", softcap, "be a number", True)
        if softcap <= 0:
            check.fail(op, "softcap", "be positive, or None", softcap)


def check_classes(op: str, name: str, V: int, dtype: torch.dtype, top1: bool) -> None:
    """top1 is a number of the accumulator's type until the op has returned it."""
    most = 2 / torch.finfo(accumulator(dtype)).eps
    if top1 and most < V:
        contract = f"have at most {most:.0f} classes where top1 is asked for"
        check.fail(op, name, contract, V, NotImplementedError)


def logprobs(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    lse: bool = False,
    entropy: bool = False,
    top1: bool = False,
) -> Tensor | LogProbs:
    """Compute the log-probability of each target under softmax(logits).

        z    = softcap · tanh(logit_scale · logits / softcap) / temperature
        logp = z_t − lse    lse = log Σ_v exp z_v    entropy = −Σ_v p_v · log p_v

    Args:
        logits: (..., V), floating point, any strides. They are left as they are.
        target: (...), any integer dtype: t above. A target outside [0, V) that is not ignore_index
            makes logp and the gradient of its row NaN.
        temperature: divides z, after scale and softcap.
        logit_scale: multiplies the logits before anything else.
        softcap: bounds z by tanh, as Gemma 2 does; None: no bound.
        ignore_index: rows with this target have logp, lse and entropy 0, top1 −1, and gradient
            exactly 0, whatever they hold.
        lse: whether lse is wanted too. At half the temperature it is log Σ p² + 2 · lse.
        entropy: whether the entropy is wanted too.
        top1: whether the most likely token is wanted too, the first among equals, in int64. A token
            is predicted where top1 is its target.

    Returns:
        logp (...), in float32 (float64 for float64 logits). If more is asked for, LogProbs(logp,
        lse, entropy, top1), each (...) and None unless it was asked for. All but top1 can be
        differentiated, with any upstream gradients.

    Raises:
        TypeError: logits is not floating point, target is not of an integer dtype, an option is no
            number.
        ValueError: a shape or device does not fit, an option is out of its range.
        NotImplementedError: top1 of more than 2^24 classes.

    Precision: float32 throughout (float64 for float64 logits); the gradient is rounded once. All
        is computed relative to the highest logit: a number that all logits share costs no digits.
    Memory: logits, target and 8 bytes a row (12 with the entropy) live until the backward pass,
        which allocates the gradient.
    Source: Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018.
    """
    check.floating("logprobs", "logits", logits)
    check.at_least_1d("logprobs", "logits", logits)
    if logits.shape[-1] == 0:
        check.fail("logprobs", "logits", "have at least one class", "a last size of 0")
    check_target("logprobs", "target", target, logits, "logits")
    check_options("logprobs", temperature, logit_scale, softcap, ignore_index)
    check_classes("logprobs", "logits", logits.shape[-1], logits.dtype, top1)
    scale, cap = tempered(logit_scale, softcap, temperature)
    rows = _logprobs(logits, target, cap, scale, ignore_index, bool(entropy), bool(top1))
    return asked_for(rows, lse, entropy, top1)
