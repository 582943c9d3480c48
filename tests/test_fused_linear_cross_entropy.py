"""Facts of fused_linear_cross_entropy: its work, its memory, its chunks, its small numbers."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from liger_fn.functional import fused_linear_cross_entropy
from liger_fn.functional.core.launch import shared_memory
from liger_fn.functional.linear_loss import chunks, products
from liger_fn.functional.linear_loss import cross_entropy as room
from liger_fn.functional.linear_loss.chunks import Limits

N, H, V = 12, 4, 40
OPTIONS = (-100, 0.0, 0.0, None, 1.0)
# No bias and no weights, of classes or rows; the sums are held as it comes.
FIVE_AT_A_TIME = (None, None, None, 5, None, False)


@pytest.fixture
def factors(device):
    weight, x = torch.randn(V, H, device=device), torch.randn(N, H, device=device)
    return weight, x, torch.randint(V, (N,), device=device)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_every_chunk_size_gives_the_same(device, reduction):
    weight = torch.randn(V, H, dtype=torch.float64, device=device, requires_grad=True)
    x = torch.randn(N, H, dtype=torch.float64, device=device, requires_grad=True)
    y = torch.randint(V, (N,), device=device)

    def answers(chunk_size):
        loss = fused_linear_cross_entropy(weight, x, y, chunk_size, reduction=reduction)
        return loss, *torch.autograd.grad(loss.square().sum(), (weight, x))

    whole = answers(None)
    for chunk_size in (1, 5, N - 1, N, N + 1):
        torch.testing.assert_close(answers(chunk_size), whole, rtol=1e-12, atol=1e-12)


class Multiplications(TorchDispatchMode):
    """Counts those of matrix products. FlopCounterMode does not know products with an out_dtype."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = [t for t in args if isinstance(t, torch.Tensor)][-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("needs", "products"),
    [
        ((False, False, False), 1),
        ((True, False, False), 2),
        ((False, True, False), 2),
        ((True, True, False), 3),
    ],
)
def test_only_wanted_gradients_are_computed(factors, needs, products):
    with Multiplications() as work:
        room.fused_linear_cross_entropy_fwd(*factors, *FIVE_AT_A_TIME, *OPTIONS, *needs)
    assert work.count == products * N * H * V


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        # The interpreter copies what it launches on as bytes.
        self.numel = max([self.numel, *(t.numel() for t in tensors if t.is_floating_point())])
        return out


def test_no_tensor_is_larger_than_the_chunk_or_the_weight(factors):
    with LargestTensor() as largest:
        room.fused_linear_cross_entropy_fwd(*factors, *FIVE_AT_A_TIME, *OPTIONS, True, True, False)
    padded = -(-V // 16) * 16
    assert largest.numel == max(5 * padded, V * H) < N * V


def chosen(N, V, H, chunk_size=None, memory_budget=None):
    """The first chunk, the others, and whether they add up in float32."""
    weight = torch.empty(V, H, dtype=torch.bfloat16, device="meta")
    limits = Limits(chunk_size, memory_budget)
    wide = not limits.two_chunks(N, weight)
    plan = limits.plan(N, weight, weight.float() if wide else weight)
    assert sum(s.stop - s.start for s in plan.slices(N)) == N
    return plan.first, plan.rows, wide


@pytest.mark.parametrize(
    ("sizes", "chunks"),
    [
        ((4096, 128256, 4096), (4096, 4096, False)),  # all of it fits in 1.25 GiB
        ((8192, 128256, 4096), (3584, 4608, False)),
        ((8192, 32000, 4096), (8192, 8192, False)),
        ((8192, 262144, 2560), (3584, 4608, False)),  # 1.25 GiB more make it two chunks
        ((8192, 151936, 4096), (3584, 4608, False)),  # as little more as two chunks need
        ((16384, 128256, 4096), (7168, 9216, False)),
        ((16384, 128256, 2048), (7168, 9216, False)),
        ((65536, 128256, 4096), (4096, 5120, True)),  # too many for 16 bits
        ((9000, 2**31, 1), (1, 1, True)),
    ],
)
def test_default_chunks(sizes, chunks):
    assert chosen(*sizes) == chunks


def test_more_memory_is_for_a_sum_in_16_bits():
    weight = torch.empty(128256, 2048, dtype=torch.bfloat16, device="meta")
    rows = [Limits(None, None).plan(16384, weight, s).rows for s in (weight, weight.float(), None)]
    assert rows == [9216, 4096, 4096]


@pytest.mark.parametrize("needs_dweight", [False, True])
def test_chunks_are_planned_for_the_sum(factors, monkeypatch, needs_dweight):
    planned, plan = [], Limits.plan
    monkeypatch.setattr(Limits, "plan", lambda *a: planned.append(a[-1]) or plan(*a))
    needs = (needs_dweight, True, False)
    _, dweight, *_ = room.fused_linear_cross_entropy_fwd(
        *factors, *FIVE_AT_A_TIME, *OPTIONS, *needs
    )
    assert len(planned) == 1
    assert planned[0] is dweight


@pytest.mark.parametrize(
    ("options", "chunks"),
    [
        ((2048,), (2048, 2048, True)),
        ((3000,), (2192, 3000, True)),
        ((5000,), (3192, 5000, False)),
        ((None, 1 << 30), (4096, 4096, True)),  # halves err 1.22 times
        ((None, 1 << 31), (8192, 8192, False)),
        ((None, 1 << 20), (4, 4, True)),
    ],
)
def test_chosen_chunks(options, chunks):
    assert chosen(8192, 128256, 4096, *options) == chunks


@pytest.mark.parametrize("N", [1, 1000, 8192, 10000, 20000, 65536])
@pytest.mark.parametrize(
    ("V", "H"), [(128256, 4096), (151936, 1024), (262144, 2560), (32000, 4096)]
)
def test_default_memory_keeps_the_budget(N, V, H):
    _, rows, wide = chosen(N, V, H)
    assert rows * V * 2 <= (5 << 28) + (0 if wide else 4 * V * H)
    assert chosen(8192, 128256, 4096)[1] * 128256 * 2 < 1.3 * 2**30


def test_a_target_outside_the_vocabulary_gives_nan(factors):
    weight, x, y = factors
    y[3] = V
    losses = fused_linear_cross_entropy(weight, x, y, reduction="none")
    assert losses.isnan().nonzero().tolist() == [[3]]
    assert fused_linear_cross_entropy(weight, x, y).isnan()


def test_float16_keeps_small_probabilities(device):
    # Every class but the first has the probability e^-16, between the two smallest float16 numbers.
    x = torch.ones(2, 1, dtype=torch.float16, device=device)
    weight = torch.zeros(100, 1, dtype=torch.float16, device=device)
    weight[0] = 16.0
    weight.requires_grad_()
    y = torch.zeros(2, dtype=torch.int64, device=device)
    # As a gradient scaler would.
    scale = 2.0**16
    (fused_linear_cross_entropy(weight, x, y, reduction="sum") * scale).backward()

    exact = 2 * scale * torch.softmax(weight.detach().double()[:, 0], 0)
    # The neighbours of 256 · e^-16 in float16 are 0.2 % away.
    torch.testing.assert_close(weight.grad[1:, 0].double(), exact[1:], rtol=2e-3, atol=0.0)


def backward(loss, *inputs, **options):
    return torch.autograd.grad(loss, inputs, **options)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_kept_graph_gives_the_same_again(device, factors, reduction):
    weight, x, y = (t.requires_grad_() if t.is_floating_point() else t for t in factors)
    loss = fused_linear_cross_entropy(weight, x, y, reduction=reduction)
    loss = (loss * torch.arange(1.0, loss.numel() + 1, device=device).view(loss.shape)).sum() * 3.0
    first = backward(loss, weight, x, retain_graph=True)
    copies = [g.clone() for g in first]
    for again in (backward(loss, weight, x, retain_graph=True), backward(loss, weight, x)):
        assert all(torch.equal(a, b) for a, b in zip(again, copies, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))


def places(tensors):
    return {t.data_ptr() for t in tensors if t is not None}


def test_a_mean_gives_away_the_gradients_it_has(factors):
    weight, x, y = (t.requires_grad_() if t.is_floating_point() else t for t in factors)
    loss = fused_linear_cross_entropy(weight, x, y)
    held = places(loss.grad_fn.saved_tensors)
    assert places(backward(loss, weight, x)) <= held

    loss = fused_linear_cross_entropy(weight, x, y)
    held = places(loss.grad_fn.saved_tensors)
    assert held.isdisjoint(places(backward(loss, weight, x, retain_graph=True)))


def test_what_hooks_saw_is_not_given_away(factors):
    weight, x, y = (t.requires_grad_() if t.is_floating_point() else t for t in factors)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        loss = fused_linear_cross_entropy(weight, x, y)
    before = [t.clone() for t in seen]
    backward(loss * 3.0, weight, x)
    assert all(torch.equal(a, b) for a, b in zip(seen, before, strict=True))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_rows_that_do_not_count_can_be_left_out(device, factors, reduction):
    weight, x, y = (t.requires_grad_() if t.is_floating_point() else t for t in factors)
    y[::3] = -100
    y[1] = -100
    upstream = torch.arange(1.0, N + 1, device=device) if reduction == "none" else 2.0

    def answers(**options):
        loss = fused_linear_cross_entropy(weight, x, y, reduction=reduction, **options)
        return loss, *backward((loss * upstream).sum(), weight, x)

    for most in (7, 9, 100):
        torch.testing.assert_close(answers(max_valid=most), answers())
    for t in answers(max_valid=6):
        assert t.isnan().any()


def test_rows_that_are_left_out_are_not_multiplied(factors, monkeypatch):
    weight, x, y = factors
    y[4:] = -100
    rows, of_sum = [], room._of_sum
    monkeypatch.setattr(
        room, "_of_sum", lambda weight, x, *rest: rows.append(len(x)) or of_sum(weight, x, *rest)
    )
    fused_linear_cross_entropy(weight, x, y, max_valid=4)
    assert rows == [4]


def test_num_items_divides_a_mean(device, factors):
    weight, x, y = factors
    total = fused_linear_cross_entropy(weight, x, y, reduction="sum")
    for items in (7, 7.0, torch.tensor(7), torch.tensor(7.0, device=device)):
        mean = fused_linear_cross_entropy(weight, x, y, num_items=items)
        torch.testing.assert_close(mean, total / 7)


def add_by_tiles(g, x, total):
    products._product_of_tiles(g, x, None, 0, total, add=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("K", "V", "H", "add"),
    [
        (96, 200, 72, add_by_tiles),
        (70, 300, 264, add_by_tiles),
        (1, 16, 8, add_by_tiles),
        (70, 130, 30, products._add_by_parts),
    ],
)
def test_a_product_is_added_and_rounded_once(device, dtype, K, V, H, add, monkeypatch):
    if add is add_by_tiles and shared_memory(device) < 220_000:
        pytest.skip("before Hopper no chip copies tiles")
    monkeypatch.setattr(products, "_PART_BYTES", 4 * H * 50)
    buffer = torch.full((K, chunks.width_of(V)), torch.nan, dtype=dtype, device=device)
    g, x, total = buffer[:, :V], *(torch.randn(n, H).to(device, dtype) for n in (K, V))
    g.copy_(torch.randn(K, V))
    exact = total.double() + g.double().t() @ x.double()
    add(g, x, total)
    # Triton's interpreter does not round to the nearest.
    one_rounding = torch.finfo(dtype).eps / (1 if device.type == "cpu" else 2)
    torch.testing.assert_close(total.double(), exact, rtol=1.01 * one_rounding, atol=1e-5)


def test_tiles_are_copied_of_rows_that_begin_on_16_bytes_and_lie_apart(device):
    x = torch.zeros(4, 64, dtype=torch.bfloat16, device=device)
    assert products.copies_tiles(x, x[:, 8:40])
    for other in (x[:, 4:36], torch.zeros_like(x[:, :36]), x[:1].expand(2, 64)[1:], x.t()):
        assert not products.copies_tiles(x, other)


def test_sums_of_chunks_err_as_little_as_stated(device):
    torch.manual_seed(0)
    # PyTorch lets cuBLAS share out the sum over rows of a small product, and add in 16 bits.
    V, H, N = (32000, 1024, 1024) if device.type == "cuda" else (256, 64, 1024)
    # Of logits of size 1/2: what the rounding of greater ones costs would outweigh the sums.
    weight, x = torch.randn(V, H) / (2 * H**0.5), torch.randn(N, H)
    weight, x = (t.to(device, torch.bfloat16).requires_grad_() for t in (weight, x))
    # A row of dW that many targets share is a sum of which each chunk adds a part.
    y = torch.randint(16, (N,), device=device)

    def error(chunk_size, wide=False):
        # As the forward pass holds it: Triton's interpreter does not round to the nearest.
        unit = torch.full((N,), 1.0 / N, device=device)
        chunks = (None, None, unit, chunk_size, None, wide)
        held = room.fused_linear_cross_entropy_fwd(
            weight.detach(), x.detach(), y, *chunks, *OPTIONS, True, False, False
        )[1]
        return (held.to(torch.bfloat16).double() - exact).norm()

    double = weight.double().detach().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x.double() @ double.t(), y)
    exact = backward(loss, double)[0]
    whole = error(N)
    assert error(N * 9 // 16) < 1.2 * whole
    assert error(64, wide=True) < 1.05 * whole
    assert error(64) > 1.5 * whole
