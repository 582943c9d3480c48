"""Facts about embedding that can be checked by hand or against PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from liger_fn.functional import embedding, using


@pytest.fixture(params=["kernels", "reference"], autouse=True)
def backend(request):
    with using(request.param):
        yield


def test_by_hand(device):
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], device=device, requires_grad=True)
    y = embedding(torch.tensor([2, 0, 2], device=device), weight)
    assert y.tolist() == [[5.0, 6.0], [1.0, 2.0], [5.0, 6.0]]
    dy = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]], device=device)
    (dweight,) = torch.autograd.grad(y, weight, dy)
    assert dweight.tolist() == [[2.0, 20.0], [0.0, 0.0], [5.0, 50.0]]


@pytest.mark.parametrize("padding_idx", [None, 3, -1])
def test_is_torchs(padding_idx, device):
    input = torch.randint(5, (4, 9), device=device)
    weight = torch.randn(5, 7, dtype=torch.float64, device=device, requires_grad=True)
    ours = embedding(input, weight, padding_idx=padding_idx)
    theirs = F.embedding(input, weight, padding_idx)
    assert torch.equal(ours, theirs)
    dy = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, weight, dy), torch.autograd.grad(theirs, weight, dy)
    )


def test_a_frequent_row_is_summed_in_float32(device):
    """1 + 1 + … in bfloat16 stops at 256."""
    weight = torch.zeros(2, 3, dtype=torch.bfloat16, device=device, requires_grad=True)
    y = embedding(torch.ones(1000, dtype=torch.int64, device=device), weight)
    (dweight,) = torch.autograd.grad(y.sum(), weight)
    assert dweight.tolist() == [[0.0] * 3, [1000.0] * 3]


@pytest.mark.parametrize("unknown", [4, -1, 2**40])
def test_a_number_outside_the_table_gives_nan_and_no_gradient(unknown, device):
    weight = torch.randn(4, 3, device=device, requires_grad=True)
    y = embedding(torch.tensor([1, unknown, 2], device=device), weight)
    assert y.isnan().all(-1).tolist() == [False, True, False]
    assert y.isnan().any(-1).tolist() == [False, True, False]
    (dweight,) = torch.autograd.grad(y.sum(), weight)
    assert dweight.tolist() == [[0.0] * 3, [1.0] * 3, [1.0] * 3, [0.0] * 3]


@pytest.mark.parametrize("size", [1, 64, 129, 400])
def test_segments_of_every_length_at_every_place(size, device):
    """Chunks of 64 positions: a number may begin, end or go on at their bounds, or fill some."""
    for before in (0, 63, 64):
        input = torch.cat([torch.zeros(before), torch.ones(size), torch.full((5,), 2.0)]).long()
        input = input[torch.randperm(len(input))].to(device)
        weight = torch.zeros(4, 3, dtype=torch.float64, device=device, requires_grad=True)
        dy = torch.randn(len(input), 3, dtype=torch.float64, device=device)
        (dweight,) = torch.autograd.grad(embedding(input, weight), weight, dy)
        expected = torch.stack([dy[input == v].sum(0) for v in range(4)])
        torch.testing.assert_close(dweight, expected)
