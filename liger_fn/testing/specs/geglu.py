"""Facts about geglu."""

import torch.nn.functional as F

from liger_fn.functional import geglu
from liger_fn.functional.activation import geglu as room
from liger_fn.functional.activation.glu import Gating
from liger_fn.testing.spec import BadCall, OpSpec
from liger_fn.testing.specs import glu


def gelu(gate, approximate="tanh"):
    return F.gelu(gate, approximate=approximate)


SPEC = OpSpec(
    op=geglu,
    reference=room.reference,
    baseline=glu.in_own_dtype(gelu),
    grads=("gate", "up"),
    rows=("gate", "up"),
    cases=(
        glu.case(4, 6),
        glu.case(4, 6, approximate="none", id="erf"),
        glu.packed_case(4, 5, id="packed"),
        glu.packed_case(2, 3, 4, id="packed-erf", approximate="none"),
    ),
    sizes=(
        *glu.sizes(),
        glu.case(70, 33, approximate="none", id="erf-70x33"),
        glu.case(4, 64, scale=100.0, approximate="none", id="erf-large"),
    ),
    errors=(
        *glu.errors("geglu"),
        BadCall(
            "approximate",
            lambda d: {"gate": d.normal(4, 8), "approximate": "erf"},
            ValueError,
            "geglu: `approximate` must be one of 'tanh', 'none'; got 'erf'.",
        ),
    ),
    kernels=lambda: glu.kernels(Gating("gelu_tanh"), Gating("gelu_erf")),
    benchmarks=glu.benchmarks(),
    launches=glu.launches(),
    huge=glu.huge(),
)
