"""Losses of two distributions, a student's and a teacher's, as modules."""

from typing import Literal

from torch import Tensor, nn

from liger_fn.functional import jsd, kl_div, soft_target_cross_entropy, tvd
from liger_fn.nn.loss import Reduction


class KLDivLoss(nn.Module):
    """The Kullback-Leibler divergence of a target from log probabilities, torch.nn.KLDivLoss's.

    `reduction` may also be "row": a divergence per row. See `liger_fn.functional.kl_div`.
    """

    def __init__(
        self,
        reduction: Literal["none", "row", "batchmean", "sum", "mean"] = "mean",
        log_target: bool = False,
    ) -> None:
        super().__init__()
        self.reduction, self.log_target = reduction, log_target

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return kl_div(input, target, reduction=self.reduction, log_target=self.log_target)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, log_target={self.log_target}"


class JSDLoss(nn.Module):
    """The generalised Jensen-Shannon divergence of two log probabilities.

    See `liger_fn.functional.jsd`.
    """

    def __init__(
        self, beta: float = 0.5, ignore_index: int = -100, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        self.beta, self.ignore_index, self.reduction = beta, ignore_index, reduction

    def forward(self, input: Tensor, target: Tensor, labels: Tensor | None = None) -> Tensor:
        return jsd(
            input,
            target,
            labels,
            beta=self.beta,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"beta={self.beta}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"


class TVDLoss(nn.Module):
    """The total variation distance of two distributions. See `liger_fn.functional.tvd`."""

    def __init__(self, ignore_index: int = -100, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.ignore_index, self.reduction = ignore_index, reduction

    def forward(self, input: Tensor, target: Tensor, labels: Tensor | None = None) -> Tensor:
        return tvd(input, target, labels, ignore_index=self.ignore_index, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"


class SoftTargetCrossEntropyLoss(nn.Module):
    """Cross entropy of logits and target probabilities, which torch.nn.CrossEntropyLoss takes too.

    See `liger_fn.functional.soft_target_cross_entropy`.
    """

    def __init__(
        self,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        *,
        logit_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.reduction, self.label_smoothing = reduction, label_smoothing
        self.logit_scale = logit_scale

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return soft_target_cross_entropy(
            input,
            target,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
        )

    def extra_repr(self) -> str:
        return (
            f"reduction={self.reduction!r}, label_smoothing={self.label_smoothing}, "
            f"logit_scale={self.logit_scale}"
        )
