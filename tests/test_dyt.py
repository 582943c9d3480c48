"""Facts about dyt that can be checked by hand."""

import math

import pytest
import torch

from liger_fn.functional import dyt


def test_by_hand(device):
    # tanh(ln 3 / 2) = 1/2
    x = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64, device=device, requires_grad=True)
    alpha = torch.tensor([0.5], dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.tensor([4.0, 2.0], dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.tensor([1.0, 3.0], dtype=torch.float64, device=device, requires_grad=True)
    y = dyt(x, alpha, weight, bias)
    assert y.tolist()[0] == pytest.approx([3.0, 3.0])
    dx, dalpha, dweight, dbias = torch.autograd.grad(y.sum(), (x, alpha, weight, bias))
    assert dx.tolist()[0] == pytest.approx([0.5 * 4.0 * 0.75, 0.5 * 2.0])
    assert dalpha.tolist() == pytest.approx([math.log(3.0) * 4.0 * 0.75])
    assert dweight.tolist() == pytest.approx([0.5, 0.0])
    assert dbias.tolist() == [1.0, 1.0]


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's exp is NumPy's
def test_far_out_it_is_flat(device):
    x = torch.tensor([3e38, -3e38], device=device, requires_grad=True)
    y = dyt(x, torch.ones((), device=device))
    assert y.tolist() == [1.0, -1.0]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [0.0, 0.0]
