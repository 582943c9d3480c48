"""Facts about tvd."""

from liger_fn.functional import tvd
from liger_fn.functional.loss import tvd as room
from liger_fn.testing.spec import Case, OpSpec
from liger_fn.testing.specs import divergence
from liger_fn.testing.specs.divergence import probabilities


def case(*shape: int, **options) -> Case:
    return divergence.case(*shape, make=probabilities, **options)


SPEC = OpSpec(
    op=tvd,
    reference=room.reference,
    grads=("input", "target"),
    rows=("input", "target", "labels"),
    cases=(
        case(4, 7, ignored=True),
        case(2, 3, 5, reduction="none", id="rows"),
        case(4, 7, ignored=True, ignore_index=3, reduction="sum", id="sum"),
        case(4, 7, id="no-labels"),
    ),
    sizes=(
        *divergence.sizes(probabilities),
        case(6, 50, ignored=True, reduction="none", id="ragged-rows"),
    ),
    errors=divergence.errors("tvd", probabilities),
    kernels=lambda: divergence.compilations("tvd"),
    benchmarks=tuple(divergence.benchmark(N, V, probabilities) for N, V in divergence.SHAPES),
    huge=divergence.huge(probabilities, reduction="none"),
)
