"""Generalised Jensen-Shannon divergence of two log probabilities. Kernels: divergence.py.

    m    = β · p + (1 − β) · q
    loss = β · Σ_v p_v · (log p_v − log m_v) + (1 − β) · Σ_v q_v · (log q_v − log m_v)

    dlog q_v = dloss · (1 − β) · q_v · (log q_v − log m_v)
    dlog p_v = dloss · β · p_v · (log p_v − log m_v)

with log q the input (of the student) and log p the target (of the teacher). At its ends, where this
vanishes, it stands for what it is proportional to nearby: β = 0 is KL(p ‖ q), β = 1 is KL(q ‖ p).
Memory traffic in bytes per element of 2-byte inputs: 4 forward (read both), 6 backward (read both,
write the gradient), 4 for β = 0.
"""

from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.loss import divergence
from liger_fn.functional.loss.cross_entropy import REDUCTIONS


def reference(
    input: Tensor,
    target: Tensor,
    labels: Tensor | None = None,
    *,
    beta: float = 0.5,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    loss = _reference(input, target, labels, beta, ignore_index)
    return divergence.reduced(loss, labels, ignore_index, reduction)


def _reference(
    input: Tensor, target: Tensor, labels: Tensor | None, beta: float, ignore_index: int
) -> Tensor:
    return divergence.reference_rows(input, target, labels, kind_of(beta), beta, ignore_index)


def kind_of(beta: float) -> str:
    """The terms whose sum the divergence of this β is."""
    return {0.0: "kl_log", 1.0: "reverse_kl"}.get(beta, "jsd")


def jsd_fwd(
    input: Tensor, target: Tensor, labels: Tensor | None, beta: float, ignore_index: int
) -> tuple[Tensor]:
    return divergence.divergence_fwd(input, target, labels, kind_of(beta), beta, ignore_index)


def jsd_bwd(
    input: Tensor,
    target: Tensor,
    labels: Tensor | None,
    dloss: Tensor,
    beta: float,
    ignore_index: int,
    need_dinput: bool,
    need_dtarget: bool,
) -> tuple[Tensor | None, Tensor | None]:
    return divergence.divergence_bwd(
        input, target, labels, dloss, kind_of(beta), beta, ignore_index, need_dinput, need_dtarget
    )


_jsd = custom_vjp(
    "jsd",
    reference=_reference,
    fwd=jsd_fwd,
    bwd=jsd_bwd,
    results="loss",
    grads="input target",
    rows="input target labels loss",
)


def jsd(
    input: Tensor,
    target: Tensor,
    labels: Tensor | None = None,
    *,
    beta: float = 0.5,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Compute the generalised Jensen-Shannon divergence of two log probabilities.

        loss = β · KL(p ‖ m) + (1 − β) · KL(q ‖ m)        m = β · p + (1 − β) · q

    with q = exp(input) and p = exp(target); for β = 0 KL(p ‖ q), for β = 1 KL(q ‖ p), as knowledge
    distillation has it.

    Args:
        input: (..., V), log probabilities of the student, floating point, any strides. They are
            left as they are.
        target: (..., V), log probabilities of the teacher, floating point, any strides.
        labels: (...), any integer dtype: says which rows are ignored; None: none is.
        beta: β, between 0 and 1.
        ignore_index: rows with this label have loss 0 and gradient exactly 0, whatever they hold.
        reduction: "none": a divergence per row; "sum"; "mean": the sum over the number of rows that
            are not ignored, 0 if all are.

    Returns:
        float32 (float64 if an input is): a scalar, or (...) for "none".

    Raises:
        TypeError: input or target is not a floating-point tensor, labels are not of an integer
            dtype, beta or ignore_index is no number.
        ValueError: a shape or device does not fit, input has no class, beta is not between 0 and 1,
            the reduction is unknown.

    Precision: float32 throughout (float64 if an input is); every gradient is rounded once. Log
        probabilities below −10⁴ count as −10⁴ where 0 < β < 1: their probabilities are 0 in every
        dtype.
    Memory: input, target and labels live until the backward pass, which allocates the gradients
        that are wanted.
    Source: Lin, "Divergence Measures Based on the Shannon Entropy", 1991; Agarwal et al.,
        "On-Policy Distillation of Language Models", 2024.
    """
    divergence.check_pair("jsd", input, target)
    divergence.check_labels("jsd", input, labels, ignore_index)
    check.number("jsd", "beta", beta, "be a number", True)
    if not 0 <= beta <= 1:
        check.fail("jsd", "beta", "be between 0 and 1", beta)
    check.one_of("jsd", "reduction", reduction, REDUCTIONS)
    loss = _jsd(input, target, labels, float(beta), ignore_index)
    return divergence.reduced(loss, labels, ignore_index, reduction)
