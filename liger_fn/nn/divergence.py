"""Losses of two distributions, a student's and a teacher's, as modules."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from liger_fn.functional import (
    fused_linear_cosine,
    fused_linear_jsd,
    fused_linear_kl_div,
    fused_linear_tvd,
    jsd,
    kl_div,
    soft_target_cross_entropy,
    tvd,
)
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


class _FusedLinear(nn.Module):
    """What all divergences of two heads have in common; `divergence` is the function of one."""

    divergence: Callable[..., Tensor]

    def __init__(
        self,
        temperature: float = 1.0,
        hard_weight: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        *,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.temperature, self.hard_weight = temperature, hard_weight
        self.ignore_index, self.reduction = ignore_index, reduction
        self.chunk_size = chunk_size

    def options(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "hard_weight": self.hard_weight,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "chunk_size": self.chunk_size,
        }

    def forward(
        self,
        weight: Tensor,
        input: Tensor,
        teacher_weight: Tensor,
        teacher_input: Tensor,
        labels: Tensor | None = None,
        bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor:
        """Give the divergence of the heads input · weightᵀ + bias and the teacher's."""
        return self.divergence(
            weight,
            input,
            teacher_weight,
            teacher_input,
            labels,
            bias=bias,
            teacher_bias=teacher_bias,
            **self.options(),
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options().items())


class FusedLinearJSDLoss(_FusedLinear):
    """The generalised Jensen-Shannon divergence of two heads, whose logits are never held whole.

        loss = FusedLinearJSDLoss()(student.lm_head.weight, x, teacher.lm_head.weight, teacher_x)

    See `liger_fn.functional.fused_linear_jsd`.
    """

    divergence = staticmethod(fused_linear_jsd)

    def __init__(self, beta: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        self.beta = beta

    def options(self) -> dict[str, Any]:
        return {"beta": self.beta, **super().options()}


class FusedLinearKLDivLoss(_FusedLinear):
    """The Kullback-Leibler divergence of two heads, in either direction, without their logits.

    See `liger_fn.functional.fused_linear_kl_div`.
    """

    divergence = staticmethod(fused_linear_kl_div)

    def __init__(self, reverse: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.reverse = reverse

    def options(self) -> dict[str, Any]:
        return {"reverse": self.reverse, **super().options()}


class FusedLinearCosineLoss(_FusedLinear):
    """How far the logits of two heads, which are never held whole, point apart.

    See `liger_fn.functional.fused_linear_cosine`.
    """

    divergence = staticmethod(fused_linear_cosine)

    def __init__(
        self,
        hard_weight: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        *,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(1.0, hard_weight, ignore_index, reduction, chunk_size=chunk_size)

    def options(self) -> dict[str, Any]:
        return {name: value for name, value in super().options().items() if name != "temperature"}


class FusedLinearTVDLoss(_FusedLinear):
    """The total variation distance of two heads, whose logits are never held whole.

    See `liger_fn.functional.fused_linear_tvd`.
    """

    divergence = staticmethod(fused_linear_tvd)
