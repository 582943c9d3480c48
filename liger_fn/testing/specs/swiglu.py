"""Facts about swiglu."""

import torch.nn.functional as F

from liger_fn.functional import swiglu
from liger_fn.functional.activation import swiglu as room
from liger_fn.functional.activation.glu import Gating
from liger_fn.testing.spec import OpSpec
from liger_fn.testing.specs import glu

SPEC = OpSpec(
    op=swiglu,
    reference=room.reference,
    baseline=glu.in_own_dtype(F.silu),
    grads=("gate", "up"),
    rows=("gate", "up"),
    cases=(
        glu.case(4, 6),
        glu.packed_case(4, 5, id="packed"),
        glu.views_case(2, 3, 4, id="views"),
    ),
    sizes=glu.sizes(),
    errors=glu.errors("swiglu"),
    kernels=lambda: glu.kernels(Gating("silu")),
    benchmarks=glu.benchmarks(),
    launches=glu.launches(),
    huge=glu.huge(),
)
