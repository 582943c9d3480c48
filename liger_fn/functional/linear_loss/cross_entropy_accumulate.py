"""The loss of fused_linear_cross_entropy, with dweight added to an accumulator.

    loss, dweight + dloss/dweight = fused_linear_cross_entropy_accumulate(dweight, weight, x, y)

For those who keep main gradients in float32 over many micro-batches: the last product adds straight
into them, so no gradient in 16 bits is made, rounded and added. A gradient among the results is no
business of autograd, so this is a plain function and no op of custom_vjp: it knows forward and one
backward pass, eagerly, and nothing else.
"""

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.core.backend import kernels_on, on_device
from liger_fn.functional.core.custom_vjp import watched
from liger_fn.functional.core.launch import accumulator, has_work
from liger_fn.functional.core.rules import dtype_inside
from liger_fn.functional.linear_loss.chunks import Limits, check_budget, check_head
from liger_fn.functional.linear_loss.cross_entropy import (
    check_items,
    items_of,
    reference_of_sum,
    sum_over_chunks,
    times_scalar,
)
from liger_fn.functional.loss.cross_entropy import check_options

OP = "fused_linear_cross_entropy_accumulate"
Options = tuple[int, float, float, float | None, float]


def _reference(
    total: Tensor, weight: Tensor, x: Tensor, y: Tensor, bias: Tensor | None,
    class_weight: Tensor | None, row_weight: Tensor | None, limits: Limits, options: Options,
) -> Tensor:  # fmt: skip
    names = ("ignore_index", "label_smoothing", "z_loss", "softcap", "logit_scale")
    # In the dtype of the total throughout: in 16 bits the gradient would be rounded before the sum.
    leaf, bias = weight.to(total.dtype).requires_grad_(), None if bias is None else bias.to(total)
    with torch.enable_grad():
        loss = reference_of_sum(
            row_weight, weight=leaf, x=x.to(total), y=y, bias=bias, class_weight=class_weight,
            chunk_size=limits.chunk_size, memory_budget=limits.memory_budget, wide=True,
            **dict(zip(names, options, strict=True)),
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    total += gradient
    return loss


class _Accumulate(torch.autograd.Function):
    """Adds to `total`, and keeps dx for the backward pass."""

    @staticmethod
    def forward(ctx, x, total, weight, y, bias, class_weight, row_weight, limits, options):
        dx = x.new_empty(x.shape) if ctx.needs_input_grad[0] else None
        loss = sum_over_chunks(
            weight, x, y, bias, class_weight, row_weight, limits, options, total, dx, None, True
        )
        ctx.save_for_backward(dx)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        (dx,) = ctx.saved_tensors
        return times_scalar(dx, dloss, dx.dtype, donated=False), *(None,) * 8


def fused_linear_cross_entropy_accumulate(
    dweight: Tensor,
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    chunk_size: int | None = None,
    *,
    donate: bool = False,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    num_items: Tensor | float | None = None,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the loss of a linear head, and add its gradient to that of earlier batches.

        loss = fused_linear_cross_entropy(weight, x, y)         total = dweight + dloss/dweight

    The gradient is that of the loss as it is returned: whoever averages over several batches says
    so by `num_items`, and does not scale the loss afterwards.

    Args:
        dweight: (V, H), float32 (float64 for float64 x): the sum so far.
        weight, x, y, chunk_size, bias, class_weight, ignore_index, label_smoothing, z_loss,
            softcap, logit_scale, num_items, memory_budget: as in `fused_linear_cross_entropy`.
            weight and bias are constants: the loss gives a gradient to x alone.
        donate: give dweight away: its memory takes the total, and dweight is not to be used again.
            Without it dweight keeps its values, and the total costs a copy.
        reduction: "mean" or "sum".

    Returns:
        The loss, a float32 scalar (float64 for float64 x) that can be differentiated once, and the
        total, like dweight, which cannot.

    Raises:
        TypeError, ValueError: as `fused_linear_cross_entropy`; dweight has another dtype or shape.
        NotImplementedError: x is float16, in which gradients that nothing scales lose their bits;
            a transform, a compiler or a tensor subclass watches the call.

    Precision: as `fused_linear_cross_entropy`, the total in float32 throughout.
    Memory: above dweight and, unless it is donated, its copy: the logits of one chunk, and dx.
    Source: Shoeybi et al., "Megatron-LM", 2019, whose linear layers add to main gradients so.
    """
    _check(dweight, weight, x, y, bias, chunk_size, reduction)
    check_options(
        OP, x, "x", weight.shape[0], class_weight, ignore_index, reduction,
        label_smoothing, z_loss, softcap, logit_scale,
    )  # fmt: skip
    check_budget(OP, memory_budget)
    check_items(OP, num_items, reduction)

    row_weight = None
    if reduction == "mean":
        items = items_of(num_items, x, y, class_weight, ignore_index)
        row_weight = items.reciprocal().expand(y.shape)
    inside = dtype_inside(x)
    x, weight = x.to(inside), weight.detach().to(inside)
    bias = None if bias is None else bias.detach().to(inside)
    total = (
        dweight.detach()
        if donate and dweight.is_contiguous()
        else dweight.detach().clone(memory_format=torch.contiguous_format)
    )
    limits = Limits(chunk_size, memory_budget)
    options = (ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    rest = (weight, y, bias, class_weight, row_weight, limits, options)
    if has_work(y) and kernels_on(x):
        loss = _accumulate(x, total, *rest)
    else:
        loss = _reference(total, weight, x, *rest[1:])
    return loss, total


_accumulate = on_device(_Accumulate.apply)


def _check(
    dweight: Tensor,
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    chunk_size: int | None,
    reduction: str,
) -> None:
    if torch.compiler.is_compiling() or watched((dweight, weight, x, y, bias)):
        contract = "be a plain tensor in eager mode, for no transform knows this function"
        check.fail(OP, "x", contract, "a watched call", NotImplementedError)
    check_head(OP, weight, x, y, bias, chunk_size)
    check.tensor(OP, "dweight", dweight)
    check.shape(OP, "dweight", dweight, weight.shape, "that of `weight`")
    check.device(OP, "dweight", dweight, x, "x")
    inside = dtype_inside(x)
    if inside is torch.float16:
        contract = "be bfloat16 or wider: nothing scales its gradients"
        check.fail(OP, "x", contract, inside, NotImplementedError)
    if dweight.dtype is not accumulator(inside):
        contract = f"have the dtype {accumulator(inside)}"
        check.fail(OP, "dweight", contract, dweight.dtype, TypeError)
    check.one_of(OP, "reduction", reduction, ("mean", "sum"))
