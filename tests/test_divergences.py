"""Facts about kl_div, jsd and tvd that can be checked by hand, against PyTorch or against TRL."""

import math

import pytest
import torch
import torch.nn.functional as F

from liger_fn.functional import jsd, kl_div, tvd, using


@pytest.fixture(params=["kernels", "reference"], autouse=True)
def backend(request):
    with using(request.param):
        yield


def logs(*probabilities, device, dtype=torch.float64):
    return torch.tensor(probabilities, dtype=dtype, device=device).log()


def test_kl_div_by_hand(device):
    x, p = logs([0.5, 0.5], device=device), logs([0.25, 0.75], device=device)
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert kl_div(x, p, reduction="sum", log_target=True).item() == pytest.approx(expected)
    assert kl_div(x, p.exp(), reduction="sum").item() == pytest.approx(expected)


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", ["none", "batchmean", "sum", "mean"])
def test_kl_div_is_torchs(reduction, log_target, device):
    x, y = torch.randn(2, 3, 4, 5, dtype=torch.float64, device=device).log_softmax(-1).unbind()
    y = y if log_target else y.exp()
    x, y = x.requires_grad_(), y.requires_grad_()
    ours = kl_div(x, y, reduction=reduction, log_target=log_target)
    theirs = F.kl_div(x, y, reduction=reduction, log_target=log_target)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), (x, y)), torch.autograd.grad(theirs.sum(), (x, y))
    )


@pytest.mark.parametrize("log_target", [False, True])
def test_an_impossible_class_adds_nothing(log_target, device):
    """Both sides forbid the second class, as vocabulary masks do; torch gives NaN."""
    x = logs([0.5, 0.0, 0.5], device=device).requires_grad_()
    p = logs([0.25, 0.0, 0.75], device=device)
    p = (p if log_target else p.exp()).requires_grad_()
    loss = kl_div(x, p, reduction="sum", log_target=log_target)
    assert F.kl_div(x, p, reduction="sum", log_target=log_target).isnan()
    assert loss.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    dx, dp = torch.autograd.grad(loss, (x, p))
    assert dx[0].tolist() == pytest.approx([-0.25, 0.0, -0.75])
    assert dp.isfinite().all()


@pytest.mark.parametrize("log_target", [False, True])
def test_a_class_that_only_the_target_allows_is_infinitely_far(log_target, device):
    x, p = logs([1.0, 0.0], device=device), logs([0.5, 0.5], device=device)
    p = p if log_target else p.exp()
    assert kl_div(x, p, reduction="sum", log_target=log_target).item() == math.inf


def test_tiny_targets_are_not_rounded_up(device):
    """A floor under the target, as the peer has, would change its logarithm."""
    x = torch.tensor([[0.0, -50.0]], dtype=torch.float64, device=device)
    p = torch.tensor([[1.0, 1e-20]], dtype=torch.float64, device=device)
    terms = kl_div(x, p, reduction="none")
    assert terms[0, 1].item() == pytest.approx(1e-20 * (math.log(1e-20) + 50.0), rel=1e-9)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_its_definition(beta, device):
    x, y = torch.randn(2, 4, 7, dtype=torch.float64, device=device).log_softmax(-1).unbind()
    q, p = x.exp(), y.exp()
    m = beta * p + (1 - beta) * q
    expected = beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()
    torch.testing.assert_close(jsd(x, y, beta=beta, reduction="none"), expected.sum(-1))


def test_the_ends_of_jsd_are_both_kls(device):
    x, y = torch.randn(2, 4, 7, dtype=torch.float64, device=device).log_softmax(-1).unbind()
    forward, reverse = (
        F.kl_div(a, b, reduction="batchmean", log_target=True) for a, b in ((x, y), (y, x))
    )
    torch.testing.assert_close(jsd(x, y, beta=0), forward)
    torch.testing.assert_close(jsd(x, y, beta=1), reverse)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_jsd_is_trls(beta, device):
    gkd = pytest.importorskip(
        "trl.experimental.gkd.gkd_trainer", reason="this TRL has its distillation elsewhere"
    )
    student, teacher = torch.randn(2, 2, 5, 7, dtype=torch.float64, device=device)
    labels = torch.randint(7, (2, 5), device=device)
    labels[:, 1::2] = -100
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=beta)
    ours = jsd(student.log_softmax(-1), teacher.log_softmax(-1), labels, beta=beta)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_jsd_where_both_probabilities_underflow(beta, device):
    """The peer's 0.8.2 gives NaN here."""
    x = torch.tensor([[0.0, -200.0, -math.inf]], device=device, requires_grad=True)
    y = torch.tensor([[0.0, -300.0, -math.inf]], device=device, requires_grad=True)
    loss = jsd(x, y, beta=beta)
    assert loss.item() == 0.0
    dx, dy = torch.autograd.grad(loss, (x, y))
    assert dx.tolist()[0] == [-1.0 if beta == 0 else 1.0 if beta == 1 else 0.0, 0.0, 0.0]
    assert dy.tolist()[0] == [1.0 if beta == 0 else -1.0 if beta == 1 else 0.0, 0.0, 0.0]


def test_jsd_of_disjoint_distributions_is_log_2(device):
    x, y = logs([1.0, 0.0], device=device), logs([0.0, 1.0], device=device)
    assert jsd(x, y).item() == pytest.approx(math.log(2.0))


@pytest.mark.parametrize("op", [jsd, tvd])
def test_nan_stays_nan(op, device):
    x, y = torch.full((2, 2, 3), 0.25, device=device).unbind()
    x[0, 1] = math.nan
    for pair in ((x, y), (y, x)):
        assert op(*pair, reduction="none").isnan().tolist() == [True, False]


def test_tvd_by_hand(device):
    q = torch.tensor([[0.5, 0.3, 0.2]], device=device, requires_grad=True)
    p = torch.tensor([[0.1, 0.3, 0.6]], device=device)
    loss = tvd(q, p)
    assert loss.item() == pytest.approx(0.4)
    # At a tie the peer's 0.8.2 gives −½.
    assert torch.autograd.grad(loss, q)[0].tolist() == [[0.5, 0.0, -0.5]]


@pytest.mark.parametrize("op", [jsd, tvd])
def test_ignored_rows_may_hold_anything(op, device):
    x, y = torch.full((2, 3, 4), 0.25, device=device).unbind()
    x[1], y[1] = math.nan, math.inf
    x, y = x.requires_grad_(), y.requires_grad_()
    loss = op(x, y, torch.tensor([0, -100, 2], device=device), reduction="none")
    assert loss.isfinite().all()
    assert loss[1] == 0.0
    for g in torch.autograd.grad(loss.sum(), (x, y)):
        assert g[1].eq(0).all()
        assert g.isfinite().all()


@pytest.mark.parametrize("op", [jsd, tvd])
def test_nothing_but_padding_gives_zero_not_nan(op, device):
    x, y = torch.full((2, 3, 4), 0.25, device=device).unbind()
    x.requires_grad_()
    loss = op(x, y, torch.full((3,), -100, device=device))
    loss.backward()
    assert loss.item() == 0.0
    assert not x.grad.any()
