"""Facts about fused_linear_jsd."""

import torch

from liger_fn.functional import fused_linear_jsd
from liger_fn.functional.linear_loss import jsd as room
from liger_fn.testing.spec import BadCall
from liger_fn.testing.specs.fused_linear_divergence import (
    SHAPES,
    benchmark,
    case,
    good,
    of_distributions,
    spec,
)
from liger_fn.testing.specs.jsd import as_trl


def bad(id: str, beta, error: type[Exception], sentence: str) -> BadCall:
    def make(draw):
        return good(draw) | {"beta": beta}

    return BadCall(id, make, error, f"fused_linear_jsd: {sentence}")


def terms(log_q, log_p, beta=0.5):
    return as_trl(log_q[..., None], log_p[..., None], beta=beta, reduction="none")


SPEC = spec(
    op=fused_linear_jsd,
    module=room,
    rows=of_distributions(terms),
    cases=(
        case(4, 3, 7, chunk_size=3, bias=True, labelled=True, hard_weight=0.5, id="chunks-of-3"),
        case(2, 3, 5, 9, id="one-chunk"),
        case(5, 4, 7, chunk_size=2, reduction="none", bias=True, beta=0.1, id="rows"),
        case(2, 3, 4, 7, chunk_size=1, reduction="sum", temperature=2.0, id="sum-tempered"),
        case(4, 3, 7, chunk_size=2, labelled=True, ignore_index=2, beta=0.0, id="forward-kl"),
        case(
            4, 3, 7, chunk_size=3, labelled=True, hard_weight=0.3, temperature=0.7, beta=1.0,
            reduction="none", id="reverse-kl-rows",
        ),
        case(2, 3, 4, 7, chunk_size=4, num_items=5, memory_budget=64, beta=0.9, id="divided"),
    ),
    more_sizes=(case(37, 64, 1000, chunk_size=16, K=32, beta=0.1, labelled=True, id="beta"),),
    more_errors=(
        bad("beta", 1.5, ValueError, "`beta` must be between 0 and 1; got 1.5."),
        bad("beta None", None, TypeError, "`beta` must be a number; got NoneType."),
    ),
    kinds=(("jsd", 0.5),),
    # Terms of both signs make a small sum; the truth's error is as large as ours.
    slack={torch.float64: 4.0},
    benchmarks=tuple(benchmark(*s) for s in SHAPES),
)  # fmt: skip
