"""Facts about geglu that can be checked by hand."""

import pytest
import torch

from liger_fn.functional import geglu


@pytest.mark.parametrize(
    ("approximate", "phi_of_1"), [("none", 0.841344746), ("tanh", 0.841191991)]
)
def test_normal_distribution(approximate, phi_of_1, device):
    gate = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64, device=device)
    y = geglu(gate, torch.full_like(gate, 2.0), approximate=approximate)
    expected = torch.tensor([2 * phi_of_1, -2 * (1 - phi_of_1), 0.0], device=device).double()
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-7)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's exp is NumPy's
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("large", [300.0, 3e38])
def test_far_out_it_is_linear_or_zero(approximate, large, device):
    gate = torch.tensor([large, -large], device=device, requires_grad=True)
    up = torch.tensor([0.5, 0.5], device=device, requires_grad=True)
    y = geglu(gate, up, approximate=approximate)
    dgate, dup = torch.autograd.grad(y.sum(), (gate, up))
    assert y.tolist() == [gate[0].item() / 2, 0.0]
    assert dgate.tolist() == [0.5, 0.0]
    assert dup.tolist() == [gate[0].item(), 0.0]
