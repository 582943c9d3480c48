"""Facts of fused_linear_logprobs: its chunks, its work, its memory, and TRL's answers."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from liger_fn.functional import fused_linear_cross_entropy, fused_linear_logprobs
from liger_fn.functional.linear_loss import chunks
from liger_fn.functional.linear_loss import logprobs as room
from liger_fn.functional.linear_loss.chunks import logits_to_keep

N, H, V = 12, 4, 40
# Chunks of five rows, in a memory that is not bounded otherwise, summed in the dtype of x.
CHUNKS = (None, 5, None, False)
OPTIONS = (None, 1.0, -100, True, True)


@pytest.fixture
def factors(device):
    weight, x = torch.randn(V, H, device=device), torch.randn(N, H, device=device)
    return weight, x, torch.randint(V, (N,), device=device)


@pytest.fixture
def leaves(factors):
    weight, x, y = factors
    return weight.double().requires_grad_(), x.double().requires_grad_(), y


def test_every_chunk_size_gives_the_same(leaves):
    weight, x, y = leaves

    def answers(chunk_size):
        rows = fused_linear_logprobs(weight, x, y, chunk_size, lse=True, entropy=True)
        loss = (rows.logp.square() + rows.lse.sin() + rows.entropy.exp()).sum()
        return rows.logp, *torch.autograd.grad(loss, (weight, x))

    whole = answers(None)
    for chunk_size in (1, 5, N - 1, N, N + 1):
        torch.testing.assert_close(answers(chunk_size), whole, rtol=1e-12, atol=1e-12)


def test_is_the_loss_of_fused_linear_cross_entropy(leaves):
    weight, x, y = leaves
    loss = fused_linear_cross_entropy(weight, x, y, softcap=2.0, logit_scale=0.5)
    logp = fused_linear_logprobs(weight, x, y, softcap=2.0, logit_scale=0.5)
    torch.testing.assert_close(-logp.mean(), loss)
    torch.testing.assert_close(
        torch.autograd.grad(-logp.mean(), (weight, x)), torch.autograd.grad(loss, (weight, x))
    )


def test_is_what_trl_computes(leaves):
    trl = pytest.importorskip("trl.kernels", reason="the peer is not installed")
    weight, x, y = leaves
    options = {"temperature": 0.7, "logit_scale": 0.5}
    ours = fused_linear_logprobs(
        weight, x, y, softcap=2.0, lse=True, entropy=True, top1=True, **options
    )
    half = fused_linear_logprobs(
        weight, x, y, softcap=2.0, lse=True, temperature=0.35, logit_scale=0.5
    )
    logp, entropy, log_sum_sq, _, is_top1 = trl.ChunkedLogProbFunction.apply(
        x, weight, None, y, 0.7, 5, 2.0, 0.5, ("entropy", "log_sum_sq_probs", "is_top1")
    )
    # Theirs are sums of 40 terms of size 1 in float32, whatever the dtype.
    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(ours.logp, logp, **close)
    torch.testing.assert_close(ours.entropy, entropy, **close)
    torch.testing.assert_close(half.lse - 2 * ours.lse, log_sum_sq, **close)
    assert torch.equal(ours.top1 == y, is_top1.bool())


class Multiplications(TorchDispatchMode):
    """Counts those of matrix products. FlopCounterMode does not know products with an out_dtype."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = [t for t in args if isinstance(t, torch.Tensor)][-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def there_and_back(factors, keep, needs):
    """The work of each pass of rows that each have an upstream gradient."""
    with Multiplications() as forward:
        rows = room.fused_linear_logprobs_fwd(*factors, *CHUNKS, keep, *OPTIONS, *needs)
    _, _, entropy, _, *residuals = rows
    cotangents = (entropy, None, entropy, None)
    with Multiplications() as backward:
        room.fused_linear_logprobs_bwd(
            *factors, None, 5, entropy, *residuals, *cotangents, None, False, keep, *OPTIONS,
            *needs, donated=False,
        )  # fmt: skip
    return forward.count / (N * H * V), backward.count / (N * H * V)


@pytest.mark.parametrize(
    ("needs", "products"),
    [
        ((False, True, False), 2),
        ((True, False, False), 2),
        ((True, True, True), 3),
    ],
)
def test_only_wanted_gradients_are_computed(factors, needs, products):
    assert there_and_back(factors, False, needs) == (1, products)
    assert there_and_back(factors, True, needs) == (1, products - 1)


def test_logits_that_fit_are_kept_and_others_are_not(leaves):
    weight, x, y = leaves
    kept = {}
    for rows in (N - 1, N):
        logp = fused_linear_logprobs(weight, x, y, memory_budget=rows * 48 * x.itemsize)
        saved = [t.numel() for t in logp.grad_fn.saved_tensors if t is not None]
        kept[rows] = N * 48 in saved
    assert kept == {N - 1: False, N: True}


def test_no_logits_are_kept_where_nobody_differentiates(factors):
    rows = room.fused_linear_logprobs_fwd(*factors, *CHUNKS, True, *OPTIONS, False, False, False)
    assert rows[-1].numel() == 0


def test_ignored_rows_are_left_out_where_their_number_is_known(leaves, monkeypatch):
    weight, x, y = leaves
    y[::3] = -100
    valid = int((y != -100).sum())

    def answers(**options):
        rows = fused_linear_logprobs(
            weight, x, y, lse=True, entropy=True, top1=True, **options
        )  # fmt: skip
        loss = (rows.logp.square() + rows.lse.sin() * rows.logp + rows.entropy).sum()
        return *rows, *torch.autograd.grad(loss, (weight, x))

    for most in (valid, valid + 1, N):
        torch.testing.assert_close(answers(max_valid=most), answers())
    *numbers, top1, dweight, dx = answers(max_valid=valid - 1)
    assert all(t.isnan().any() for t in (*numbers, dweight, dx))
    assert top1.min() == -1

    rows_seen = []

    def seen(weight, bias, head, *others):
        rows_seen.append(len(head.x))
        return logits_to_keep(weight, bias, head, *others)

    monkeypatch.setattr(room, "logits_to_keep", seen)
    fused_linear_logprobs(weight, x, y, max_valid=valid)
    assert rows_seen == [valid]


@pytest.mark.parametrize("accum_dtype", [torch.bfloat16, torch.float32])
def test_chunks_add_up_in_the_dtype_that_is_asked_for(factors, accum_dtype, monkeypatch):
    weight, x, y = (t.bfloat16() if t.is_floating_point() else t for t in factors)
    seen = set()

    def pull_back(g, weight, x, rows, dweight, *others):
        seen.add(dweight.dtype)
        return chunks.pull_back(g, weight, x, rows, dweight, *others)

    monkeypatch.setattr(room, "pull_back", pull_back)
    logp = fused_linear_logprobs(weight.requires_grad_(), x, y, 5, accum_dtype=accum_dtype)
    (dweight,) = torch.autograd.grad(logp.sum(), (weight,))
    assert seen == {accum_dtype}
    assert dweight.dtype is torch.bfloat16


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
        there_and_back(factors, False, (True, True, False))
    padded = -(-V // 16) * 16
    assert largest.numel == max(5 * padded, V * H) < N * V
