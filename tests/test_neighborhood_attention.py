"""Facts of neighborhood_attention that a reader can check by hand."""

import pytest
import torch
from test_fused_linear_cross_entropy import LargestTensor

import liger_fn.nn as lnn
from liger_fn.functional import neighborhood_attention, using
from liger_fn.functional.attention import neighborhood_attention as room
from liger_fn.functional.core.launch import tl


def who_sees_whom(device, *lengths, C=16, **options):
    """Of queries 0 all weights are equal; of values that are unit vectors they come out."""
    T = torch.Size(lengths).numel()
    v = torch.eye(T, dtype=torch.float64, device=device).view(*lengths, T)
    y = neighborhood_attention(torch.zeros_like(v), torch.zeros_like(v), v, **options)
    return y.view(T, T)


def test_a_window_at_the_edge_moves_inwards(device):
    weights = who_sees_whom(device, 5, kernel_size=3)
    seen = [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]
    assert [w.nonzero().flatten().tolist() for w in weights] == seen
    torch.testing.assert_close(weights[weights > 0], torch.full_like(weights[weights > 0], 1 / 3))


def test_or_is_cut_there(device):
    weights = who_sees_whom(device, 5, kernel_size=3, window="cut")
    seen = [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4]]
    assert [w.nonzero().flatten().tolist() for w in weights] == seen
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[0]))


def test_a_causal_window_ends_with_the_query(device):
    weights = who_sees_whom(device, 5, kernel_size=3, window="causal")
    seen = [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert [w.nonzero().flatten().tolist() for w in weights] == seen


def test_an_even_window_has_its_query_after_the_middle(device):
    weights = who_sees_whom(device, 6, kernel_size=4, window="cut")
    assert weights[3].nonzero().flatten().tolist() == [1, 2, 3, 4]


def test_with_a_dilation_residues_do_not_meet(device):
    weights = who_sees_whom(device, 7, kernel_size=3, dilation=2)
    assert weights[0].nonzero().flatten().tolist() == [0, 2, 4]
    assert weights[6].nonzero().flatten().tolist() == [2, 4, 6]
    assert weights[5].nonzero().flatten().tolist() == [1, 3, 5]


def test_in_a_plane_windows_are_rectangles(device):
    weights = who_sees_whom(device, 4, 5, kernel_size=(2, 3))
    # Row 0, column 4 of four rows of five.
    assert weights[4].nonzero().flatten().tolist() == [2, 3, 4, 7, 8, 9]


@pytest.mark.parametrize("window", room.WINDOWS)
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 6])
def test_who_sees_is_the_inverse_of_whom_is_seen(window, kernel_size, device):
    """The gradient of v is the transpose of the weights."""
    v = torch.eye(13, dtype=torch.float64, device=device).requires_grad_()
    zeros = torch.zeros_like(v)
    for dilation in (1, 2):
        options = {"dilation": dilation, "window": window}
        y = neighborhood_attention(zeros, zeros, v, kernel_size, **options)
        (dv,) = torch.autograd.grad(y, v, torch.eye(13, dtype=torch.float64, device=device))
        torch.testing.assert_close(dv, y.detach().T)


def test_a_window_as_wide_as_the_sequence_is_full_attention(device):
    q, k, v = torch.randn(3, 2, 3, 9, 16, device=device).unbind()
    y = neighborhood_attention(q, k, v, 9)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(y, expected)


def far(T: int, stride: int):
    q = torch.empty(1, 1, T, 16, device="meta")
    windows = room._Windows((1, 3), (1, 1), "cut", 0.25, (1, T))
    return windows.constants(q, [0, 0, stride])["OFFSET"]


def test_tokens_are_counted_in_64_bits_where_an_image_may_have_so_many_elements():
    assert far(4096, 1024) == far(1 << 20, 2047) == tl.int32
    assert far(1 << 20, 2048) == far(4096, 1 << 19) == tl.int64


@pytest.mark.parametrize("window", room.WINDOWS)
@pytest.mark.parametrize("kernel_size", [1, 2, 5, 6])
def test_a_tile_that_a_launch_calls_near_has_all_that_it_sees_and_all_that_see_it(
    kernel_size, window
):
    """By hand, at every length: the launch knows only the longest."""
    config = {"TILE_1": 1, "TILE_2": 16}
    for T in range(kernel_size, 60):
        steps = room._near_steps((1, T), (1, kernel_size), window, config)
        at, inside = room._neighbours(T, kernel_size, 1, window, torch.device("cpu"))
        pairs = [(i, int(j)) for i in range(T) for j in at[i][inside[i]]]
        for first in range(0, T, steps[1]):
            mine = range(first, first + steps[1])
            keys = [j for i, j in pairs if i in mine]
            queries = [i for i, j in pairs if j in mine]
            assert max(keys) - min(keys) < 16
            assert max(queries) - min(queries) < 16


def test_a_plane_of_one_row_is_a_line(device):
    q, k, v = torch.randn(3, 2, 3, 9, 16, device=device).unbind()
    plane = neighborhood_attention(*(t.unsqueeze(2) for t in (q, k, v)), (1, 5), dilation=(1, 1))
    torch.testing.assert_close(plane.squeeze(2), neighborhood_attention(q, k, v, 5))


def test_the_memory_order_of_projections_is_kept(device):
    """So that neither y nor the gradients are copied on their way into the next product."""
    q, k, v = (torch.randn(2, 9, 3, 16, device=device).transpose(1, 2) for _ in range(3))
    for t in (q, k, v):
        t.requires_grad_()
    y = neighborhood_attention(q, k, v, 3)
    gradients = torch.autograd.grad(y.sum(), (q, k, v))
    for t in (y, *gradients):
        assert t.transpose(1, 2).is_contiguous()


def test_no_scores_are_in_memory(device):
    q, k, v = torch.randn(3, 2, 40, 4, device=device).unsqueeze(-3).unbind()
    sizes = (1, 33, 1, 1, "shifted", 0.5)
    with LargestTensor() as largest:
        y, top, total = room.neighborhood_attention_fwd(q, k, v, *sizes)
        room.neighborhood_attention_bwd(q, k, v, y, top, total, y, *sizes, True, True, True)
    assert largest.numel == q.numel()


@pytest.mark.parametrize(("kernel_size", "lengths"), [(3, (7,)), ((3, 3), (4, 5))])
def test_the_module_projects_attends_and_projects(kernel_size, lengths, device):
    module = lnn.NeighborhoodAttention(24, 3, kernel_size, window="cut", device=device)
    x = torch.randn(2, *lengths, 24, device=device)
    q, k, v = (
        p(x).unflatten(-1, (3, 8)).movedim(-2, 1)
        for p in (module.q_proj, module.k_proj, module.v_proj)
    )
    y = neighborhood_attention(q, k, v, kernel_size, window="cut")
    torch.testing.assert_close(module(x), module.out_proj(y.movedim(1, -2).flatten(-2)))
    for few_or_many in (x[0], x[None]):
        found = module(few_or_many).reshape(-1, *x.shape[1:])
        torch.testing.assert_close(found, module(x)[: len(found)])


def test_heads_share_the_width_of_the_module():
    with pytest.raises(ValueError, match="NeighborhoodAttention: `num_heads` must divide 24"):
        lnn.NeighborhoodAttention(24, 5, 3)


@pytest.mark.usefixtures("interpreter_loops")
def test_interpreted_products_of_bfloat16_are_right(device):
    """The interpreter holds bfloat16 as integers, which are not to be multiplied."""
    q, k, v = torch.randn(3, 5, 16, device=device).bfloat16().unbind()
    with using("interpret"):
        y = neighborhood_attention(q, k, v, 3)
    expected = room.reference(q, k, v, 3)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=1e-2)
