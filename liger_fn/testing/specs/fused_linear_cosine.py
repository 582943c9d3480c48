"""Facts about fused_linear_cosine."""

from dataclasses import replace

import torch.nn.functional as F

from liger_fn.functional import fused_linear_cosine
from liger_fn.functional.linear_loss import cosine as room
from liger_fn.functional.loss.divergence import compute_dtype
from liger_fn.testing.specs.fused_linear_divergence import SHAPES, benchmark, case, sizes, spec


def with_logits(
    weight, x, teacher_weight, teacher_x, labels=None, chunk_size=None, *, bias=None,
    teacher_bias=None, hard_weight=0.0, ignore_index=-100, reduction="mean", num_items=None,
    memory_budget=None,
):  # fmt: skip
    """The op with its logits, and arithmetic on them in float32, whatever their dtype."""
    compute = compute_dtype(x, teacher_x)
    z = F.linear(x, weight, bias).to(compute)
    y = F.linear(teacher_x, teacher_weight, teacher_bias).to(compute)
    loss = 1.0 - F.cosine_similarity(z, y, dim=-1)
    count = max(loss.numel(), 1)
    if labels is not None:
        live = labels != ignore_index
        count = live.sum().clamp(min=1)
        loss = loss.masked_fill(~live, 0.0)
        if hard_weight:
            hard = F.cross_entropy(
                z.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="none"
            )
            loss = loss + hard_weight * hard.view(loss.shape)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (num_items or count)


_SHARED = spec(
    op=fused_linear_cosine,
    module=room,
    terms=lambda log_q, log_p: log_q,
    cases=(
        case(4, 3, 7, chunk_size=3, bias=True, labelled=True, hard_weight=0.5, id="chunks-of-3"),
        case(2, 3, 5, 9, id="one-chunk"),
        case(5, 4, 7, chunk_size=2, reduction="none", labelled=True, id="rows"),
    ),
    kinds=(("cosine", 0.0),),
    benchmarks=tuple(benchmark(*s) for s in SHAPES),
)
# It has no temperature; and of no features all logits are 0, which point nowhere.
SPEC = replace(
    _SHARED,
    baseline=with_logits,
    sizes=(
        *(s for s in sizes() if s.id not in ("40x64x1000", "no-features-rows")),
        case(40, 64, 1000, chunk_size=16, K=32),
    ),
    errors=tuple(e for e in _SHARED.errors if e.id != "temperature"),
)
