"""Facts of fused_add_rms_norm that can be checked by hand or against the two ops it fuses."""

import pytest
import torch

from liger_fn.functional import fused_add_rms_norm, rms_norm, using
from liger_fn.functional.core.launch import interpreted
from liger_fn.functional.norm import fused_add_rms_norm as room

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def test_two_features_by_hand(device):
    # The sum is 3 and 4, whose mean square is 12.5.
    x = torch.tensor([[1.0, 5.0]], dtype=torch.float64, device=device)
    residual = torch.tensor([[2.0, -1.0]], dtype=torch.float64, device=device)
    weight = torch.tensor([0.0, 1.0], dtype=torch.float64, device=device)
    y, s = fused_add_rms_norm(x, residual, weight, eps=0.0, offset=0.1)
    assert s.tolist() == [[3.0, 4.0]]
    expected = torch.tensor([[0.3, 4.4]], dtype=torch.float64, device=device) / 12.5**0.5
    # An offset in 32 bits would be wrong in the ninth place.
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_sum_is_rounded_before_it_is_normalised(dtype, device):
    if dtype is torch.bfloat16 and interpreted():
        pytest.skip("Triton's interpreter truncates float32 to bfloat16, where PyTorch rounds")
    x, residual = (torch.randn(7, 96, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(96, device=device).to(dtype)
    with using("kernels"):
        y, s = fused_add_rms_norm(x, residual, weight)
        assert torch.equal(s, x + residual)
        # In another kernel the compiler may fuse other products and sums into one rounding, which
        # may turn the last bit over.
        torch.testing.assert_close(
            y, rms_norm(x + residual, weight), rtol=torch.finfo(dtype).eps, atol=0.0
        )


def gradients(x, residual, weight, use):
    wrt = [t.detach().requires_grad_() for t in (x, residual, weight)]
    with using("kernels"):
        out = use(*fused_add_rms_norm(*wrt))
        return torch.autograd.grad(out.sum(), wrt, materialize_grads=True)


@pytest.mark.parametrize(
    ("use", "launched"),
    [
        (lambda y, s: y * s, ["with ds"]),
        (lambda y, s: y, ["without ds"]),
        (lambda y, s: s, []),
    ],
    ids=["both", "y", "s"],
)
def test_an_unused_result_costs_no_cotangent(use, launched, device, monkeypatch):
    seen, norm_bwd = [], room.norm_bwd

    def watched(x, weight, bias, mean, rstd, dy, ds, *rest, **needs):
        seen.append("without ds" if ds is None else "with ds")
        return norm_bwd(x, weight, bias, mean, rstd, dy, ds, *rest, **needs)

    monkeypatch.setattr(room, "norm_bwd", watched)
    x, residual = (torch.randn(5, 24, dtype=torch.float64, device=device) for _ in range(2))
    weight = torch.randn(24, dtype=torch.float64, device=device)
    got = gradients(x, residual, weight, use)
    assert seen == launched

    wrt = [t.requires_grad_() for t in (x, residual, weight)]
    out = use(*room.reference(*wrt))
    torch.testing.assert_close(
        got, torch.autograd.grad(out.sum(), wrt, materialize_grads=True), rtol=1e-12, atol=1e-12
    )


def test_both_inputs_get_one_gradient_tensor(device):
    x, residual = (torch.randn(5, 24, device=device) for _ in range(2))
    weight = torch.randn(24, device=device)
    dx, dresidual, _ = gradients(x, residual, weight, lambda y, s: y * s)
    assert dx.data_ptr() == dresidual.data_ptr()


def test_one_tensor_may_be_both_inputs(device):
    x = torch.randn(3, 8, dtype=torch.float64, device=device, requires_grad=True)
    with using("kernels"):
        assert torch.autograd.gradcheck(lambda x: fused_add_rms_norm(x, x), x)
