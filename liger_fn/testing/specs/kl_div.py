"""Facts about kl_div."""

import torch.nn.functional as F

from liger_fn.functional import kl_div
from liger_fn.functional.loss import divergence as room
from liger_fn.functional.loss import kl_div as op_room
from liger_fn.testing.spec import BadCall, Case, OpSpec
from liger_fn.testing.specs import divergence
from liger_fn.testing.specs.divergence import log_probabilities, probabilities


def case(*shape: int, id: str = "", scale: float = 1.0, **options) -> Case:
    target = log_probabilities if options.get("log_target") else probabilities

    def make(draw):
        first = log_probabilities(draw, *shape, scale=scale)
        return {"input": first, "target": target(draw, *shape, scale=scale), **options}

    return Case(id or "x".join(map(str, shape)), make)


def as_torch(input, target, *, reduction="mean", log_target=False):
    """PyTorch's own, of inputs read as float32."""
    compute = room.compute_dtype(input, target)
    terms = F.kl_div(input.to(compute), target.to(compute), reduction="none", log_target=log_target)
    return terms if reduction == "none" else op_room._reduced(terms.sum(-1), input, reduction)


def mixed(draw):
    import torch

    target = probabilities(draw, 5, 64).to(torch.float32)
    return {"input": log_probabilities(draw, 5, 64), "target": target, "reduction": "row"}


SPEC = OpSpec(
    op=kl_div,
    reference=op_room.reference,
    baseline=as_torch,
    grads=("input", "target"),
    rows=("input", "target"),
    cases=(
        case(4, 7, reduction="row", log_target=True),
        case(4, 7, reduction="row", id="probabilities"),
        case(4, 7, id="mean"),
        case(4, 7, reduction="batchmean", log_target=True, id="batchmean"),
        case(4, 7, reduction="sum", id="sum"),
        case(2, 3, 5, reduction="none", log_target=True, id="per-element"),
        case(4, 5, reduction="none", id="per-element-probabilities"),
    ),
    sizes=(
        case(9, log_target=True),
        case(0, 16, reduction="sum"),
        case(5, 1, log_target=True),
        case(2, 7, 64, reduction="row"),
        case(7, 4096, log_target=True, reduction="batchmean"),
        case(2, 20000, log_target=True, reduction="row", id="beyond-one-slab"),
        case(2, 20000, reduction="none", id="beyond-one-slab-per-element"),
        case(9, 130, log_target=True, scale=20.0, id="peaked"),
        Case("mixed-dtypes", mixed),
    ),
    errors=(
        *divergence.errors("kl_div", log_probabilities, has_labels=False),
        BadCall(
            "batchmean of a vector",
            lambda d: {"input": d.normal(4), "target": d.normal(4), "reduction": "batchmean"},
            ValueError,
            "kl_div: `input` must have a batch dimension for 'batchmean'; got a vector.",
        ),
    ),
    kernels=lambda: [
        *divergence.compilations("kl"),
        *divergence.compilations("kl_log"),
        *divergence.compilations("kl_log", per_element=True),
    ],
    benchmarks=tuple(
        divergence.benchmark(N, V, log_probabilities, 4, log_target=True, reduction="batchmean")
        for N, V in divergence.SHAPES
    ),
    huge=divergence.huge(log_probabilities, log_target=True, reduction="row"),
)
