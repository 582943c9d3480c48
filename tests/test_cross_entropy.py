"""Facts of cross_entropy that can be checked by hand or against PyTorch."""

import math

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F

from liger_fn.functional import cross_entropy, using
from liger_fn.functional.loss import cross_entropy as room


@pytest.fixture(params=["kernels", "reference"], autouse=True)
def backend(request):
    with using(request.param):
        yield


def test_two_classes_by_hand(device):
    logits = torch.tensor([[0.0, math.log(3.0)]], device=device, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1], device=device))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4.0 / 3.0))
    assert logits.grad.tolist()[0] == pytest.approx([0.25, -0.25])


def test_z_loss_by_hand(device):
    logits = torch.zeros(1, 4, device=device)
    target = torch.zeros(1, dtype=torch.int64, device=device)
    loss = cross_entropy(logits, target, z_loss=0.5)
    assert loss.item() == pytest.approx(math.log(4.0) + 0.5 * math.log(4.0) ** 2)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_is_what_torch_computes(device, reduction, label_smoothing, weighted):
    logits = torch.randn(6, 11, dtype=torch.float64, device=device)
    target = torch.tensor([3, -100, 0, 10, 4, -100], device=device)
    w = torch.rand(11, dtype=torch.float64, device=device) if weighted else None
    ours = cross_entropy(
        logits, target, class_weight=w, reduction=reduction, label_smoothing=label_smoothing
    )
    theirs = F.cross_entropy(
        logits, target, weight=w, reduction=reduction, label_smoothing=label_smoothing
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_class_weights_are_constants(device, reduction):
    logits, w = torch.randn(4, 5, device=device), torch.rand(5, device=device)
    logits.requires_grad_()
    w.requires_grad_()
    target = torch.tensor([3, 0, 1, 4], device=device)
    cross_entropy(logits, target, class_weight=w, reduction=reduction).sum().backward()
    assert logits.grad is not None
    assert w.grad is None


def test_nothing_but_padding_gives_zero_not_nan(device):
    logits = torch.randn(3, 5, device=device, requires_grad=True)
    loss = cross_entropy(logits, torch.full((3,), -100, device=device))
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()


def test_ignored_rows_may_hold_anything(device):
    logits = torch.randn(3, 5, device=device)
    logits[1] = math.nan
    logits.requires_grad_()
    cross_entropy(logits, torch.tensor([0, -100, 4], device=device)).backward()
    assert logits.grad[1].eq(0).all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("unknown", [5, -1, 2**40])
def test_a_target_outside_the_vocabulary_spoils_its_row_alone(device, unknown):
    logits = torch.randn(3, 5, device=device, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0, unknown, 4], device=device), reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False]
    assert logits.grad.isnan().all(-1).tolist() == [False, True, False]
    assert logits.grad.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("lowest", [-math.inf, torch.finfo(torch.bfloat16).min])
def test_forbidden_classes(device, lowest):
    logits = torch.zeros(1, 8, dtype=torch.bfloat16, device=device)
    logits[:, 4:] = lowest
    logits.requires_grad_()
    loss = cross_entropy(logits, torch.tensor([0], device=device))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4.0))
    assert logits.grad[0].tolist() == [-0.75, 0.25, 0.25, 0.25, 0.0, 0.0, 0.0, 0.0]


def test_equal_logits_as_low_as_they_go(device):
    lowest = torch.finfo(torch.float32).min
    logits = torch.full((1, 8), lowest, device=device)
    loss = cross_entropy(logits, torch.tensor([0], device=device))
    # lse = lowest + log 8 is lowest itself in float32.
    assert loss.item() == 0.0


def test_a_shifted_view_is_read_where_it_lies(device):
    logits, target = torch.randn(2, 5, 7, device=device), torch.randint(7, (2, 5), device=device)
    got = cross_entropy(logits[:, :-1], target[:, 1:], reduction="none")
    assert got.shape == (2, 4)
    expected = F.cross_entropy(
        logits[:, :-1].reshape(-1, 7), target[:, 1:].reshape(-1), reduction="none"
    )
    torch.testing.assert_close(got.reshape(-1), expected)


@pytest.mark.parametrize("backend", ["kernels"], indirect=True)
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_as_many_rows_as_the_data_say(device):
    """A compiler knows nothing of their number, and must not be asked how they lie."""
    logits, target = torch.randn(9, 5, 7, device=device), torch.randint(7, (9, 5), device=device)
    live = torch.arange(9, device=device) % 2 == 0

    def of_some(logits, target, live):
        return cross_entropy(logits[live][:, :-1], target[live][:, 1:])

    compiled = torch.compile(of_some, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, target, live), of_some(logits, target, live))


@pytest.mark.parametrize("weighted", [False, True])
def test_many_rows_have_the_mean_of_few(device, monkeypatch, weighted):
    """Beyond so many rows PyTorch adds them up."""
    logits = torch.randn(300, 7, device=device, requires_grad=True)
    target = torch.randint(7, (300,), device=device)
    target[::3] = -100
    class_weight = torch.rand(7, device=device) if weighted else None

    def of(logits):
        return cross_entropy(logits, target, class_weight=class_weight)

    def mean_and_gradient():
        mean = of(logits)
        two = torch.func.vmap(of)(torch.stack([logits, -logits]).detach())
        return mean, two, *torch.autograd.grad(mean, logits)

    few = mean_and_gradient()
    monkeypatch.setattr(room, "_FEW_ROWS", 100)
    torch.testing.assert_close(mean_and_gradient(), few)
