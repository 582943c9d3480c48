"""Facts about softmax that can be checked by hand."""

import math

import pytest
import torch

from liger_fn import nn
from liger_fn.functional import softmax
from liger_fn.functional.activation import softmax as room

INF, NAN = math.inf, math.nan


@pytest.fixture
def configured(monkeypatch):
    """Let both passes launch by another configuration."""
    kept = room._softmax_fwd_with, room._softmax_bwd_with

    def configure(**config):
        for name in ("_softmax_fwd_config", "_softmax_bwd_config"):
            monkeypatch.setattr(room, name, lambda *_: config)
        for kernels in kept:
            kernels.cache_clear()

    yield configure
    for kernels in kept:
        kernels.cache_clear()


@pytest.fixture(params=["one tile", "along the row", "along the row, some of it held"])
def pass_over_the_row(request, configured):
    """Both kernels of a pass give what softmax says, whatever the width."""
    if request.param != "one tile":
        configured(BLOCK_D=2, HELD=1 if "held" in request.param else 0, num_warps=1)


def rows(device, *rows):
    return torch.tensor(rows, device=device, requires_grad=True)


def test_a_quarter_and_three(device):
    # exp(ln 3) = 3
    x = rows(device, [0.0, math.log(3)])
    y = softmax(x)
    (dx,) = torch.autograd.grad(y, x, torch.tensor([[0.0, 1.0]], device=device))
    torch.testing.assert_close(y, torch.tensor([[0.25, 0.75]], device=device))
    torch.testing.assert_close(dx, torch.tensor([[-0.1875, 0.1875]], device=device))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's, of ∞ − ∞
@pytest.mark.filterwarnings("ignore:divide by zero encountered")
@pytest.mark.usefixtures("pass_over_the_row")
def test_infinities_and_nan_are_torchs(device):
    x = rows(
        device,
        [1.0, -INF, 2.0, -INF, 3.0],
        [-INF, -INF, -INF, -INF, -INF],
        [-INF, -INF, -INF, -INF, 7.0],
        [0.0, INF, 1.0, 2.0, -INF],
        [0.0, 1.0, 2.0, NAN, 3.0],
        [3e38, -3e38, 3e38, 0.0, 3e38],
        [-3.4e38, -3.4e38, -INF, -3.4e38, -3.4e38],
    )
    dy = torch.randn_like(x)
    y, want = softmax(x), torch.softmax(x, -1)
    torch.testing.assert_close(y, want, equal_nan=True)
    assert y[[1, 3, 4]].isnan().all()
    grads = (torch.autograd.grad(t, x, dy)[0] for t in (y, want))
    torch.testing.assert_close(*grads, equal_nan=True)


@pytest.mark.usefixtures("pass_over_the_row")
def test_a_row_of_which_nothing_is_left_is_zero_as_in_attention(device):
    x = rows(device, [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [-INF, 2.0, 3.0])
    mask = torch.tensor([[False] * 3, [True, False, True], [True, False, False]], device=device)
    y = softmax(x, mask=mask, scale=0.5)
    assert y[0].tolist() == y[2].tolist() == [0.0, 0.0, 0.0]
    assert y[1, 1] == 0.0
    torch.testing.assert_close(y[1, [0, 2]], torch.softmax(x[1, [0, 2]] * 0.5, -1))
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y).cumsum(1))
    assert dx[[0, 2]].count_nonzero() == 0
    assert dx[1, 1] == 0.0

    # With unit vectors for queries and values, x itself are its scores, and it gives the softmax.
    attention = torch.nn.functional.scaled_dot_product_attention
    unit, finite = torch.eye(3, device=device), x.detach()[:2]
    got = attention(unit[:2, :2], finite.T, unit, mask[:2], scale=0.5)
    torch.testing.assert_close(y[:2].detach(), got)


@pytest.mark.usefixtures("pass_over_the_row")
@pytest.mark.parametrize(
    "shape",
    [(), (1,), (6,), (5, 1), (5, 6), (4, 5, 6), (3, 1, 1, 6), (2, 1, 4, 1, 6), (2, 3, 4, 5, 6)],
)
def test_a_mask_broadcasts(shape, device):
    x = torch.randn(2, 3, 4, 5, 6, device=device)
    mask = torch.rand(shape, device=device) < 0.7
    want = room.reference(x, mask=mask, scale=2.0)
    torch.testing.assert_close(softmax(x, mask=mask, scale=2.0), want)


def test_a_mask_that_heads_share_is_not_copied(device):
    mask = (torch.rand(2, 1, 5, 6, device=device) < 0.5).transpose(0, 2)
    seen, (H, T), strides = room._rows_of_mask(mask.expand(5, 4, 2, 6))
    assert seen.data_ptr() == mask.data_ptr()
    assert (H, T) == (4, 2)
    assert strides == (6, 0, 30, 1)


def test_no_digits_are_lost_far_from_zero(device):
    # top + log(total) would be rounded to 1e-4 here.
    x = torch.tensor([[1000.0, 1000.5]], device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(softmax(x)[0, 0], x)
    p = 1 / (1 + math.exp(0.5))
    assert dx[0, 0].item() == pytest.approx(p * (1 - p), rel=1e-6)


@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_the_module_is_torchs(dim, device):
    x = torch.randn(3, 4, 5, device=device)
    torch.testing.assert_close(nn.Softmax(dim)(x), torch.nn.Softmax(dim)(x))
    assert nn.Softmax(dim, scale=0.5).extra_repr() == f"dim={dim}, scale=0.5"
    assert not nn.Softmax(dim).state_dict()
    mask = torch.rand(4, 1, device=device) < 0.5
    want = room.reference(x.movedim(dim, -1), mask=mask.expand(3, 4, 5).movedim(dim, -1))
    torch.testing.assert_close(nn.Softmax(dim)(x, mask), want.movedim(-1, dim))


def test_no_more_blocks_are_held_than_a_row_has(device, configured):
    """As a sweep might have it."""
    configured(BLOCK_D=4, HELD=3, num_warps=1)
    x = rows(device, [1.0, 2.0, 3.0, 4.0, 5.0])
    y, want = softmax(x), torch.softmax(x, -1)
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(x)
    torch.testing.assert_close(*(torch.autograd.grad(t, x, dy)[0] for t in (y, want)))
