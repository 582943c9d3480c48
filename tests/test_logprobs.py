"""Facts of logprobs that can be checked by hand, against PyTorch, or against TRL."""

import math

import pytest
import torch
import torch.nn.functional as F

from liger_fn.functional import logprobs, using
from liger_fn.testing.call import Recorder

ALL = {"lse": True, "entropy": True, "top1": True}


@pytest.fixture(params=["kernels", "reference"], autouse=True)
def backend(request):
    with using(request.param):
        yield


def test_two_classes_by_hand(device):
    logits = torch.tensor([[0.0, math.log(3.0)]], device=device, requires_grad=True)
    logp, lse, entropy, top1 = logprobs(logits, torch.tensor([0], device=device), **ALL)
    assert logp.item() == pytest.approx(math.log(0.25))
    assert lse.item() == pytest.approx(math.log(4.0))
    assert entropy.item() == pytest.approx(0.25 * math.log(4.0) + 0.75 * math.log(4.0 / 3.0))
    assert top1.item() == 1

    gradient = torch.autograd.grad(logp + 2.0 * lse, logits, retain_graph=True)[0]
    assert gradient.tolist()[0] == pytest.approx([0.75 + 0.5, -0.75 + 1.5])
    # −p_v · (log p_v + H), whose sum is zero.
    slope = 0.25 * (math.log(4.0) - entropy.item())
    gradient = torch.autograd.grad(entropy, logits)[0]
    assert gradient.tolist()[0] == pytest.approx([slope, -slope])


def test_what_is_not_asked_for_is_not_there(device):
    logits, target = torch.randn(3, 5, device=device), torch.tensor([0, 1, 2], device=device)
    assert isinstance(logprobs(logits, target), torch.Tensor)
    some = logprobs(logits, target, entropy=True)
    assert (some.lse, some.top1) == (None, None)
    torch.testing.assert_close(some.logp, logprobs(logits, target))


def test_is_the_loss_of_cross_entropy(device):
    logits = torch.randn(2, 6, 11, device=device)
    target = torch.randint(11, (2, 6), device=device)
    expected = -F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    torch.testing.assert_close(logprobs(logits, target), expected)


def test_is_what_trl_computes(device):
    trl = pytest.importorskip("trl.trainer.utils", reason="the peer is not installed")
    logits = torch.randn(2, 6, 33, dtype=torch.float64, device=device)
    target = torch.randint(33, (2, 6), device=device)
    expected = trl.selective_log_softmax_and_entropy(logits, target)
    ours = logprobs(logits, target, entropy=True)
    torch.testing.assert_close((ours.logp, ours.entropy), expected, rtol=1e-10, atol=1e-10)


def test_the_sum_of_squared_probabilities_is_an_lse_at_half_the_temperature(device):
    logits, target = torch.randn(4, 9, device=device), torch.zeros(4, dtype=int, device=device)
    lse = logprobs(logits, target, lse=True).lse
    at_half = logprobs(logits, target, lse=True, temperature=0.5).lse
    torch.testing.assert_close(at_half - 2 * lse, logits.softmax(-1).square().sum(-1).log())


@pytest.mark.parametrize("lowest", [-math.inf, torch.finfo(torch.bfloat16).min])
def test_forbidden_classes(device, lowest):
    logits = torch.zeros(1, 8, dtype=torch.bfloat16, device=device)
    logits[:, 4:] = lowest
    logits.requires_grad_()
    logp, lse, entropy, top1 = logprobs(logits, torch.tensor([0], device=device), **ALL)
    assert (logp.item(), lse.item()) == pytest.approx((-math.log(4.0), math.log(4.0)))
    assert (entropy.item(), top1.item()) == (pytest.approx(math.log(4.0)), 0)
    (logp + entropy).sum().backward()
    assert logits.grad[0].tolist() == [0.75, -0.25, -0.25, -0.25, 0.0, 0.0, 0.0, 0.0]


def test_equal_logits_as_low_as_they_go(device):
    logits = torch.full((1, 8), torch.finfo(torch.float32).min, device=device)
    logp, _, entropy, top1 = logprobs(logits, torch.tensor([3], device=device), **ALL)
    assert (logp.item(), entropy.item()) == pytest.approx((-math.log(8.0), math.log(8.0)))
    assert top1.item() == 0


def test_what_all_logits_share_costs_nothing(device):
    logits, target = torch.randn(4, 50, device=device), torch.arange(4, device=device)
    # Sums of multiples of 2^-12 below 2^12 are exact.
    logits = (logits * 4096).round() / 4096
    far = logits + 2048.0
    near, away = (logprobs(x, target, entropy=True) for x in (logits, far))
    torch.testing.assert_close(away.logp, near.logp, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(away.entropy, near.entropy, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("V", [5, 4100])
def test_the_first_among_equals_is_the_most_likely(device, V):
    logits = torch.zeros(2, V, device=device)
    logits[0, [2, V - 1]] = 1.0
    logits[1, V - 1] = 1.0
    target = torch.zeros(2, dtype=torch.int64, device=device)
    assert logprobs(logits, target, top1=True).top1.tolist() == [2, V - 1]


def test_ignored_rows_may_hold_anything(device):
    logits = torch.randn(3, 5, device=device)
    logits[1] = math.nan
    logits.requires_grad_()
    rows = logprobs(logits, torch.tensor([0, -100, 4], device=device), **ALL)
    assert [r[1].item() for r in rows] == [0.0, 0.0, 0.0, -1]
    (rows.logp + rows.lse + rows.entropy).sum().backward()
    assert logits.grad[1].eq(0).all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("unknown", [5, -1, 2**40])
def test_a_target_outside_the_vocabulary_spoils_its_row_alone(device, unknown):
    logits = torch.randn(3, 5, device=device, requires_grad=True)
    rows = logprobs(logits, torch.tensor([0, unknown, 4], device=device), **ALL)
    rows.logp.sum().backward()
    assert rows.logp.isnan().tolist() == [False, True, False]
    assert logits.grad.isnan().all(-1).tolist() == [False, True, False]
    assert rows.entropy.isfinite().all()


def test_a_shifted_view_is_read_where_it_lies(device):
    logits, target = torch.randn(2, 5, 7, device=device), torch.randint(7, (2, 5), device=device)
    got = logprobs(logits[:, :-1], target[:, 1:])
    assert got.shape == (2, 4)
    torch.testing.assert_close(
        got, logits[:, :-1].log_softmax(-1).gather(-1, target[:, 1:, None])[..., 0]
    )


def test_an_entropy_bonus_reaches_the_logits(device):
    logits = torch.randn(4, 6, device=device, dtype=torch.float64, requires_grad=True)
    target = torch.arange(4, device=device)
    rows = logprobs(logits, target, entropy=True, temperature=0.7)
    got = torch.autograd.grad((rows.logp * 0.3 + rows.entropy * 0.01).sum(), logits)[0]
    log_p = (logits / 0.7).log_softmax(-1)
    by_torch = log_p.gather(-1, target[:, None])[:, 0] * 0.3 - (log_p.exp() * log_p).sum(-1) * 0.01
    torch.testing.assert_close(got, torch.autograd.grad(by_torch.sum(), logits)[0])


@pytest.mark.parametrize("where", [0, 3000])
def test_nan_spoils_its_row(device, where):
    logits = torch.randn(2, 4100, device=device)
    logits[0, where] = math.nan
    rows = logprobs(logits, torch.tensor([1, 1], device=device), lse=True, entropy=True)
    for r in rows[:3]:
        assert r.isnan().tolist() == [True, False]


def test_what_is_only_reported_costs_no_backward_work(device):
    """The entropy of a log, say: it gets no gradient, not one of zeros."""
    logits = torch.randn(3, 5, device=device, requires_grad=True)
    with using("kernels"), Recorder() as recorder:
        rows = logprobs(logits, torch.tensor([0, 1, 2], device=device), lse=True, entropy=True)
        rows.logp.sum().backward()
    ((_, _), (backward, arguments)) = recorder.calls
    given = {a.name: value for a, value in zip(backward._schema.arguments, arguments, strict=True)}
    assert given["dlogp"] is not None
    assert [given["dlse"], given["dentropy"], given["dtop1"]] == [None, None, None]
