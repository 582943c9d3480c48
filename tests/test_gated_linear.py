"""Facts of gated_linear: the answers of two ops, what is kept, how many products there are."""

import pytest
import torch
import torch.nn.functional as F

from liger_fn.functional import gated_linear, swiglu, using

T, WIDTH, D = 5, 6, 8


@pytest.fixture(params=["kernels", "reference"], autouse=True)
def backend(request):
    with using(request.param):
        yield


def arguments(device, dtype=torch.float64):
    sizes = {"gate": (T, WIDTH), "up": (T, WIDTH), "weight": (D, WIDTH), "bias": (D,)}
    return {
        n: torch.randn(s, device=device, dtype=dtype, requires_grad=True) for n, s in sizes.items()
    }


def test_is_a_unit_and_a_linear_layer(device):
    given = arguments(device)
    got = gated_linear(**given)
    want = F.linear(swiglu(given["gate"], given["up"]), given["weight"], given["bias"])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.sin().sum(), list(given.values())),
        torch.autograd.grad(want.sin().sum(), list(given.values())),
    )


def test_nothing_is_kept_but_what_came_in(device):
    kept = []

    def pack(t):
        kept.append(t)
        return t

    given = arguments(device)
    with using("kernels"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gated_linear(**given)
    assert kept
    assert all(any(t is leaf for leaf in given.values()) for t in kept)


@pytest.mark.parametrize(
    ("wanted", "products"),
    [(("gate", "up", "weight"), 2), (("gate",), 1), (("weight", "bias"), 1), (("bias",), 0)],
)
def test_as_many_products_backward_as_gradients_need(wanted, products, device, monkeypatch):
    given, counted, mm = arguments(device), [], torch.Tensor.mm

    def counting(a, b):
        counted.append((a.shape, b.shape))
        return mm(a, b)

    with using("kernels"):
        y = gated_linear(**{n: t.requires_grad_(n in wanted) for n, t in given.items()})
        monkeypatch.setattr(torch.Tensor, "mm", counting)
        torch.autograd.grad(y.sum(), [given[n] for n in wanted])
    assert len(counted) == products
