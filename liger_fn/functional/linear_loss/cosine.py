"""1 − cosine of the angle between the logits of two linear heads. Chunks and kernel: divergence.py.

z = x · weightᵀ + bias, y the same of the teacher
loss = Σ_rows w_row · (1 − z · y / (|z| · |y|) + hard_weight · cross_entropy(z, label))
"""

from torch import Tensor

from liger_fn.functional.linear_loss.divergence import Head, Terms, computed, reference_of


def reference(
    weight: Tensor,
    x: Tensor,
    teacher_weight: Tensor,
    teacher_x: Tensor,
    labels: Tensor | None = None,
    chunk_size: int | None = None,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    return reference_of(
        Head(weight, x, bias),
        Head(teacher_weight, teacher_x, teacher_bias),
        labels,
        Terms("cosine", 0.0, 1.0, hard_weight, ignore_index),
        num_items=num_items,
        reduction=reduction,
    )


def fused_linear_cosine(
    weight: Tensor,
    x: Tensor,
    teacher_weight: Tensor,
    teacher_x: Tensor,
    labels: Tensor | None = None,
    chunk_size: int | None = None,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Compute how far the logits of two linear heads point apart, without holding them.

        z = x · weightᵀ + bias, y the same of the teacher
        loss = 1 − z · y / (|z| · |y|)

    and hard_weight times the cross entropy of the student's logits and labels. A common factor of
    the logits, such as a temperature, changes nothing in the first.

    Args:
        weight, x, teacher_weight, teacher_x, labels, chunk_size, bias, teacher_bias: as in
            `fused_linear_jsd`.
        hard_weight, ignore_index, reduction, num_items, memory_budget: as in `fused_linear_jsd`.

    Returns:
        float32 (float64 if an input is): a scalar, or (...) for "none". weight, x and bias get
        gradients, the teacher none.

    Raises:
        TypeError: a factor is not floating point, the dtypes of a head's differ, labels are not of
            an integer dtype, an option is no number.
        ValueError: a shape or device does not fit, an option is out of its range.

    Precision: that of `fused_linear_jsd`. Lengths below 1e-8 count as 1e-8.
    Memory: that of `fused_linear_jsd`.
    Source: Park et al., "Relational Knowledge Distillation", 2019, on angles between outputs.
    """
    return computed(
        "fused_linear_cosine",
        Head(weight, x, bias),
        Head(teacher_weight, teacher_x, teacher_bias),
        labels,
        chunk_size,
        Terms("cosine", 0.0, 1.0, hard_weight, ignore_index),
        memory_budget=memory_budget,
        num_items=num_items,
        reduction=reduction,
    )
