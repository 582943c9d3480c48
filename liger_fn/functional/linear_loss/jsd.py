"""Generalised Jensen-Shannon divergence of two linear heads. Chunks and kernel: divergence.py.

    log q = log_softmax((x · weightᵀ + bias) / temperature), log p the same of the teacher
    loss  = Σ_rows w_row · (jsd(log q, log p) + hard_weight · cross_entropy(logits, label))

`jsd` is loss/jsd.py's: β = 0 is KL(p ‖ q), β = 1 is KL(q ‖ p).
"""

from torch import Tensor

from liger_fn.functional.linear_loss.divergence import Head, Terms, computed, reference_of
from liger_fn.functional.loss.jsd import kind_of


def reference(
    weight: Tensor,
    x: Tensor,
    teacher_weight: Tensor,
    teacher_x: Tensor,
    labels: Tensor | None = None,
    chunk_size: int | None = None,
    *,
    beta: float = 0.5,
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
        Terms(kind_of(beta), beta, temperature, hard_weight, ignore_index),
        num_items=num_items,
        reduction=reduction,
    )


def fused_linear_jsd(
    weight: Tensor,
    x: Tensor,
    teacher_weight: Tensor,
    teacher_x: Tensor,
    labels: Tensor | None = None,
    chunk_size: int | None = None,
    *,
    beta: float = 0.5,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Compute the Jensen-Shannon divergence of two linear heads without holding their logits.

        q = softmax((x · weightᵀ + bias) / temperature), p the same of the teacher
        loss = β · KL(p ‖ m) + (1 − β) · KL(q ‖ m), m = β · p + (1 − β) · q

    and hard_weight times the cross entropy of the student's logits and labels. For β = 0 it is
    KL(p ‖ q), for β = 1 KL(q ‖ p), as knowledge distillation has it.

    Args:
        weight: (V, H), floating point: the student's head, as torch.nn.Linear holds it.
        x: (..., H), the dtype of weight (under autocast all are cast as F.linear casts them).
        teacher_weight: (V, K), floating point: the teacher's head, of a width of its own. Of a
            vocabulary that is padded give the first V rows.
        teacher_x: (..., K), the dtype of teacher_weight, which may be another than that of weight.
        labels: (...), any integer dtype: say which rows are ignored, and are the targets of the
            hard loss; None: no row is ignored.
        chunk_size: rows of logits held at once; None: what `memory_budget` allows. Results agree
            for every size up to rounding.
        bias, teacher_bias: (V,), the dtypes of weight and teacher_weight; None: no bias.
        beta: β, between 0 and 1.
        temperature: divides both logits. Gradients shrink with its square, by which distillation
            often multiplies the loss.
        hard_weight: the weight of the cross entropy of the student's logits, at temperature 1, and
            labels. A label outside [0, V) that is not ignore_index then makes loss and gradients
            NaN.
        ignore_index: rows with this label have loss 0 and gradient exactly 0.
        reduction: "none": a loss per row; "sum"; "mean": the sum over the number of rows that are
            not ignored, 0 if all are.
        num_items: what "mean" divides by, a number or a scalar tensor on any device, for those who
            average over more than this call; None: the number of rows that are not ignored.
        memory_budget: bytes of both logits held at once; None: as `fused_linear_cross_entropy`.

    Returns:
        float32 (float64 if an input is): a scalar, or (...) for "none". weight, x and bias get
        gradients, the teacher none.

    Raises:
        TypeError: a factor is not floating point, the dtypes of a head's differ, labels are not of
            an integer dtype, an option is no number.
        ValueError: a shape or device does not fit, an option is out of its range.

    Precision: logits and their gradients are rounded to the dtypes of x and teacher_x, as F.linear
        rounds them; losses never are. Sums over chunks are held as those of
        `fused_linear_cross_entropy`. float64 throughout for float64 inputs.
    Memory: above inputs and gradients, both logits of one chunk while a pass runs, and for sums in
        float32 another 4·V·H bytes; with labels on Hopper also x and teacher_x once more and
        17 MiB. Until the backward pass live the inputs and, for "mean" and "sum", the wanted
        gradients; that of "none" makes both logits again. The reference, which is what runs on a
        CPU, holds all logits.
    Source: Agarwal et al., "On-Policy Distillation of Language Models", 2024; Hsu et al., "Liger
        Kernel: Efficient Triton Kernels for LLM Training", 2024 (gradients made forward).
    """
    return computed(
        "fused_linear_jsd",
        Head(weight, x, bias),
        Head(teacher_weight, teacher_x, teacher_bias),
        labels,
        chunk_size,
        Terms(kind_of(beta), beta, temperature, hard_weight, ignore_index),
        memory_budget=memory_budget,
        num_items=num_items,
        reduction=reduction,
    )
