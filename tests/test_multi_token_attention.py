"""Facts of multi_token_attention that a reader can check by hand."""

import pytest
import torch

import liger_fn.nn as lnn
from liger_fn.functional import multi_token_attention, softmax, sparsemax


@pytest.fixture
def scores(device):
    return torch.randn(2, 4, 6, 6, dtype=torch.float64, device=device, requires_grad=True)


def one_tap(device, *at, size=(3, 3)):
    """A convolution of one head that reads nothing but one place of its window."""
    weight = torch.zeros(1, 1, *size, dtype=torch.float64, device=device)
    weight[0, 0][at] = 1.0
    return weight


def past(T, device):
    return torch.ones(T, T, dtype=torch.bool, device=device).tril()


@pytest.mark.parametrize("sparse", [False, True])
def test_one_tap_in_the_middle_gives_the_weights_of_attention(sparse, scores, device):
    s = scores[:, :1]
    y = multi_token_attention(s, one_tap(device, 1, 1), padding=1, sparse=sparse)
    mask = past(6, device)
    p = sparsemax(s.masked_fill(~mask, -torch.inf)) if sparse else softmax(s, mask=mask)
    torch.testing.assert_close(y, p)
    torch.testing.assert_close(y.sum(-1), torch.ones_like(y[..., 0]))


def test_taps_move_along_queries_and_keys(scores, device):
    s = scores[:, :1]
    p = softmax(s, mask=past(6, device))
    of_the_query_before = multi_token_attention(s, one_tap(device, 1, 1), padding="causal")
    torch.testing.assert_close(of_the_query_before[..., 1:, :], p[..., :-1, :].tril())
    of_the_key_before = multi_token_attention(s, one_tap(device, 2, 0), padding="causal")
    torch.testing.assert_close(of_the_key_before[..., 1:], p[..., :-1].tril(-1))


@pytest.mark.parametrize(("padding", "leaks"), [("causal", False), (1, True)])
def test_only_causal_padding_keeps_later_queries_out(padding, leaks, scores, device):
    """Scores of a later query hold a later token."""
    weight = torch.ones(4, 4, 3, 3, dtype=torch.float64, device=device)
    y = multi_token_attention(scores, weight, padding=padding)
    (g,) = torch.autograd.grad(y[..., :3, :].square().sum(), scores)
    assert bool(g[..., 3:, :].any()) == leaks
    assert g[..., :3, :].any()


def test_keys_after_the_query_are_not_read(scores, device):
    weight = torch.ones(4, 4, 3, 3, dtype=torch.float64, device=device)
    broken = scores.detach().masked_fill(~past(6, device), torch.nan).requires_grad_()
    results = [multi_token_attention(s, weight, padding=1) for s in (scores, broken)]
    torch.testing.assert_close(*results)
    gradients = [
        torch.autograd.grad(y.sin().sum(), s)[0]
        for y, s in zip(results, (scores, broken), strict=True)
    ]
    torch.testing.assert_close(*gradients)
    assert not gradients[0].triu(1).any()


@pytest.mark.parametrize("shift", [-2e9, 2e9])
def test_no_score_is_too_low_for_a_mask(shift, scores, device):
    """A mask of -1e9 would lose to these."""
    s = torch.zeros(1, 1, 4, 4, device=device) + shift
    y = multi_token_attention(s, one_tap(device, 1, 1).float(), padding=1)
    expected = past(4, device).float() / torch.arange(1, 5, device=device)[:, None]
    torch.testing.assert_close(y[0, 0], expected)


def test_a_query_without_scores_gives_the_bias(scores, device):
    s = scores.detach()[:1, :1].clone()
    s[0, 0, 2] = -torch.inf
    s.requires_grad_()
    bias = torch.full((1,), 0.5, dtype=torch.float64, device=device)
    y = multi_token_attention(s, one_tap(device, 1, 1), bias, padding=1)
    assert (y[0, 0, 2, :3] == 0.5).all()
    assert (y[0, 0, 2, 3:] == 0.0).all()
    (g,) = torch.autograd.grad(y.sin().sum(), s)
    assert not g[0, 0, 2].any()
    assert g.isfinite().all()


def test_long_sequences_and_sparse_weights_in_16_bits(device):
    s = torch.zeros(1, 1, 1030, 1030, dtype=torch.bfloat16, device=device)
    y = multi_token_attention(s, one_tap(device, 1, 1).to(s), padding=1, sparse=True)
    count = torch.arange(1, 1031, device=device, dtype=torch.float32)
    torch.testing.assert_close(y[0, 0, :, 0].float(), 1 / count, rtol=1e-2, atol=0.0)


def test_cudnn_is_left_as_it_was(scores, device):
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    weight = torch.ones(4, 4, 3, 3, dtype=torch.float64, device=device)
    multi_token_attention(scores, weight, padding=1).sum().backward()
    assert (cudnn.deterministic, cudnn.benchmark) == before


def test_nothing_is_kept_but_scores_and_weight(scores, device):
    weight = torch.ones(4, 4, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
    kept = []

    def pack(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        multi_token_attention(scores, weight, padding=1)
    assert {t.data_ptr() for t in kept} == {scores.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("padding", [1, "causal"])
def test_the_module_holds_what_a_convolution_holds(sparse, padding, scores, device):
    theirs = torch.nn.Conv2d(4, 8, 3, groups=2, device=device, dtype=torch.float64)
    ours = lnn.MultiTokenAttention(
        4, 8, 3, padding=padding, groups=2, sparse=sparse, device=device, dtype=torch.float64
    )
    ours.load_state_dict(theirs.state_dict())
    expected = multi_token_attention(
        scores, theirs.weight, theirs.bias, padding=padding, groups=2, sparse=sparse
    )
    torch.testing.assert_close(ours(scores), expected)
    assert lnn.MultiTokenAttention(4, 4, (6, 11), bias=False).bias is None
