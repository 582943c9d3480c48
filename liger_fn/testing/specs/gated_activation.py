"""Facts about gated_activation."""

import torch

from liger_fn.functional import gated_activation
from liger_fn.functional.activation import gated_activation as room
from liger_fn.functional.activation.glu import ACTIVATIONS, Gating, halves
from liger_fn.testing.spec import BadCall, Benchmark, OpSpec
from liger_fn.testing.specs import glu

GPT_OSS = {"alpha": 1.702, "limit": 7.0, "up_offset": 1.0, "interleaved": True}


def as_models_write_it(gate, up=None, *, interleaved=False, **options):
    """The unit in the dtype of the gate, every step rounded."""
    if up is None:
        gate, up = (t.to(gate.dtype) for t in halves(gate, None, interleaved))
    return _in_own_dtype(gate, up, **options)


def _in_own_dtype(
    g,
    u,
    activation="silu",
    alpha=1.0,
    gate_scale=1.0,
    scale=1.0,
    up_offset=0.0,
    limit=None,
    limit_activated=False,
):
    kernel, slope = room._KERNELS[activation]
    bound = float("inf") if limit is None else limit
    g = (g * gate_scale).clamp(max=float("inf") if limit_activated else bound)
    act = g * torch.sigmoid(slope * alpha * g) if kernel == "silu" else room._MEANINGS[kernel](g)
    act = act.clamp(max=bound if limit_activated else float("inf"))
    return scale * act * (u.clamp(-bound, bound) + up_offset)


def bad(id: str, change: dict, error: type[Exception], sentence: str) -> BadCall:
    def make(draw):
        return {"gate": draw.normal(4, 8), "up": draw.normal(4, 8)} | change

    return BadCall(id, make, error, f"gated_activation: {sentence}")


def _benchmark(N: int, F: int) -> Benchmark:
    """GPT-OSS's, which has gate and up in turns."""

    def make(draw):
        return {"gate": draw.normal(N, 2 * F, scale=3.0), "up": None, **GPT_OSS}

    return Benchmark(f"{N}x{F}-gpt-oss", make, bytes_fwd=6 * N * F, bytes_bwd=10 * N * F)


SPEC = OpSpec(
    op=gated_activation,
    reference=room.reference,
    baseline=as_models_write_it,
    grads=("gate", "up"),
    rows=("gate", "up"),
    cases=(
        # The bound lies among the values, the numerical slopes' steps do not meet it.
        glu.case(4, 6, limit=1.0, alpha=1.702, up_offset=1.0, id="bounded"),
        glu.packed_case(4, 5, id="gpt-oss", **{**GPT_OSS, "limit": 0.8}),
        glu.packed_case(2, 3, 4, id="interleaved-quick-gelu", activation="quick_gelu",
                        interleaved=True),
        glu.packed_case(3, 4, id="limit-activated", limit=0.7, limit_activated=True),
        glu.case(3, 4, id="scaled-gelu", activation="gelu", gate_scale=0.5, scale=2.0),
        glu.case(3, 4, id="relu2", activation="relu2"),
        glu.case(3, 4, id="relu", activation="relu"),
        glu.case(3, 4, id="sigmoid", activation="sigmoid", scale=0.5),
        glu.case(3, 4, id="linear", activation="linear", limit=1.0),
    ),
    sizes=(
        *glu.sizes(limit=1.5),
        glu.packed_case(3, 1300, id="gpt-oss-wide", **GPT_OSS),
        glu.packed_case(0, 8, id="gpt-oss-empty", **GPT_OSS),
        glu.case(4, 64, scale=100.0, id="quick-gelu-large", activation="quick_gelu"),
    ),
    errors=(
        *glu.errors("gated_activation"),
        bad("activation", {"activation": "mish"}, ValueError, "`activation` must be one of 'silu'"),
        bad("alpha", {"activation": "relu", "alpha": 2.0}, ValueError,
            "`alpha` must be 1 for 'relu', which has no such slope; got 2.0."),
        bad("alpha None", {"alpha": None}, TypeError, "`alpha` must be a number; got NoneType."),
        bad("scale", {"scale": "1"}, TypeError, "`scale` must be a number; got str."),
        bad("gate_scale", {"gate_scale": "1"}, TypeError, "`gate_scale` must be a number"),
        bad("up_offset", {"up_offset": "1"}, TypeError, "`up_offset` must be a number"),
        bad("limit", {"limit": 0.0}, ValueError, "`limit` must be positive, or None; got 0.0."),
        bad("limit str", {"limit": "7"}, TypeError, "`limit` must be a number; got str."),
        bad("interleaved", {"interleaved": True}, ValueError,
            "`interleaved` must be False when `up` is given; got True."),
    ),
    kernels=lambda: glu.kernels(
        *(Gating(a, gate_scale=0.5) for a in ACTIVATIONS),
        Gating("silu", **GPT_OSS),
        Gating("silu", limit=16.0, limit_activated=True),
    ),
    benchmarks=(_benchmark(8192, 2880), _benchmark(8192, 14336)),
    huge=glu.huge(limit=7.0),
)  # fmt: skip
