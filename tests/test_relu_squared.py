"""Facts about relu_squared that can be checked by hand or against transformers."""

import torch
from transformers.activations import ACT2FN

from liger_fn.functional import relu_squared


def test_by_hand(device):
    x = torch.tensor([-3.0, 0.0, 3.0], device=device, requires_grad=True)
    y = relu_squared(x)
    assert y.tolist() == [0.0, 0.0, 9.0]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [0.0, 0.0, 6.0]


def test_is_transformers_relu2(device):
    x = torch.randn(5, 9, dtype=torch.float64, device=device)
    torch.testing.assert_close(relu_squared(x), ACT2FN["relu2"](x))


def test_nan_stays_nan(device):
    x = torch.tensor([float("nan")], device=device, requires_grad=True)
    y = relu_squared(x)
    assert y.isnan().all()
    assert torch.autograd.grad(y.sum(), x)[0].isnan().all()
