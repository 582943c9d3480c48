"""Losses as modules."""

from typing import Literal

from torch import Tensor, nn

from liger_fn.functional import cross_entropy, fused_linear_cross_entropy

Reduction = Literal["none", "mean", "sum"]


class _Loss(nn.Module):
    """The options of both cross entropies; `weight`, the class weights, is a buffer as in torch."""

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction = ignore_index, reduction
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.softcap, self.logit_scale = softcap, logit_scale

    def options(self) -> dict:
        return {
            "class_weight": self.weight,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
        }

    def extra_repr(self) -> str:
        shown = {k: v for k, v in self.options().items() if k != "class_weight"}
        return ", ".join(f"{k}={v!r}" for k, v in shown.items())


class CrossEntropyLoss(_Loss):
    """Cross entropy of logits (..., V) and target (...), torch.nn.CrossEntropyLoss's and more.

    The classes are the last dimension (torch's second one is the same for a matrix). The loss is
    float32, and 0 where torch gives NaN because every target is ignored. See
    `liger_fn.functional.cross_entropy`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(input, target, **self.options())


class FusedLinearCrossEntropyLoss(_Loss):
    """Cross entropy of a linear head, whose logits are never held whole.

        loss = FusedLinearCrossEntropyLoss()(model.lm_head.weight, hidden, target)

    Takes CrossEntropyLoss's options and

    Args:
        chunk_size: rows of logits held at once; None: the op's default. See
            `liger_fn.functional.fused_linear_cross_entropy`.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(
            weight,
            ignore_index,
            reduction,
            label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
        )
        self.chunk_size = chunk_size

    def forward(
        self, weight: Tensor, input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Give the loss of the logits input (..., H) · weight (V, H)ᵀ + bias (V,)."""
        return fused_linear_cross_entropy(
            weight, input, target, self.chunk_size, bias=bias, **self.options()
        )
