"""Facts about modulated_rms_norm."""

from liger_fn.functional import modulated_rms_norm
from liger_fn.functional.norm import modulated_rms_norm as room
from liger_fn.testing.spec import OpSpec
from liger_fn.testing.specs import modulated
from liger_fn.testing.specs.norm import compilations

SPEC = OpSpec(
    op=modulated_rms_norm,
    reference=room.reference,
    grads=("x", "scale", "shift", "weight"),
    rows=("x", "scale", "shift"),
    parted=("scale", "shift"),
    cases=(
        *modulated.CASES,
        modulated.case(2, 3, 6, weight=True, id="weight"),
        modulated.case(2, 3, 6, weight=True, shift=False, id="weight-no-shift"),
    ),
    sizes=modulated.SIZES,
    errors=modulated.errors("modulated_rms_norm"),
    kernels=compilations(sampled=True),
    benchmarks=modulated.BENCHMARKS,
    huge=modulated.huge(),
)
