"""Facts about poly_norm that can be checked by hand or against PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from liger_fn.functional import poly_norm


def test_by_hand(device):
    # Of ±1 every norm is the power itself: 1 · ±1 + 2 · 1 + 4 · ±1 + 8.
    x = torch.tensor([[1.0, -1.0]], dtype=torch.float64, device=device)
    weight = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64, device=device)
    bias = torch.tensor([8.0], dtype=torch.float64, device=device)
    assert poly_norm(x, weight, bias, eps=0.0).tolist()[0] == pytest.approx([15.0, 5.0])


def test_is_three_rms_norms(device):
    x = torch.randn(4, 9, dtype=torch.float64, device=device, requires_grad=True)
    w = torch.randn(3, dtype=torch.float64, device=device, requires_grad=True)
    b = torch.randn((), dtype=torch.float64, device=device, requires_grad=True)
    ours = poly_norm(x, w, b)
    theirs = sum(w[3 - k] * F.rms_norm(x**k, (9,), eps=1e-6) for k in (3, 2, 1)) + b
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sin().sum(), (x, w, b)),
        torch.autograd.grad(theirs.sin().sum(), (x, w, b)),
    )
