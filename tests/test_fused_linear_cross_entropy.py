"""Facts of fused_linear_cross_entropy: its work, its memory, its chunks, its small numbers."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from liger_fn.functional import fused_linear_cross_entropy
from liger_fn.functional.linear_loss import cross_entropy as room

N, H, V = 12, 4, 40
OPTIONS = (-100, 0.0, 0.0, None, 1.0)


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
        room.fused_linear_cross_entropy_fwd(*factors, None, None, 5, *OPTIONS, *needs)
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
        room.fused_linear_cross_entropy_fwd(*factors, None, None, 5, *OPTIONS, True, True, False)
    padded = -(-V // 16) * 16
    assert largest.numel == max(5 * padded, V * H) < N * V


@pytest.mark.parametrize(
    ("sizes", "chunk"),
    [
        ((8192, 128256, 4096, 2), 4096),  # 1 GiB holds 4185 rows
        ((8192, 262144, 2560, 2), 2048),  # the weight is larger, and holds 2560
        ((8192, 32000, 4096, 2), 8192),  # all of it fits
        ((9000, 128256, 4096, 2), 3072),  # three equal chunks, not two and a stub
        ((7, 2**31, 1, 2), 1),
    ],
)
def test_default_chunks(sizes, chunk):
    assert room._chunk_size(*sizes) == chunk


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
