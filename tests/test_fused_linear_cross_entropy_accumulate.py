"""Facts of fused_linear_cross_entropy_accumulate."""

import pytest
import torch

from liger_fn.functional import (
    fused_linear_cross_entropy,
    fused_linear_cross_entropy_accumulate,
    using,
)

N, H, V = 12, 4, 40


@pytest.fixture(params=["kernels", "reference"])
def backend(request):
    with using(request.param):
        yield


def drawn(device, dtype=torch.float32):
    sums = torch.float64 if dtype is torch.float64 else torch.float32
    dweight = torch.randn(V, H, device=device, dtype=sums)
    weight, x = (torch.randn(n, H, device=device).to(dtype) for n in (V, N))
    y = torch.randint(V, (N,), device=device)
    y[::5] = -100
    return dweight, weight, x.requires_grad_(), y


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk_size": 5, "reduction": "sum"},
        {"num_items": 7, "softcap": 3.0, "label_smoothing": 0.1, "z_loss": 1e-2},
    ],
)
@pytest.mark.parametrize("donate", [False, True])
def test_loss_and_gradients_are_those_of_the_loss(backend, device, options, donate):
    dweight, weight, x, y = drawn(device, torch.float64)
    before = dweight.clone()
    loss, total = fused_linear_cross_entropy_accumulate(
        dweight, weight, x, y, donate=donate, **options
    )
    (dx,) = torch.autograd.grad(loss * 3.0, x)

    leaf = weight.clone().requires_grad_()
    expected = fused_linear_cross_entropy(leaf, x, y, **options)
    of_weight, of_x = torch.autograd.grad(expected, (leaf, x))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(total, before + of_weight)
    torch.testing.assert_close(dx, 3.0 * of_x)
    assert (total.data_ptr() == dweight.data_ptr()) == donate
    assert torch.equal(dweight, before) != donate
    assert not total.requires_grad


def test_micro_batches_add_up(backend, device):
    dweight, weight, x, y = drawn(device, torch.bfloat16)
    whole = fused_linear_cross_entropy_accumulate(dweight, weight, x, y)[1]
    total, items = dweight, (y != -100).sum()
    for rows in (slice(0, 5), slice(5, N)):
        total = fused_linear_cross_entropy_accumulate(
            total, weight, x[rows], y[rows], num_items=items, donate=rows.start > 0
        )[1]
    torch.testing.assert_close(total, whole, rtol=0.0, atol=1e-5)


def test_nothing_to_add(backend, device):
    dweight, weight, x, y = drawn(device)
    loss, total = fused_linear_cross_entropy_accumulate(dweight, weight, x[:0], y[:0])
    assert loss.item() == 0.0
    assert torch.equal(total, dweight)


def test_autocast(backend, device):
    dweight, weight, x, y = drawn(device)
    with torch.autocast(device.type, torch.bfloat16):
        loss, total = fused_linear_cross_entropy_accumulate(dweight, weight, x, y)
        expected = fused_linear_cross_entropy(weight.requires_grad_(), x, y)
    torch.testing.assert_close(loss, expected)
    gradient = torch.autograd.grad(expected, weight)[0]
    torch.testing.assert_close(total, dweight + gradient, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"dweight": torch.zeros(V, H).bfloat16()}, TypeError, "`dweight` must have the dtype"),
        ({"dweight": torch.zeros(H, V)}, ValueError, r"`dweight` must have shape \(40, 4\)"),
        ({"dweight": torch.zeros(V, H, device="meta")}, ValueError, "`dweight` must be on the dev"),
        ({"dweight": 3}, TypeError, "`dweight` must be a tensor; got int"),
        ({"reduction": "none"}, ValueError, "`reduction` must be one of 'mean', 'sum'"),
        ({"num_items": 0}, ValueError, "`num_items` must be positive; got 0"),
        ({"memory_budget": -1}, ValueError, "`memory_budget` must be a positive number"),
    ],
)
def test_errors(device, change, error, sentence):
    names = ("dweight", "weight", "x", "y")
    if isinstance(change.get("dweight"), torch.Tensor) and not change["dweight"].is_meta:
        change = {"dweight": change["dweight"].to(device)}
    arguments = dict(zip(names, drawn(device), strict=True)) | change
    with pytest.raises(error, match=f"fused_linear_cross_entropy_accumulate: {sentence}"):
        fused_linear_cross_entropy_accumulate(**arguments)


def test_float16_is_refused(device):
    dweight, weight, x, y = drawn(device)
    with pytest.raises(NotImplementedError, match="`x` must be bfloat16 or wider"):
        fused_linear_cross_entropy_accumulate(dweight, weight.half(), x.half(), y)


def test_transforms_are_refused(device):
    dweight, weight, x, y = drawn(device)

    def loss_of(x):
        return fused_linear_cross_entropy_accumulate(dweight, weight, x, y)[0]

    with pytest.raises(NotImplementedError, match="plain tensor in eager mode"):
        torch.func.grad(loss_of)(x)
