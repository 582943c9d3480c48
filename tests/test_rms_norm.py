"""Facts of rms_norm that can be checked by hand or against PyTorch."""

import pytest
import torch

from liger_fn.functional import rms_norm, using
from liger_fn.functional.norm.rms_norm import reference

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def test_two_features_by_hand(device):
    # The mean square of 3 and 4 is 12.5.
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64, device=device)
    weight = torch.tensor([0.0, 1.0], dtype=torch.float64, device=device)
    y = rms_norm(x, weight, eps=0.0, offset=0.1)
    expected = torch.tensor([[0.3, 4.4]], dtype=torch.float64, device=device) / 12.5**0.5
    # An offset in 32 bits would be wrong in the ninth place.
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("of_x", FLOATS, ids=str)
@pytest.mark.parametrize("of_weight", FLOATS, ids=str)
def test_the_weight_may_have_another_dtype(of_x, of_weight, device):
    x = torch.randn(5, 8, device=device).to(of_x).requires_grad_()
    weight = torch.randn(8, device=device).to(of_weight).requires_grad_()
    dy = torch.randn(5, 8, device=device).to(of_x)
    with using("kernels"):
        y = rms_norm(x, weight)
        got = torch.autograd.grad(y, (x, weight), dy)
    assert [t.dtype for t in (y, *got)] == [of_x, of_x, of_weight]

    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = torch.autograd.grad(reference(x, weight), (x, weight), dy.double())
    for a, b, dtype in zip(got, expected, (of_x, of_weight), strict=True):
        # Statistics are float32 at best unless x is float64, and each answer is rounded once.
        rounding = torch.finfo(dtype).eps
        if of_x is not torch.float64:
            rounding = max(rounding, 1e-5)
        torch.testing.assert_close(a.double(), b, rtol=2 * rounding, atol=8 * rounding)
