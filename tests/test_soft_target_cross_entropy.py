"""Facts about soft_target_cross_entropy that can be checked by hand or against PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F

from liger_fn.functional import cross_entropy, soft_target_cross_entropy, using


@pytest.fixture(params=["kernels", "reference"], autouse=True)
def backend(request):
    with using(request.param):
        yield


def test_two_classes_by_hand(device):
    logits = torch.tensor([[0.0, math.log(3.0)]], device=device, requires_grad=True)
    loss = soft_target_cross_entropy(logits, torch.tensor([[0.5, 0.5]], device=device))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4.0) - 0.5 * math.log(3.0))
    assert logits.grad.tolist()[0] == pytest.approx([-0.25, 0.25])


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
def test_is_what_torch_computes(reduction, label_smoothing, device):
    logits, target = torch.randn(2, 6, 11, dtype=torch.float64, device=device).unbind()
    logits, target = logits.requires_grad_(), target.softmax(-1).requires_grad_()
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    ours = soft_target_cross_entropy(logits, target, **options)
    theirs = F.cross_entropy(logits, target, **options)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), (logits, target)),
        torch.autograd.grad(theirs.sum(), (logits, target)),
    )


def test_one_hot_targets_are_classes(device):
    logits, target = torch.randn(5, 7, device=device), torch.tensor([3, 0, 6, 2, 2], device=device)
    one_hot = F.one_hot(target, 7).to(logits.dtype)
    torch.testing.assert_close(
        soft_target_cross_entropy(logits, one_hot), cross_entropy(logits, target)
    )


def test_a_forbidden_class_of_target_0_adds_nothing(device):
    """torch gives NaN, of 0 · ∞."""
    logits = torch.tensor([[0.0, 0.0, -math.inf]], device=device, requires_grad=True)
    target = torch.tensor([[0.5, 0.5, 0.0]], device=device)
    assert F.cross_entropy(logits, target).isnan()
    loss = soft_target_cross_entropy(logits, target)
    assert loss.item() == pytest.approx(math.log(2.0))
    assert torch.autograd.grad(loss, logits)[0].tolist() == [[0.0, 0.0, 0.0]]


def test_a_temperature_is_a_scale(device):
    logits, target = torch.randn(2, 4, 9, dtype=torch.float64, device=device).unbind()
    target = target.softmax(-1)
    torch.testing.assert_close(
        soft_target_cross_entropy(logits, target, logit_scale=0.25),
        F.cross_entropy(logits / 4.0, target),
    )
