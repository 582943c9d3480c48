"""Facts about fused_linear_tvd."""

from liger_fn.functional import fused_linear_tvd
from liger_fn.functional.linear_loss import tvd as room
from liger_fn.testing.specs.fused_linear_divergence import (
    SHAPES,
    benchmark,
    case,
    of_distributions,
    spec,
)


def terms(log_q, log_p):
    return 0.5 * (log_q.exp() - log_p.exp()).abs()


SPEC = spec(
    op=fused_linear_tvd,
    module=room,
    rows=of_distributions(terms),
    cases=(
        case(4, 3, 7, chunk_size=3, bias=True, labelled=True, hard_weight=0.5, id="chunks-of-3"),
        case(2, 3, 5, 9, id="one-chunk"),
        case(5, 4, 7, chunk_size=2, reduction="none", labelled=True, temperature=2.0, id="rows"),
    ),
    kinds=(("tvd", 0.0),),
    benchmarks=tuple(benchmark(*s, apart=True) for s in SHAPES),
)
