"""Total variation distance of two distributions. Kernels and traffic: divergence.py.

    loss = ½ · Σ_v |q_v − p_v|
    dq_v = dloss · ½ · sign(q_v − p_v)                dp_v = −dq_v

with q the input (of the student) and p the target (of the teacher). Memory traffic in bytes per
element of 2-byte inputs: 4 forward (read both), 6 backward (read both, write the gradient).
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
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    loss = _reference(input, target, labels, ignore_index)
    return divergence.reduced(loss, labels, ignore_index, reduction)


def _reference(input: Tensor, target: Tensor, labels: Tensor | None, ignore_index: int) -> Tensor:
    return divergence.reference_rows(input, target, labels, "tvd", 0.0, ignore_index)


def tvd_fwd(
    input: Tensor, target: Tensor, labels: Tensor | None, ignore_index: int
) -> tuple[Tensor]:
    return divergence.divergence_fwd(input, target, labels, "tvd", 0.0, ignore_index)


def tvd_bwd(
    input: Tensor,
    target: Tensor,
    labels: Tensor | None,
    dloss: Tensor,
    ignore_index: int,
    need_dinput: bool,
    need_dtarget: bool,
) -> tuple[Tensor | None, Tensor | None]:
    return divergence.divergence_bwd(
        input, target, labels, dloss, "tvd", 0.0, ignore_index, need_dinput, need_dtarget
    )


_tvd = custom_vjp(
    "tvd",
    reference=_reference,
    fwd=tvd_fwd,
    bwd=tvd_bwd,
    results="loss",
    grads="input target",
    rows="input target labels loss",
)


def tvd(
    input: Tensor,
    target: Tensor,
    labels: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Compute the total variation distance of two distributions.

        loss = ½ · Σ_v |input_v − target_v|

    Args:
        input: (..., V), probabilities of the student, floating point, any strides. They are left as
            they are.
        target: (..., V), probabilities of the teacher, floating point, any strides.
        labels: (...), any integer dtype: says which rows are ignored; None: none is.
        ignore_index: rows with this label have loss 0 and gradient exactly 0, whatever they hold.
        reduction: "none": a distance per row; "sum"; "mean": the sum over the number of rows that
            are not ignored, 0 if all are.

    Returns:
        float32 (float64 if an input is): a scalar, or (...) for "none".

    Raises:
        TypeError: input or target is not a floating-point tensor, labels are not of an integer
            dtype, ignore_index is no number.
        ValueError: a shape or device does not fit, input has no class, the reduction is unknown.

    Precision: float32 throughout (float64 if an input is); every gradient is rounded once. Where
        both sides are equal the gradient is 0.
    Memory: input, target and labels live until the backward pass, which allocates the gradients
        that are wanted.
    Source: Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation", 2023.
    """
    divergence.check_pair("tvd", input, target)
    divergence.check_labels("tvd", input, labels, ignore_index)
    check.one_of("tvd", "reduction", reduction, REDUCTIONS)
    loss = _tvd(input, target, labels, ignore_index)
    return divergence.reduced(loss, labels, ignore_index, reduction)
