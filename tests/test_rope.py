"""Facts about rope that can be checked by hand."""

import pytest
import torch

from liger_fn.functional import rope
from liger_fn.functional.core.direct import Bound


def angles(T: int, R: int, device, start: int = 0):
    """cos and sin, once for each pair, of positions that follow each other."""
    position = torch.arange(start, start + T, device=device).double()
    angle = position[:, None] * 100.0 ** -torch.arange(0, 1, 2 / R, device=device).double()
    return angle.cos(), angle.sin()


@pytest.mark.parametrize(
    ("interleaved", "turned"),
    [(False, [-3.0, -4.0, 1.0, 2.0, 5.0]), (True, [-2.0, 1.0, -4.0, 3.0, 5.0])],
)
def test_quarter_turn(interleaved, turned, device):
    q = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], device=device).view(1, 1, 1, 5)
    cos, sin = torch.zeros(1, 2, device=device), torch.ones(1, 2, device=device)
    y = rope(q, None, cos, sin, rotary_dim=4, interleaved=interleaved)
    assert y.flatten().tolist() == turned


def test_scores_depend_on_the_distance_alone(device):
    q, k = (torch.randn(1, 1, 1, 8, device=device).double().expand(1, 1, 6, 8) for _ in range(2))
    q, k = rope(q, k, *angles(6, 8, device, start=17))
    scores = (q @ k.transpose(-1, -2))[0, 0]
    for distance in range(-5, 6):
        along = scores.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along))


def test_backward_turns_back(device):
    q = torch.randn(2, 3, 4, 8, device=device).double().requires_grad_()
    cos, sin = angles(4, 8, device)
    y = rope(q, None, cos, sin)
    torch.testing.assert_close(y.norm(dim=-1), q.norm(dim=-1))
    (back,) = torch.autograd.grad(y, q, y.detach())
    torch.testing.assert_close(back, q)


def test_angles_may_come_once_or_twice(device):
    q, k = torch.randn(2, 3, 4, 8, device=device), torch.randn(2, 1, 4, 8, device=device)
    cos, sin = (t.float() for t in angles(4, 8, device))
    for interleaved in (False, True):
        twice = [
            t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1) for t in (cos, sin)
        ]
        expected = rope(q, k, cos, sin, interleaved=interleaved)
        for tables in (twice, [t[None] for t in twice], [t.expand(2, 4, 8) for t in twice]):
            got = rope(q, k, *tables, interleaved=interleaved)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_heads_of_a_projection_are_not_copied(device, monkeypatch):
    passed = []
    monkeypatch.setattr(Bound, "__call__", lambda self, grid, *args: passed.extend(args[:2]))
    projection = torch.randn(2, 4, 3 + 2, 8, device=device)
    q, k = (t.transpose(1, 2) for t in projection.split((3, 2), 2))
    rope(q, k, *(t.float() for t in angles(4, 8, device)))
    assert [t.data_ptr() for t in passed] == [q.data_ptr(), k.data_ptr()]


@pytest.mark.parametrize("layout", ["bhtc", "bthc"])
def test_a_view_of_a_projection_gives_one_and_so_does_its_gradient(layout, device):
    cos, sin = angles(3, 8, device)
    heads = (torch.randn(2, 3, n, 8, dtype=torch.float64, device=device) for n in (4, 2))
    q, k = (t.transpose(1, 2) for t in heads) if layout == "bhtc" else heads
    leaves = [t.requires_grad_() for t in (q, k)]
    turned = rope(*leaves, cos, sin, layout=layout)
    grads = torch.autograd.grad(turned, leaves, [torch.ones_like(t) for t in turned])
    for x, y, dx in zip(leaves, turned, grads, strict=True):
        assert y.stride() == dx.stride() == x.stride()
    dense = rope(q.contiguous(), k, cos, sin, layout=layout)
    assert dense[0].is_contiguous()
    torch.testing.assert_close(dense, turned)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("times", [1, 2])
def test_learned_angles_get_their_gradient(interleaved, times, device):
    """However often the tables have each angle, and through the transforms."""
    q = torch.randn(2, 2, 3, 4, dtype=torch.float64, device=device)
    k = torch.randn(2, 1, 3, 4, dtype=torch.float64, device=device)
    angle = torch.randn(3, 2, dtype=torch.float64, device=device, requires_grad=True)

    def turned(angle):
        table = angle
        if times == 2:
            table = angle.repeat_interleave(2, -1) if interleaved else torch.cat([angle] * 2, -1)
        return rope(q, k, table.cos(), table.sin(), interleaved=interleaved)

    assert torch.autograd.gradcheck(turned, (angle,))
    assert torch.autograd.gradgradcheck(turned, (angle,))

    def loss(angle):
        return sum(t.square().sin().sum() for t in turned(angle))

    expected = torch.autograd.grad(loss(angle), angle)[0]
    torch.testing.assert_close(torch.func.grad(loss)(angle.detach()), expected)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(angle), angle)[0], expected)
