"""Facts of fused_linear_logprobs: its chunks, its work, its memory, and TRL's answers."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from liger_fn.functional import fused_linear_cross_entropy, fused_linear_logprobs
from liger_fn.functional.linear_loss import logprobs as room

N, H, V = 12, 4, 40
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


@pytest.mark.parametrize(
    ("needs", "products"),
    [
        ((False, True, False), 2),
        ((True, False, False), 2),
        ((True, True, True), 3),
    ],
)
def test_only_wanted_gradients_are_computed(factors, needs, products):
    with Multiplications() as work:
        rows = room.fused_linear_logprobs_fwd(*factors, None, 5, *OPTIONS)
    assert work.count == N * H * V
    _, _, entropy, _, highest, log_sum = rows
    cotangents = (log_sum, None, entropy, None)
    with Multiplications() as work:
        room.fused_linear_logprobs_bwd(
            *factors, None, 5, entropy, highest, log_sum, *cotangents, *OPTIONS, *needs
        )
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
        rows = room.fused_linear_logprobs_fwd(*factors, None, 5, *OPTIONS)
        _, _, entropy, _, highest, log_sum = rows
        cotangents = (log_sum, None, entropy, None)
        room.fused_linear_logprobs_bwd(
            *factors, None, 5, entropy, highest, log_sum, *cotangents, *OPTIONS, True, True, False
        )
    padded = -(-V // 16) * 16
    assert largest.numel == max(5 * padded, V * H) < N * V
