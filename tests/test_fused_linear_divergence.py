"""Facts of the divergences of two heads: their chunks, work, memory, and others' answers."""

import math

import pytest
import torch
from test_fused_linear_cross_entropy import LargestTensor, Multiplications

from liger_fn.functional import (
    fused_linear_cosine,
    fused_linear_cross_entropy,
    fused_linear_jsd,
    fused_linear_kl_div,
    fused_linear_tvd,
    jsd,
    kl_div,
    tvd,
    using,
)
from liger_fn.functional.linear_loss import divergence as room
from liger_fn.functional.linear_loss.chunks import Limits

N, H, K, V = 12, 4, 6, 40
OF_DISTRIBUTIONS = (fused_linear_jsd, fused_linear_kl_div, fused_linear_tvd)
OPS = (*OF_DISTRIBUTIONS, fused_linear_cosine)


@pytest.fixture
def heads(device):
    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, device=device)

    return normal(V, H).requires_grad_(), normal(N, H).requires_grad_(), normal(V, K), normal(N, K)


@pytest.fixture
def labels(device):
    labels = torch.randint(V, (N,), device=device)
    labels[1::3] = -100
    return labels


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_every_chunk_size_gives_the_same(op, reduction, heads, labels):
    def answers(chunk_size):
        loss = op(*heads, labels, chunk_size, reduction=reduction, hard_weight=0.5)
        return loss, *torch.autograd.grad(loss.square().sum(), heads[:2])

    whole = answers(None)
    for chunk_size in (1, 5, N - 1, N, N + 1):
        torch.testing.assert_close(answers(chunk_size), whole, rtol=1e-12, atol=1e-12)


def test_cosine_is_torchs(heads, labels):
    weight, x, teacher_weight, teacher_x = heads
    z, y = x @ weight.T, teacher_x @ teacher_weight.T
    ours = fused_linear_cosine(*heads, labels, hard_weight=0.5, reduction="sum")
    apart = 1 - torch.nn.functional.cosine_similarity(z, y, dim=-1)
    hard = torch.nn.functional.cross_entropy(z, labels, reduction="sum")
    theirs = apart[labels != -100].sum() + 0.5 * hard
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (weight, x)), torch.autograd.grad(theirs, (weight, x))
    )


def test_are_the_divergences_of_the_softmax_of_both(heads, labels):
    weight, x, teacher_weight, teacher_x = heads
    log_q = (x @ weight.T / 2).log_softmax(-1)
    log_p = (teacher_x @ teacher_weight.T / 2).log_softmax(-1)
    pairs = [
        (fused_linear_jsd(*heads, labels, temperature=2.0), jsd(log_q, log_p, labels)),
        (
            fused_linear_kl_div(*heads, temperature=2.0),
            kl_div(log_q, log_p, reduction="batchmean", log_target=True),
        ),
        (
            fused_linear_kl_div(*heads, reverse=True, temperature=2.0),
            kl_div(log_p, log_q, reduction="batchmean", log_target=True),
        ),
        (
            fused_linear_tvd(*heads, labels, temperature=2.0),
            tvd(log_q.exp(), log_p.exp(), labels),
        ),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)
        gradients = (torch.autograd.grad(t, (weight, x), retain_graph=True) for t in (ours, theirs))
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_jsd_is_trls(beta, heads, labels):
    gkd = pytest.importorskip(
        "trl.experimental.gkd.gkd_trainer", reason="this TRL has its distillation elsewhere"
    )
    weight, x, teacher_weight, teacher_x = heads
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        (x @ weight.T)[None], (teacher_x @ teacher_weight.T)[None], labels[None], beta, 0.7
    )
    ours = fused_linear_jsd(*heads, labels, beta=beta, temperature=0.7)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (weight, x)), torch.autograd.grad(theirs, (weight, x))
    )


@pytest.mark.parametrize("op", OF_DISTRIBUTIONS)
def test_from_itself_a_head_is_at_a_distance_of_0(op, heads, labels):
    """Exactly: then what is left is the hard loss."""
    weight, x = (t.detach().float().requires_grad_() for t in heads[:2])
    loss = op(weight, x, weight.detach(), x.detach())
    assert loss.item() == 0.0
    loss = op(weight, x, weight, x, labels, temperature=3.0, hard_weight=0.5)
    hard = 0.5 * fused_linear_cross_entropy(weight, x, labels)
    torch.testing.assert_close(loss, hard)
    if op is fused_linear_tvd and weight.is_cuda:
        return  # the slope of |q - p| jumps there, and the compiler's roundings choose a side
    torch.testing.assert_close(
        torch.autograd.grad(loss, (weight, x)), torch.autograd.grad(hard, (weight, x))
    )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_teacher_gets_no_gradient(op, reduction, heads):
    teacher_weight, teacher_x = (t.requires_grad_() for t in heads[2:])
    loss = op(*heads, reduction=reduction).sum()
    assert torch.autograd.grad(loss, (teacher_weight, teacher_x), allow_unused=True) == (None, None)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["kernels", "reference"])
def test_what_the_teacher_says_of_an_ignored_row_does_not_matter(op, backend, heads, labels):
    weight, x, _, teacher_x = heads
    teacher_x[labels == -100] = math.nan
    with using(backend):
        loss = op(*heads, labels, hard_weight=0.5)
        dweight, dx = torch.autograd.grad(loss, (weight, x))
    assert loss.isfinite()
    assert dweight.isfinite().all()
    assert (dx[labels == -100] == 0).all()


@pytest.mark.parametrize("op", OPS)
def test_a_label_outside_the_vocabulary_is_no_target(op, heads, labels):
    labels[3] = V
    assert op(*heads, labels).isfinite()
    losses = op(*heads, labels, hard_weight=0.5, reduction="none")
    assert losses.isnan().tolist() == [i == 3 for i in range(N)]
    assert torch.autograd.grad(losses.sum(), heads[1])[0].isnan().any(-1).nonzero().tolist() == [
        [3]
    ]


def test_infinitely_unlikely_classes(device):
    """A bias of −∞ forbids a class, to both or to the teacher alone."""
    bias = torch.tensor([0.0, 0.0, -math.inf], device=device)
    weight, x = torch.randn(3, 4, device=device), torch.randn(2, 4, device=device)
    x.requires_grad_()
    for op in OF_DISTRIBUTIONS:
        for own in (bias, None):
            loss = op(weight, x, -weight, x.detach(), bias=own, teacher_bias=bias)
            assert loss.isfinite()
            assert torch.autograd.grad(loss, x)[0].isfinite().all()


def test_a_teacher_of_another_dtype(heads):
    """Both keep their own; the loss is of the wider."""
    weight, x, teacher_weight, teacher_x = (t.detach().float() for t in heads)
    ours = fused_linear_jsd(
        weight.bfloat16(), x.bfloat16(), teacher_weight.double(), teacher_x.double()
    )
    assert ours.dtype is torch.float64
    # Logits of size 2 are rounded to 8 bits; their errors average out over 480 of them.
    torch.testing.assert_close(ours.float(), fused_linear_jsd(*map(torch.clone, (
        weight, x, teacher_weight, teacher_x))), rtol=1e-2, atol=0.0)  # fmt: skip


@pytest.mark.parametrize(
    ("needs", "products"),
    [
        ((False, False, False), H + K),
        ((True, False, False), 2 * H + K),
        ((False, True, False), 2 * H + K),
        ((True, True, False), 3 * H + K),
    ],
)
def test_only_wanted_gradients_are_computed(heads, needs, products):
    with Multiplications() as work:
        room.fused_linear_divergence_fwd(*_arguments(heads), *needs)
    assert work.count == products * N * V


def _arguments(heads):
    """No labels, biases or weights of rows; five rows at a time, their sums held as it comes."""
    heads = [t.detach().float() for t in heads]
    return (*heads, None, None, None, None, 5, None, False, "jsd", 0.5, 1.0, 0.0, -100)


def test_no_tensor_is_larger_than_the_chunk_or_the_weight(heads):
    with LargestTensor() as largest:
        room.fused_linear_divergence_fwd(*_arguments(heads), True, True, False)
    padded = -(-V // 16) * 16
    assert largest.numel == max(5 * padded, V * K) < N * V


def test_the_budget_holds_both_logits():
    weight = torch.empty(128256, 4096, dtype=torch.bfloat16, device="meta")
    bytes_of_a_row = 128256 * (2 + 4)
    for budget in (1 << 27, 1 << 30):
        rows = Limits(None, budget, beside=4).plan(1 << 20, weight).rows
        assert rows % 128 == 0
        assert rows * bytes_of_a_row <= budget < (rows + 128) * bytes_of_a_row
    # By default two chunks, in the 1.25 GiB and the memory that sums in float32 would take.
    default = Limits(None, None, beside=2)
    assert default.two_chunks(8192, weight)
    assert len(list(default.plan(8192, weight, weight).slices(8192))) == 2
