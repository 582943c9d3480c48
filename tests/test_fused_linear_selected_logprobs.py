"""Facts of fused_linear_selected_logprobs: its chunks, equal tokens, and distillation by it."""

import pytest
import torch

from liger_fn.functional import (
    fused_linear_kl_div,
    fused_linear_logprobs,
    fused_linear_selected_logprobs,
    using,
)
from liger_fn.functional.preference import distillation_loss

N, H, V, K = 12, 4, 40, 5


@pytest.fixture(params=["kernels", "reference"], autouse=True)
def backend(request):
    with using(request.param):
        yield


@pytest.fixture
def leaves(device):
    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, device=device, requires_grad=True)

    return normal(V, H), normal(N, H)


@pytest.fixture
def indices(device):
    return torch.randint(V, (N, K), device=device)


def test_every_chunk_size_gives_the_same(leaves, indices):
    def answers(chunk_size):
        logp = fused_linear_selected_logprobs(*leaves, indices, chunk_size)
        return logp, *torch.autograd.grad(logp.square().sum(), leaves)

    whole = answers(None)
    for chunk_size in (1, 5, N - 1, N, N + 1):
        torch.testing.assert_close(answers(chunk_size), whole, rtol=1e-12, atol=1e-12)


def test_are_those_of_fused_linear_logprobs(leaves, indices):
    options = {"temperature": 0.7, "softcap": 2.0, "logit_scale": 0.5}
    ours = fused_linear_selected_logprobs(*leaves, indices, **options)
    one_by_one = [fused_linear_logprobs(*leaves, t, **options) for t in indices.unbind(-1)]
    torch.testing.assert_close(ours, torch.stack(one_by_one, -1))


def test_one_token_selected_often(leaves, device):
    indices = torch.full((N, 7), 3, device=device)
    often = fused_linear_selected_logprobs(*leaves, indices).sum()
    once = 7 * fused_linear_selected_logprobs(*leaves, indices[:, :1]).sum()
    torch.testing.assert_close(
        torch.autograd.grad(often, leaves), torch.autograd.grad(once, leaves)
    )


def test_places_that_are_ignored_and_tokens_that_there_are_not(leaves, indices):
    short = indices.clone()
    short[:, 2:] = -100
    logp = fused_linear_selected_logprobs(*leaves, short)
    assert (logp[:, 2:] == 0).all()
    two = fused_linear_selected_logprobs(*leaves, indices[:, :2])
    torch.testing.assert_close(logp[:, :2], two)
    torch.testing.assert_close(
        torch.autograd.grad(logp.square().sum(), leaves),
        torch.autograd.grad(two.square().sum(), leaves),
    )

    indices[3, 1] = V
    logp = fused_linear_selected_logprobs(*leaves, indices)
    assert logp.isnan().nonzero().tolist() == [[3, 1]]
    (dx,) = torch.autograd.grad(logp.sum(), leaves[1])
    assert torch.equal(dx.isnan().all(-1), logp.isnan().any(-1))


def test_of_all_tokens_it_is_the_divergence_of_the_heads(leaves, device):
    teacher_weight, teacher_x = (t.detach().flip(0) for t in leaves)
    teacher = (teacher_x @ teacher_weight.T).log_softmax(-1)
    likeliest = teacher.sort(-1, descending=True)
    logp = fused_linear_selected_logprobs(*leaves, likeliest.indices)
    loss = distillation_loss(logp, likeliest.values, divergence="forward_kl")
    whole = fused_linear_kl_div(*leaves, teacher_weight, teacher_x)
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(whole, leaves)
    )
