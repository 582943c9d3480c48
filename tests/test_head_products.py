"""Facts of the products of a head that skip what does not count, and of what needs no logits."""

import math

import pytest
import torch

import liger_fn.functional as LF
from liger_fn.functional.linear_loss import products
from liger_fn.functional.linear_loss import statistics as module
from liger_fn.functional.linear_loss.chunks import Limits
from liger_fn.functional.linear_loss.cross_entropy import sum_over_chunks
from liger_fn.functional.linear_loss.products import AllRows, Counted
from liger_fn.functional.linear_loss.statistics import statistics
from liger_fn.functional.loss import logprobs


@pytest.fixture
def head(device):
    """Rows, weight and targets, of which a share is ignored; NaN where a row does not count."""
    weight = torch.zeros(8, 8, dtype=torch.float16, device=device)
    if not products.suits(weight, weight):
        pytest.skip("these products are Hopper's; elsewhere PyTorch's are taken")

    def make(N, H, V, ignored=0.5, dtype=torch.float16):
        weight, x = torch.randn(V, H) / H**0.5, torch.randn(N, H)
        y = torch.randint(V, (N,))
        y[torch.rand(N) < ignored] = -100
        x[y == -100] = math.nan
        return (t.to(device, dtype) if t.is_floating_point() else t.to(device)
                for t in (weight, x, y))  # fmt: skip

    return make


def whole_and_counted(x, y):
    x = x.masked_fill((y == -100)[:, None], 0.0)
    return AllRows(x.double(), y), Counted(x, y, -100)


@pytest.mark.parametrize("y_dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("N", [1, 127, 5000])
def test_rows_that_count_come_first_in_their_order(head, N, y_dtype):
    _, x, y = head(N, 24, 50)
    ignored = -100
    if y_dtype is torch.uint8:
        ignored, y = 200, y.masked_fill(y == -100, 200)
    counted = Counted(x[:, :16], y.to(y_dtype), ignored)
    live, dead = ((y != ignored).nonzero()[:, 0], (y == ignored).nonzero()[:, 0])
    assert counted.count.item() == len(live)
    assert torch.equal(counted.places, torch.cat([live, dead]))
    assert torch.equal(counted.x[: len(live)], x[live, :16])
    # What a tile may read behind them.
    assert not counted.x[len(live) : len(live) + 128].any()
    numbers = torch.arange(N, device=x.device)
    (back,) = counted.new_numbers(numbers)
    counted.put_back([counted.in_order(numbers)], [back])
    assert torch.equal(back, numbers)


@pytest.mark.parametrize(
    ("N", "H", "V", "ignored"),
    [(300, 72, 520, 0.5), (130, 264, 264, 0.0), (260, 520, 136, 1.0), (140, 64, 1000, 0.3)],
)
@pytest.mark.parametrize("held", [torch.float16, torch.float32])
def test_products_of_rows_that_count(head, N, H, V, ignored, held):
    weight, x, y = head(N, H, V, ignored)
    whole, counted = whole_and_counted(x, y)
    bias = torch.randn(V, device=x.device, dtype=x.dtype)
    dx, dweight = x.new_empty(N, H, dtype=held), weight.new_empty(V, H, dtype=held)
    exact_dx, exact = torch.empty_like(whole.x), weight.new_empty(V, H, dtype=torch.float64)
    # No multiple of a tile's rows, and one that may hold no row that counts.
    for rows in (slice(0, N // 3), slice(N // 3, N)):
        logits = x.new_empty(rows.stop - rows.start, -(-V // 16) * 16)[:, :V]
        counted.logits(weight, bias, rows, logits)
        live = (counted.y[rows] != -100)[:, None]
        want = counted.x[rows].double() @ weight.double().t() + bias.double()
        torch.testing.assert_close(
            logits.double().where(live, 0.0), want.where(live, 0.0), rtol=2e-3, atol=2e-3
        )
        logits.copy_(torch.randn(logits.shape).to(logits).where(live, 0.0))
        exact_dx[counted.places[rows]] = logits.double() @ weight.double()
        share = logits.double().t() @ counted.x[rows].double().where(live, 0.0)
        counted.dweight(logits, rows, dweight, add=rows.start > 0)
        counted.dx(logits, weight, rows, dx)
        exact = share if rows.start == 0 else exact + share
    # The sum in 16 bits is rounded twice, at the size of its parts.
    tolerance = {"rtol": 2e-3, "atol": 2e-2} if held is x.dtype else {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(dx.double(), exact_dx, **tolerance)
    torch.testing.assert_close(dweight.double(), exact, **tolerance)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": 0.7}])
def test_statistics_without_logits(head, options):
    N, H, V = 200, 64, 600
    weight, x, y = head(N, H, V, 0.3)
    bias = torch.randn(V, device=x.device, dtype=x.dtype)
    # Forbidden classes, a whole tile of them; and a target that is none.
    bias[:300] = bias[500] = -math.inf if not options else bias[500]
    y = torch.where((y >= 0) & (y < 300), y + 300, y)
    y[y == 500] = 501
    place = (y != -100).nonzero()[0]
    y[place] = V
    counted = Counted(x, y, -100)
    scale, cap = options.get("logit_scale", 1.0), options.get("softcap")
    rows = logprobs.new_rows(x, y.shape, with_entropy=True, with_top1=True)
    statistics(weight, bias, counted, cap, scale, rows)
    z = x.new_zeros(N, V)
    counted.logits(weight, bias, slice(0, N), z)
    z = z.double().where((counted.y != -100)[:, None], 0.0)
    z = torch.empty_like(z).index_copy(0, counted.places, z)
    want = logprobs.reference_rows(z, y, cap, scale, -100, True, True)
    assert rows[0][place].isnan().all()
    for got, exact in zip(rows, want, strict=False):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(rows[4] + rows[5], rows[1])


@pytest.mark.parametrize("y_dtype", [torch.int64, torch.uint8])
def test_statistics_write_within_their_rows(head, monkeypatch, y_dtype):
    """The last tile has rows past the last, and 255 stands for −1 where a number has no sign."""
    N, V = 100, 300
    weight, x, y = head(N, 64, V, 0.0)
    launched, last = module.by_triton, []

    def with_more_memory(kernel, grid, *args, **options):
        at = kernel.arg_names.index("z_t_ptr")
        last.append(torch.full((2 * N,), 123.0, device=x.device))
        launched(kernel, grid, *args[:at], last[0], *args[at + 1 :], **options)

    monkeypatch.setattr(module, "by_triton", with_more_memory)
    rows = logprobs.new_rows(x, y.shape, with_entropy=False, with_top1=False)
    module.statistics(weight, None, Counted(x, (y % 250).to(y_dtype), -100), None, 1.0, rows)
    assert (last[0][:N] != 123.0).all()
    assert (last[0][N:] == 123.0).all()


def test_logits_as_low_as_they_go(head):
    """All alike, and below what times log₂ e is a number."""
    weight, x, y = head(20, 64, 100, 0.0)
    bias = torch.full((100,), -6e4, dtype=x.dtype, device=x.device)
    with torch.no_grad():
        got = LF.fused_linear_logprobs(weight, x, y, bias=bias, logit_scale=5e33, entropy=True)
    # The scale makes of what the products differ by more than any difference that leaves a sum.
    assert got.logp.le(0.0).all()
    assert got.entropy.isfinite().all()


def test_a_square_that_nobody_wants_is_not_taken(head):
    """That of an lse of 1e25 is infinite, and 0 times that is no number."""
    weight, x, y = head(20, 64, 100, 0.0)
    with torch.no_grad():
        loss = LF.fused_linear_cross_entropy(weight, x, y, reduction="none", logit_scale=1e25)
    assert loss.isfinite().all()


def test_gradients_change_no_result(head):
    """What a policy was, found without gradients, divides what it is."""
    weight, x, y = head(150, 64, 700, 0.2)
    options = {"entropy": True, "lse": True, "top1": True, "memory_budget": 1 << 16}
    with torch.no_grad():
        before = LF.fused_linear_logprobs(8.0 * weight, x, y, **options)
        loss = LF.fused_linear_cross_entropy(8.0 * weight, x, y)
    weight = (8.0 * weight).requires_grad_()
    after = LF.fused_linear_logprobs(weight, x, y, **options)
    assert torch.equal(before.top1, after.top1)
    for name in ("logp", "lse", "entropy"):
        same = {"rtol": 2e-6, "atol": 2e-6}
        torch.testing.assert_close(getattr(before, name), getattr(after, name), **same)
    torch.testing.assert_close(loss, LF.fused_linear_cross_entropy(weight, x, y), rtol=2e-6, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_touch_nothing(head, reduction):
    """Their inputs are NaN, as those of padding may be."""
    weight, x, y = head(300, 64, 500)
    options = {"reduction": reduction, "memory_budget": 1 << 16, "z_loss": 1e-3}

    def answers(x, weight, y):
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = LF.fused_linear_cross_entropy(weight, x, y, **options)
        return loss.detach(), *torch.autograd.grad(loss.sum(), (x, weight))

    loss, dx, dweight = answers(x, weight, y)
    live = y != -100
    of_live = answers(x[live], weight, y[live])
    assert not dx[~live].any()
    torch.testing.assert_close(dx[live], of_live[1], rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(dweight, of_live[2], rtol=2e-3, atol=1e-4)
    with torch.no_grad():
        alone = LF.fused_linear_cross_entropy(weight, x, y, **options)
    if reduction == "none":
        assert not loss[~live].any()
        assert not alone[~live].any()
        loss, alone = loss[live], alone[live]
    torch.testing.assert_close(loss, of_live[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone, of_live[0], rtol=1e-4, atol=1e-5)


def test_a_gradient_is_added_to_memory_that_begins_anywhere(head, device):
    """As one of a buffer of all gradients may."""
    weight, x, y = head(140, 64, 300)
    start = torch.randn(300 * 64 + 1, device=device)
    plain, shifted = start[1:].clone().view(300, 64), start.clone()[1:].view(300, 64)
    assert products.suits(weight, x, plain)
    assert not products.suits(weight, x, shifted)
    x = x.nan_to_num()
    for total in (plain, shifted):
        limits, options = Limits(None, None), (-100, 0.0, 0.0, None, 1.0)
        sum_over_chunks(weight, x, y, None, None, None, limits, options, total, None, None, True)
    # Of 256 times the gradient of float16, for which logits may be rounded the other way.
    torch.testing.assert_close(shifted, plain, rtol=1e-3, atol=0.05)


def test_chips_of_amd_are_no_hoppers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not products._is_hopper(torch.device("cuda"))


@pytest.mark.parametrize("backward", [False, True])
def test_ignored_rows_cost_nothing(head, device, backward):
    if device.type != "cuda":
        pytest.skip("a matter of a GPU's time")
    weight, x, y = head(8192, 2048, 128256, 0.0, torch.bfloat16)
    few = torch.where(torch.rand(y.shape, device=y.device) < 0.9, -100, y)

    def seconds(y):
        times = []
        for _ in range(7):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            loss = LF.fused_linear_cross_entropy(weight, x, y)
            if backward:
                torch.autograd.grad(loss, (weight, x))
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return min(times)

    weight, x = weight.requires_grad_(backward), x.requires_grad_(backward)
    assert seconds(few) < 0.3 * seconds(y)
