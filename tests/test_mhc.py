"""Facts of mhc_pre and mhc_post: Hugging Face's answers, and what the mixing leaves as it is."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import liger_fn.nn as lnn
from liger_fn.functional import mhc_post, mhc_pre, using
from liger_fn.testing.spec import Draw
from liger_fn.testing.specs import mhc_pre as spec

T, H, D = 5, 4, 6


@pytest.fixture(params=["kernels", "reference"], autouse=True)
def backend(request):
    with using(request.param):
        yield


@pytest.fixture
def given(device):
    draw = Draw(device, torch.float64)
    return {n: t.double() for n, t in spec.arguments(draw, 2, T, H, D).items()}


def test_is_hugging_faces(given):
    theirs = pytest.importorskip(
        "transformers.models.deepseek_v4.modeling_deepseek_v4",
        reason="this transformers has no DeepSeek-V4",
    )
    config = SimpleNamespace(
        hc_mult=H, hc_sinkhorn_iters=5, hc_eps=1e-3, rms_norm_eps=1e-5, hidden_size=D
    )
    device = given["x"].device
    theirs = theirs.DeepseekV4HyperConnection(config).to(device)
    ours = lnn.HyperConnection(D, H, 5, eps=1e-5, sinkhorn_eps=1e-3, pre_eps=1e-3, device=device)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.5)
    ours.load_state_dict(theirs.state_dict())
    x, layer = given["x"].float().requires_grad_(), nn.Linear(D, D).to(device)

    def block(connection, mixed):
        post, comb, h = connection(x)
        return mixed(post, comb, layer(h))

    want = block(
        theirs,
        lambda post, comb, y: post[..., None] * y[..., None, :] + comb.transpose(-1, -2) @ x,
    )
    got = block(ours, lambda post, comb, y: mhc_post(x, y, post, comb.transpose(-1, -2)))
    connected = lnn.HyperConnected(layer, D, H, iterations=5).to(device)
    connected.connection = ours
    # Sums of 24 products and ten normalisations in float32, in another order.
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(got, want, **close)
    torch.testing.assert_close(connected(x), want, **close)
    torch.testing.assert_close(
        torch.autograd.grad(got.sin().sum(), (x, *ours.parameters())),
        torch.autograd.grad(want.sin().sum(), (x, *theirs.parameters())),
        **close,
    )
    assert "iterations=5" in repr(connected)


def test_columns_sum_to_one_so_that_the_sum_of_streams_is_a_plain_residual(given):
    y, post, res = mhc_pre(**given, sinkhorn_eps=0.0)
    torch.testing.assert_close(res.sum(-2), torch.ones_like(post))
    # Of twenty iterations the rows are not far from it.
    torch.testing.assert_close(res.sum(-1), torch.ones_like(post), rtol=0.0, atol=1e-2)
    out = mhc_post(given["x"], y, post, res)
    torch.testing.assert_close(out.sum(-2), given["x"].sum(-2) + post.sum(-1, keepdim=True) * y)


def test_saturated_coefficients_are_plain_residuals(given):
    """One stream goes in, the layer's output comes back to it alone, and no stream is mixed."""
    bias = torch.full((H + 2, H), -50.0, dtype=torch.float64)
    bias[:2, 0] = 50.0
    bias[2:].fill_diagonal_(50.0)
    weight, scale = torch.zeros_like(given["weight"]), torch.ones_like(given["scale"])
    x = given["x"]
    y, post, res = mhc_pre(
        x, weight, bias.flatten().to(x.device), scale, post_scale=1.0, sinkhorn_eps=0.0
    )
    torch.testing.assert_close(y, x[..., 0, :])
    out = mhc_post(x, y, post, res)
    torch.testing.assert_close(out[..., 0, :], 2 * x[..., 0, :])
    torch.testing.assert_close(out[..., 1:, :], x[..., 1:, :])


def test_a_token_does_not_depend_on_how_many_are_beside_it(given):
    x, parameters = given.pop("x").float(), {n: t.float() for n, t in given.items()}
    with using("kernels"):
        of_all, of_three = (mhc_pre(t, **parameters) for t in (x, x[:1, :3]))
    assert all(torch.equal(a[:1, :3], b) for a, b in zip(of_all, of_three, strict=True))


def test_autocast_does_not_reach_the_coefficients(given):
    given = {n: t.float() for n, t in given.items()}
    want = mhc_pre(**given)
    with torch.autocast(given["x"].device.type, torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(mhc_pre(**given), want, strict=True))
