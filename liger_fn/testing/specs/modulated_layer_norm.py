"""Facts about modulated_layer_norm."""

from liger_fn.functional import modulated_layer_norm
from liger_fn.functional.norm import modulated_layer_norm as room
from liger_fn.testing.spec import OpSpec
from liger_fn.testing.specs import modulated
from liger_fn.testing.specs.norm import compilations

SPEC = OpSpec(
    op=modulated_layer_norm,
    reference=room.reference,
    grads=("x", "scale", "shift"),
    rows=("x", "scale", "shift"),
    parted=("scale", "shift"),
    cases=modulated.CASES,
    sizes=modulated.SIZES,
    errors=modulated.errors("modulated_layer_norm"),
    kernels=compilations(centred=True, sampled=True),
    benchmarks=modulated.BENCHMARKS,
    huge=modulated.huge(),
)
