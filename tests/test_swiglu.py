"""Facts about swiglu that can be checked by hand."""

import math

import pytest
import torch

from liger_fn.functional import swiglu
from liger_fn.functional.activation import glu


def test_three_quarters(device):
    # σ(ln 3) = 3/4
    gate, up = (
        torch.tensor([math.log(3), 0.0], device=device),
        torch.tensor([8.0, 5.0], device=device),
    )
    torch.testing.assert_close(
        swiglu(gate, up), torch.tensor([6 * math.log(3), 0.0], device=device)
    )


@pytest.mark.filterwarnings(
    "ignore:overflow encountered in exp"
)  # the interpreter's exp is NumPy's
@pytest.mark.parametrize("large", [300.0, 3e38])
def test_far_out_it_is_linear_or_zero(large, device):
    gate = torch.tensor([large, -large], device=device, requires_grad=True)
    up = torch.tensor([0.5, 0.5], device=device, requires_grad=True)
    y = swiglu(gate, up)
    dgate, dup = torch.autograd.grad(y.sum(), (gate, up))
    assert y.tolist() == [gate[0].item() / 2, 0.0]
    assert dgate.tolist() == [0.5, 0.0]
    assert dup.tolist() == [gate[0].item(), 0.0]


def test_packed_is_gate_then_up(device):
    packed = torch.randn(3, 10, device=device, requires_grad=True)
    gate, up = (t.detach().requires_grad_() for t in packed.chunk(2, -1))
    y, expected = swiglu(packed), swiglu(gate, up)
    assert torch.equal(y, expected)
    (dpacked,) = torch.autograd.grad(y.sum(), packed)
    assert torch.equal(dpacked, torch.cat(torch.autograd.grad(expected.sum(), (gate, up)), -1))


def test_views_of_a_projection_are_not_copied(device, monkeypatch):
    passed = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: passed.extend(args[:2])

    monkeypatch.setattr(glu, "_glu_fwd_kernel", Kernel())
    projection = torch.randn(2, 3, 16, device=device)
    gate, up = projection.chunk(2, -1)
    swiglu(gate, up)
    assert [t.data_ptr() for t in passed] == [gate.data_ptr(), up.data_ptr()]
