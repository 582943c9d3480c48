"""Facts about sparsemax that can be checked by hand."""

import math

import numpy as np
import pytest
import torch

from liger_fn.functional import sparsemax, using
from liger_fn.functional.core.launch import interpreted


@pytest.fixture(params=["kernels", "reference"], autouse=True)
def backend(request):
    with using(request.param):
        yield


def test_by_hand(device):
    # τ = (1.5 + 1.2 − 1) / 2
    x = torch.tensor([1.5, 1.2, 0.1], dtype=torch.float64, device=device, requires_grad=True)
    y = sparsemax(x)
    assert y.tolist() == pytest.approx([0.65, 0.35, 0.0])
    (dx,) = torch.autograd.grad(y, x, torch.tensor([3.0, 1.0, 9.0], device=device).double())
    assert dx.tolist() == pytest.approx([1.0, -1.0, 0.0])


def test_is_a_distribution(device):
    y = sparsemax(torch.randn(20, 300, dtype=torch.float64, device=device) * 3)
    assert (y >= 0).all()
    torch.testing.assert_close(y.sum(-1), torch.ones(20, device=device).double())


def test_a_distribution_is_its_own_projection(device):
    p = torch.rand(5, 33, dtype=torch.float64, device=device).softmax(-1)
    torch.testing.assert_close(sparsemax(p), p)


def test_a_row_does_not_depend_on_its_neighbours(device):
    x = torch.randn(8, 40, device=device) * torch.logspace(-3, 2, 8, device=device)[:, None]
    alone = torch.cat([sparsemax(row[None]) for row in x])
    assert torch.equal(sparsemax(x), alone)


@pytest.fixture
def division_of_a_gpu(monkeypatch):
    """Let the interpreter divide as a GPU does unless told otherwise: wrong in the last bit."""
    if interpreted():
        from triton.runtime.interpreter import InterpreterBuilder

        def divide(self, a, b):
            return self.binary_op(a, b, lambda a, b: (a * (a.dtype.type(1) / b)).astype(a.dtype))

        monkeypatch.setattr(InterpreterBuilder, "create_fdiv", divide)


@pytest.mark.parametrize("D", [64, 17000])
def test_an_element_at_the_threshold_is_outside(D, device, division_of_a_gpu):
    """Rows of 2 to 40 numbers over τ = 2, of a grid of 1/64, and one at τ."""
    x = torch.full((39, D), -1.0)
    random = np.random.default_rng(0)
    for size, row in enumerate(x, 2):
        cuts = np.sort(random.choice(np.arange(1, 64), size - 1, replace=False))
        row[:size] = torch.from_numpy(np.diff(cuts, prepend=0, append=64)) / 64.0 + 2.0
        row[size] = 2.0
    y = sparsemax(x.to(device, torch.bfloat16))
    assert (y > 0).sum(-1).tolist() == list(range(2, 41))


@pytest.mark.parametrize("D", [4, 17000])
def test_forbidden_elements(D, device):
    x = torch.full((1, D), -math.inf, device=device)
    x[0, 1], x[0, 3] = 7.0, 7.0
    y = sparsemax(x)
    assert y[0, :4].tolist() == [0.0, 0.5, 0.0, 0.5]
    assert y.sum().item() == 1.0


@pytest.mark.parametrize("D", [4, 17000])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_row_is_nan_alone(D, broken, device):
    x = torch.randn(3, D, device=device)
    x[1, 2] = broken
    y = sparsemax(x)
    assert y.isnan().all(-1).tolist() == [False, True, False]
    assert y.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("D", [4, 17000])
def test_nothing_allowed_is_nan_as_in_softmax(D, device):
    x = torch.full((1, D), -math.inf, device=device)
    assert x.softmax(-1).isnan().all()
    assert sparsemax(x).isnan().all()
