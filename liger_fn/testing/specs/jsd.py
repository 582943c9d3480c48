"""Facts about jsd."""

import math

import torch
import torch.nn.functional as F

from liger_fn.functional import jsd
from liger_fn.functional.loss import divergence as room
from liger_fn.functional.loss import jsd as op_room
from liger_fn.testing.spec import BadCall, Case, OpSpec
from liger_fn.testing.specs import divergence
from liger_fn.testing.specs.divergence import log_probabilities


def as_trl(input, target, labels=None, *, beta=0.5, ignore_index=-100, reduction="mean"):
    """GKDTrainer.generalized_jsd_loss after its log_softmax, of inputs read as float32."""
    compute = room.compute_dtype(input, target)
    x, y = input.to(compute), target.to(compute)
    if beta == 0:
        terms = F.kl_div(x, y, reduction="none", log_target=True)
    elif beta == 1:
        terms = F.kl_div(y, x, reduction="none", log_target=True)
    else:
        mix = torch.stack([x + math.log1p(-beta), y + math.log(beta)]).logsumexp(0)
        to_teacher = F.kl_div(mix, y, reduction="none", log_target=True)
        to_student = F.kl_div(mix, x, reduction="none", log_target=True)
        terms = beta * to_teacher + (1 - beta) * to_student
    loss = terms.sum(-1)
    if labels is not None:
        loss = torch.where(labels == ignore_index, 0.0, loss)
    return room.reduced(loss, labels, ignore_index, reduction)


def case(*shape: int, **options) -> Case:
    return divergence.case(*shape, make=log_probabilities, **options)


def bad(id: str, beta, error: type[Exception], sentence: str) -> BadCall:
    def make(draw):
        return {"input": draw.normal(4, 8), "target": draw.normal(4, 8), "beta": beta}

    return BadCall(id, make, error, f"jsd: {sentence}")


SPEC = OpSpec(
    op=jsd,
    reference=op_room.reference,
    baseline=as_trl,
    grads=("input", "target"),
    rows=("input", "target", "labels"),
    # The logarithm of the mixture is one instruction there, good to 2^-22, and its terms cancel;
    # PyTorch's are good to 2^-24. The inputs themselves are rounded at 2^-9 or 2^-12.
    slack={torch.bfloat16: 4.0, torch.float16: 4.0},
    cases=(
        case(4, 7, ignored=True),
        case(2, 3, 5, beta=0.1, reduction="none", id="rows"),
        case(4, 7, beta=0.0, ignored=True, ignore_index=3, id="forward-kl"),
        case(4, 7, beta=1.0, ignored=True, reduction="sum", id="reverse-kl"),
        case(4, 7, beta=0.9, id="no-labels"),
    ),
    sizes=(
        *divergence.sizes(log_probabilities),
        case(7, 4096, beta=0.0, ignored=True, id="wide-forward-kl"),
        case(7, 4096, beta=1.0, ignored=True, id="wide-reverse-kl"),
        case(6, 50, beta=0.3, ignored=True, reduction="none", id="ragged-rows"),
    ),
    errors=(
        *divergence.errors("jsd", log_probabilities),
        bad("beta", 1.5, ValueError, "`beta` must be between 0 and 1; got 1.5."),
        bad("beta None", None, TypeError, "`beta` must be a number; got NoneType."),
    ),
    kernels=lambda: [*divergence.compilations("jsd"), *divergence.compilations("reverse_kl")],
    benchmarks=tuple(divergence.benchmark(N, V, log_probabilities) for N, V in divergence.SHAPES),
    huge=divergence.huge(log_probabilities, reduction="none"),
)
