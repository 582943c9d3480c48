"""Facts of attention_residual: the paper's formula, its start, depth anywhere and of any size."""

import pytest
import torch
import torch.nn.functional as F

import liger_fn.nn as lnn
from liger_fn.functional import attention_residual, using

L, B, T, D = 5, 2, 3, 8


@pytest.fixture(params=["kernels", "reference"], autouse=True)
def backend(request):
    with using(request.param):
        yield


@pytest.fixture
def given(device):
    shapes = {"values": (L, B, T, D), "query": (D,), "weight": (D,)}
    return {n: torch.randn(s, dtype=torch.float64, device=device) for n, s in shapes.items()}


def in_a_loop(values, query, weight, eps=1e-6):
    """One token and one block after the other, as the paper has it."""
    out = torch.zeros_like(values[0])
    for b in range(B):
        for t in range(T):
            scores = [query @ F.rms_norm(v[b, t], (D,), weight, eps) for v in values]
            out[b, t] = sum(a * v[b, t] for a, v in zip(_softmax(scores), values, strict=True))
    return out


def _softmax(scores):
    total = sum(s.exp() for s in scores)
    return [s.exp() / total for s in scores]


def test_is_the_papers(given):
    torch.testing.assert_close(attention_residual(**given), in_a_loop(**given))


def test_a_module_starts_as_the_mean_of_all_blocks(given):
    residual = lnn.AttentionResidual(D, dtype=torch.float64).to(given["values"].device)
    torch.testing.assert_close(residual(given["values"]), given["values"].mean(0))
    assert list(residual.state_dict()) == ["query", "weight"]
    assert list(lnn.AttentionResidual(D, elementwise_affine=False).state_dict()) == ["query"]
    assert "eps=1e-06" in repr(residual)


def test_a_list_is_stacked_and_depth_may_lie_anywhere(given):
    want, values = attention_residual(**given), given.pop("values")
    outputs = [v.clone().requires_grad_() for v in values]
    got = attention_residual(outputs, **given)
    torch.testing.assert_close(got, want)
    for dim in (1, 2, -2):
        moved = values.movedim(0, dim)
        torch.testing.assert_close(attention_residual(moved, **given, dim=dim), want)
    stacked = values.clone().requires_grad_()
    torch.testing.assert_close(
        torch.stack(torch.autograd.grad(got.sin().sum(), outputs)),
        *torch.autograd.grad(attention_residual(stacked, **given).sin().sum(), stacked),
    )


def test_the_gradient_of_each_block_is_dense(given):
    values = given.pop("values").requires_grad_()
    with using("kernels"):
        (dvalues,) = torch.autograd.grad(attention_residual(values, **given).sin().sum(), values)
    assert all(d.is_contiguous() for d in dvalues)


@pytest.mark.parametrize("depth", [33, 70])
def test_no_block_is_left_out(depth, device):
    """Only the last block has a large score, so that the mix is what it has given."""
    values = torch.zeros(depth, 1, D, dtype=torch.float64, device=device)
    values[:-1, :, 0], values[-1, :, 1] = -1.0, 1.0
    query = torch.zeros(D, dtype=torch.float64, device=device)
    query[:2] = 50.0
    torch.testing.assert_close(attention_residual(values, query), values[-1])
