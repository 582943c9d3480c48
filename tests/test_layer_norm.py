"""Facts of layer_norm that can be checked by hand or against PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from liger_fn.functional import layer_norm, using
from liger_fn.functional.norm.layer_norm import reference

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def test_two_features_by_hand(device):
    # Mean 5, deviations ∓2, variance 4.
    x = torch.tensor([[3.0, 7.0]], dtype=torch.float64, device=device)
    weight = torch.tensor([10.0, 0.1], dtype=torch.float64, device=device)
    bias = torch.tensor([0.5, 0.25], dtype=torch.float64, device=device)
    expected = torch.tensor([[-9.5, 0.35]], dtype=torch.float64, device=device)
    torch.testing.assert_close(layer_norm(x, weight, bias, eps=0.0), expected, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("D", [32, 20000], ids=["in registers", "wide"])
def test_a_large_mean_does_not_drown_the_variance(D, device):
    # Of 3000² + 1 float32 keeps less than the 1.
    x = torch.ones(2, D, device=device)
    x[:, ::2] = -1.0
    with using("kernels"):
        assert torch.equal(layer_norm(3000.0 + x, eps=0.0), x)


@pytest.mark.parametrize("of_x", FLOATS, ids=str)
@pytest.mark.parametrize("of_weight", FLOATS, ids=str)
def test_weight_and_bias_may_have_another_dtype(of_x, of_weight, device):
    x = torch.randn(5, 8, device=device).to(of_x)
    weight, bias = (torch.randn(8, device=device).to(of_weight) for _ in range(2))
    dy = torch.randn(5, 8, device=device).to(of_x)
    wrt = [t.requires_grad_() for t in (x, weight, bias)]
    with using("kernels"):
        y = layer_norm(*wrt)
        got = torch.autograd.grad(y, wrt, dy)
    assert [t.dtype for t in (y, *got)] == [of_x, of_x, of_weight, of_weight]

    exact = [t.detach().double().requires_grad_() for t in wrt]
    expected = torch.autograd.grad(reference(*exact), exact, dy.double())
    for a, b, dtype in zip(got, expected, (of_x, of_weight, of_weight), strict=True):
        # Statistics are float32 at best unless x is float64, and each answer is rounded once.
        rounding = torch.finfo(dtype).eps
        if of_x is not torch.float64:
            rounding = max(rounding, 1e-5)
        torch.testing.assert_close(a.double(), b, rtol=2 * rounding, atol=8 * rounding)


def test_without_weight_and_bias_it_is_torchs(device):
    x = torch.randn(3, 5, 24, dtype=torch.float64, device=device)
    with using("kernels"):
        got = layer_norm(x)
    torch.testing.assert_close(got, F.layer_norm(x, (24,)), rtol=1e-12, atol=1e-12)
