"""Kullback-Leibler divergences of two linear heads. Chunks and kernel: divergence.py.

    log q = log_softmax((x · weightᵀ + bias) / temperature), log p the same of the teacher
    loss  = Σ_rows w_row · (KL(p ‖ q) + hard_weight · cross_entropy(logits, label))

or KL(q ‖ p) instead. Of KL(p ‖ q) the gradient of the logits is (q − p) / temperature.
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
    reverse: bool = False,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
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
        Terms("reverse_kl" if reverse else "kl_log", 0.0, temperature, hard_weight, ignore_index),
        num_items=num_items,
        reduction=reduction,
    )


def fused_linear_kl_div(
    weight: Tensor,
    x: Tensor,
    teacher_weight: Tensor,
    teacher_x: Tensor,
    labels: Tensor | None = None,
    chunk_size: int | None = None,
    *,
    reverse: bool = False,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Compute the Kullback-Leibler divergence of two linear heads without holding their logits.

        q = softmax((x · weightᵀ + bias) / temperature), p the same of the teacher
        loss = KL(p ‖ q) = Σ_v p_v · (log p_v − log q_v), or KL(q ‖ p) if `reverse`

    and hard_weight times the cross entropy of the student's logits and labels.

    Args:
        weight, x, teacher_weight, teacher_x, labels, chunk_size, bias, teacher_bias: as in
            `fused_linear_jsd`.
        reverse: KL(q ‖ p), which makes the student seek the teacher's modes; else KL(p ‖ q), which
            makes it cover them.
        temperature, hard_weight, ignore_index, reduction, num_items, memory_budget: as in
            `fused_linear_jsd`.

    Returns:
        float32 (float64 if an input is): a scalar, or (...) for "none". weight, x and bias get
        gradients, the teacher none.

    Raises:
        TypeError: a factor is not floating point, the dtypes of a head's differ, labels are not of
            an integer dtype, an option is no number.
        ValueError: a shape or device does not fit, an option is out of its range.

    Precision: that of `fused_linear_jsd`.
    Memory: that of `fused_linear_jsd`.
    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015; Gu et al.,
        "MiniLLM: Knowledge Distillation of Large Language Models", 2024 (reverse).
    """
    return computed(
        "fused_linear_kl_div",
        Head(weight, x, bias),
        Head(teacher_weight, teacher_x, teacher_bias),
        labels,
        chunk_size,
        Terms("reverse_kl" if reverse else "kl_log", 0.0, temperature, hard_weight, ignore_index),
        memory_budget=memory_budget,
        num_items=num_items,
        reduction=reduction,
    )
