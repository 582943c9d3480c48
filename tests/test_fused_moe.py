"""Facts of fused_moe: Hugging Face's answers, its work, and tokens without experts."""

import math

import pytest
import torch
from test_fused_linear_cross_entropy import LargestTensor
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import liger_fn.nn as lnn
from liger_fn.functional import fused_moe, using
from liger_fn.functional.mlp import moe as room

T, D, F, E, K = 9, 8, 6, 5, 2


@pytest.fixture(params=["kernels", "reference"], autouse=True)
def backend(request):
    with using(request.param):
        yield


@pytest.fixture
def tokens(device):
    """x, each token's experts and their weights."""
    indices = torch.rand(T, E, device=device).argsort(-1)[:, :K]
    weights = torch.rand(T, K, dtype=torch.float64, device=device, requires_grad=True)
    x = torch.randn(T, D, dtype=torch.float64, device=device, requires_grad=True)
    return x, indices, weights


def qwen():
    config = Qwen3MoeConfig(
        hidden_size=D, moe_intermediate_size=F, num_experts=E, hidden_act="gelu"
    )
    return config, Qwen3MoeExperts, lnn.Experts(E, D, F, activation="gelu")


def gpt_oss():
    config = GptOssConfig(hidden_size=D, intermediate_size=F, num_local_experts=E)
    unit = {"alpha": 1.702, "limit": 7.0, "up_offset": 1.0, "interleaved": True}
    return config, GptOssExperts, lnn.Experts(E, D, F, bias=True, transposed=True, **unit)


@pytest.mark.parametrize("make", [qwen, gpt_oss])
def test_is_hugging_faces(make, tokens, device):
    config, theirs, ours = make()
    config._experts_implementation = "eager"
    theirs, ours = theirs(config).to(device, torch.float64), ours.to(device, torch.float64)
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    got, want = ours(*tokens), theirs(*tokens)
    torch.testing.assert_close(got, want)
    x, _, weights = tokens
    torch.testing.assert_close(
        torch.autograd.grad(got.sin().sum(), (x, weights, *ours.parameters())),
        torch.autograd.grad(want.sin().sum(), (x, weights, *theirs.parameters())),
    )


@pytest.fixture
def experts(device):
    return lnn.Experts(E, D, F, bias=True, device=device, dtype=torch.float64)


def test_an_index_of_no_expert_adds_nothing(tokens, experts):
    x, indices, weights = tokens
    elsewhere = indices.clone()
    elsewhere[0, 1], elsewhere[3] = E, -7
    weights = weights.detach().masked_fill(elsewhere != indices, math.nan).requires_grad_()
    y = experts(x, elsewhere, weights)
    assert (y[3] == 0).all()
    one = experts(x[:1], indices[:1, :1], weights[:1, :1])
    torch.testing.assert_close(y[:1], one)
    dx, dweights = torch.autograd.grad(y.sum(), (x, weights))
    assert (dx[3] == 0).all()
    assert dx.isfinite().all()
    assert (dweights[elsewhere != indices] == 0).all()


def test_the_order_of_tokens_does_not_matter(tokens, experts, device):
    order = torch.randperm(T, device=device)
    y = experts(*tokens)
    torch.testing.assert_close(experts(*(t[order] for t in tokens)), y[order])


def test_an_expert_that_nobody_wants_gets_a_gradient_of_0(tokens, experts):
    x, indices, weights = tokens
    y = experts(x, indices % (E - 1), weights)
    for gradient in torch.autograd.grad(y.sum(), list(experts.parameters())):
        assert (gradient[E - 1] == 0).all()
        assert gradient.isfinite().all()


def test_no_tensor_has_a_row_for_every_expert(device):
    """The work is that of K experts a token, however many there are."""
    with using("kernels"):
        many = 64
        x = torch.randn(T, D, device=device, requires_grad=True)
        indices = torch.randint(many, (T, K), device=device)
        weights = torch.rand(T, K, device=device)
        gate_up, down = torch.randn(many, 2 * F, D), torch.randn(many, D, F)
        with LargestTensor() as largest:
            y = fused_moe(x, indices, weights, gate_up.to(device), down.to(device))
            torch.autograd.grad(y.sum(), x)
    assert largest.numel <= max(gate_up.numel(), T * K * max(2 * F, D))


def test_the_order_and_the_places_of_pairs(device):
    indices = torch.tensor([[2, 0], [0, 9], [2, -1]], device=device)
    order, experts, place = (torch.empty(6, dtype=torch.int64, device=device) for _ in range(3))
    ends = torch.empty(3, dtype=torch.int32, device=device)
    room._route(indices, 3, order, place, experts, ends)
    assert experts.tolist() == [0, 0, 2, 2, 3, 3]
    assert order.tolist() == [1, 2, 0, 4, 3, 5]
    assert place[order].tolist() == list(range(6))
    assert ends.tolist() == [2, 2, 4]
