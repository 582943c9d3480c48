"""Cross entropy where each process holds the logits, or the head, of a part of the vocabulary.

    lse_r = log Σ_v exp z_v over the classes of process r
    lse   = log Σ_r exp lse_r           loss = lse − z_t, of which one process holds z_t

Each process reads its own logits once (`logprobs`); of a row five numbers travel in two reductions,
one for the highest lse_r and one for the sums. Every process then has the whole loss, and the
gradient of its own classes, exp(lse_r − lse) · softmax over them, less 1 at the target: nothing
travels backward.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.linear_loss.logprobs import fused_linear_logprobs
from liger_fn.functional.loss.cross_entropy import REDUCTIONS, check_target
from liger_fn.functional.loss.divergence import reduced
from liger_fn.functional.loss.logprobs import logprobs


def _of_shards(
    op: str,
    logprobs_of: Callable[..., Tensor],
    classes: int,
    target: Tensor,
    group: dist.ProcessGroup | None,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """The loss, of a function that gives log-probabilities among this process's classes."""
    check.one_of(op, "reduction", reduction, REDUCTIONS)
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    own = target.long() - rank * classes
    live = target.long() != ignore_index
    mine = live & (own >= 0) & (own < classes)
    # Rows whose target is elsewhere are asked for some class, for the sake of their lse.
    asked = torch.where(mine, own, 0).masked_fill(~live, -1)
    logp, lse = logprobs_of(asked, ignore_index=-1, lse=True)[:2]
    z_t = torch.where(mine, logp + lse, 0.0)

    own_lse, own_z_t = lse.detach(), z_t.detach()
    highest = _over(own_lse, dist.ReduceOp.MAX, group)
    sums = torch.stack([(own_lse - highest).exp(), own_z_t, mine.to(lse.dtype)])
    total, whole_z_t, found = _over(sums, dist.ReduceOp.SUM, group)
    whole = highest + total.log()
    # The values are those of all processes, the slopes those of the own classes.
    whole = whole + (own_lse - whole).exp() * (lse - own_lse)
    loss = whole - (whole_z_t + (z_t - own_z_t))
    loss = loss.masked_fill(found == 0, torch.nan).masked_fill(~live, 0.0)
    return reduced(loss, target, ignore_index, reduction)


def _over(t: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    if not dist.is_initialized():
        return t
    t = t.clone()
    dist.all_reduce(t, op, group)
    return t


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Compute the cross entropy of logits whose classes are spread over processes.

    Args:
        logits: (..., V / processes), floating point, any strides: on the process of rank r the
            classes from r · V / processes on, of the same rows everywhere.
        target: (...), any integer dtype, the same on every process: classes of all V.
        group: the processes; None: all, or this one alone where there is no process group.
        ignore_index: rows with this target have loss and gradient 0 and are not counted.
        softcap, logit_scale: as in `cross_entropy`.
        reduction: "none", "sum" or "mean", over the rows that are not ignored.

    Returns:
        The same on every process, float32 (float64 for float64 logits): a scalar, or (...) for
        "none". Each process gets the gradient of its own logits; their first derivatives alone.

    Raises:
        TypeError: logits is not floating point, target is not of an integer dtype, an option is no
            number.
        ValueError: a shape or device does not fit, an option is out of its range.

    Precision: float32 throughout; the gradient is rounded once. A target outside [0, V) that is not
        ignore_index gives NaN, and so does a row of which a process has nothing but −∞.
    Memory: logits, target and 8 bytes a row live until the backward pass.
    Source: Shoeybi et al., "Megatron-LM", 2019.
    """
    op = "vocab_parallel_cross_entropy"
    check.floating(op, "logits", logits)
    check.at_least_1d(op, "logits", logits)
    check_target(op, "target", target, logits, "logits")

    def of(y: Tensor, **options):
        return logprobs(logits, y, softcap=softcap, logit_scale=logit_scale, **options)

    return _of_shards(op, of, logits.shape[-1], target, group, ignore_index, reduction)


def fused_linear_vocab_parallel_cross_entropy(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    chunk_size: int | None = None,
    *,
    bias: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Compute the cross entropy of a head whose classes are spread over processes.

    Args:
        weight: (V / processes, H), floating point: on the process of rank r the classes from
            r · V / processes on.
        x: (..., H), the dtype of weight, the same on every process.
        y: (...), any integer dtype, the same on every process: classes of all V.
        chunk_size: how many rows of logits are held at once; None: as in `fused_linear_logprobs`.
        bias: (V / processes,), the dtype of weight; None: no bias.
        group, ignore_index, softcap, logit_scale, reduction: as in `vocab_parallel_cross_entropy`.

    Returns:
        As `vocab_parallel_cross_entropy`. **The gradient of x is this process's part**: what makes
        the same x on every process adds the parts up in its backward pass, as tensor parallelism
        does.

    Raises:
        TypeError, ValueError: as `fused_linear_logprobs`.

    Precision: that of `fused_linear_logprobs`.
    Memory: that of `fused_linear_logprobs`.
    Source: Shoeybi et al., "Megatron-LM", 2019.
    """
    op = "fused_linear_vocab_parallel_cross_entropy"
    check.floating(op, "weight", weight)
    check.integer(op, "y", y)

    def of(asked: Tensor, **options):
        return fused_linear_logprobs(
            weight, x, asked, chunk_size, bias=bias, softcap=softcap, logit_scale=logit_scale,
            **options,
        )  # fmt: skip

    return _of_shards(op, of, weight.shape[0], y, group, ignore_index, reduction)
