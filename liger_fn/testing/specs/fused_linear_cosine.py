"""Facts about fused_linear_cosine."""

from dataclasses import replace

import torch.nn.functional as F

from liger_fn.functional import fused_linear_cosine
from liger_fn.functional.linear_loss import cosine as room
from liger_fn.testing.specs.fused_linear_divergence import SHAPES, benchmark, case, sizes, spec


def apart(z, y):
    return 1.0 - F.cosine_similarity(z, y, dim=-1)


_SHARED = spec(
    op=fused_linear_cosine,
    module=room,
    rows=apart,
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
    sizes=(
        *(s for s in sizes() if s.id not in ("40x64x1000", "no-features-rows")),
        case(40, 64, 1000, chunk_size=16, K=32),
    ),
    errors=tuple(e for e in _SHARED.errors if e.id != "temperature"),
)
