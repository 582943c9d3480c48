"""Facts about fused_linear_kl_div."""

import torch.nn.functional as F

from liger_fn.functional import fused_linear_kl_div
from liger_fn.functional.linear_loss import kl_div as room
from liger_fn.testing.specs.fused_linear_divergence import (
    SHAPES,
    benchmark,
    case,
    of_distributions,
    spec,
)


def terms(log_q, log_p, reverse=False):
    if reverse:
        log_q, log_p = log_p, log_q
    return F.kl_div(log_q, log_p, reduction="none", log_target=True)


SPEC = spec(
    op=fused_linear_kl_div,
    module=room,
    rows=of_distributions(terms),
    cases=(
        case(4, 3, 7, chunk_size=3, bias=True, labelled=True, hard_weight=0.5, id="chunks-of-3"),
        case(2, 3, 5, 9, reverse=True, id="reverse"),
        case(5, 4, 7, chunk_size=2, reduction="none", bias=True, temperature=2.0, id="rows"),
        case(
            4, 3, 7, chunk_size=3, labelled=True, hard_weight=0.3, temperature=0.7,
            reverse=True, reduction="sum", id="reverse-hard",
        ),
    ),
    more_sizes=(
        case(37, 64, 1000, chunk_size=16, K=32, reverse=True, labelled=True, id="wide-reverse"),
    ),
    kinds=(("kl_log", 0.0), ("reverse_kl", 0.0)),
    benchmarks=(*(benchmark(*s) for s in SHAPES), benchmark(*SHAPES[0], reverse=True)),
)  # fmt: skip
