"""Cross entropy of a vocabulary that is spread over processes."""

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

from liger_fn.functional import (
    fused_linear_vocab_parallel_cross_entropy,
    using,
    vocab_parallel_cross_entropy,
)

N, H, V = 9, 4, 12
OPTIONS = {"softcap": 3.0, "logit_scale": 0.5}


def drawn(device="cpu"):
    torch.manual_seed(0)
    weight, x = torch.randn(V, H), torch.randn(N, H)
    weight, x = (t.to(device, torch.float64).requires_grad_() for t in (weight, x))
    y = torch.randint(V, (N,), device=device)
    y[2] = -100
    return weight, x, y


def capped(z):
    return OPTIONS["softcap"] * torch.tanh(OPTIONS["logit_scale"] * z / OPTIONS["softcap"])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_one_process_alone(reduction, device):
    weight, x, y = drawn(device)
    z = x @ weight.T
    expected = F.cross_entropy(capped(z), y, reduction=reduction)
    ours = vocab_parallel_cross_entropy(z, y, reduction=reduction, **OPTIONS)
    fused = fused_linear_vocab_parallel_cross_entropy(
        weight, x, y, 4, reduction=reduction, **OPTIONS
    )
    for loss in (ours, fused):
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss.square().sum(), (weight, x), retain_graph=True),
            torch.autograd.grad(expected.square().sum(), (weight, x), retain_graph=True),
        )


def test_a_target_that_nobody_has_is_nan(device):
    logits = torch.randn(2, V, device=device)
    losses = vocab_parallel_cross_entropy(
        logits, torch.tensor([1, V], device=device), reduction="none"
    )
    assert losses.isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"target": torch.randn(2)}, TypeError, "`target` must have an integer dtype"),
        (
            {"target": torch.zeros(3, dtype=torch.long)},
            ValueError,
            r"`target` must have shape \(2,",
        ),
        ({"logits": torch.zeros(2, 3).long()}, TypeError, "`logits` must have a floating-point"),
        ({"reduction": "all"}, ValueError, "`reduction` must be one of"),
    ],
)
def test_errors(change, error, sentence):
    arguments = {"logits": torch.randn(2, 3), "target": torch.tensor([0, 1])} | change
    with pytest.raises(error, match=f"vocab_parallel_cross_entropy: {sentence}"):
        vocab_parallel_cross_entropy(**arguments)


def test_two_processes(tmp_path):
    mp.start_processes(run, (str(tmp_path / "store"),), 2, start_method="spawn")


def run(rank, store):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    try:
        with using("reference"):
            of_shards(rank)
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def of_shards(rank):
    weight, x, y = drawn()
    own = slice(rank * V // 2, (rank + 1) * V // 2)
    z = x @ weight.T
    forbidden = torch.zeros(N, V, dtype=torch.float64)
    forbidden[3, V // 2 + 1 :] = -torch.inf
    forbidden[3, y[3]] = 0.0
    for logits in (z, z + forbidden):
        expected = F.cross_entropy(logits, y, reduction="none")
        ours = vocab_parallel_cross_entropy(logits[:, own], y, reduction="none")
        torch.testing.assert_close(ours, expected)
        upstream = torch.arange(1.0, N + 1, dtype=torch.float64)
        shard = torch.autograd.grad(ours @ upstream, logits, retain_graph=True)[0]
        whole = torch.autograd.grad(expected @ upstream, logits, retain_graph=True)[0]
        torch.testing.assert_close(shard[:, own], whole[:, own])

    expected = F.cross_entropy(capped(z), y)
    mine = weight[own].detach().requires_grad_()
    fused = fused_linear_vocab_parallel_cross_entropy(mine, x, y, 4, **OPTIONS)
    torch.testing.assert_close(fused, expected)
    dweight, dx = torch.autograd.grad(fused, (mine, x))
    torch.distributed.all_reduce(dx)
    whole_dweight, whole_dx = torch.autograd.grad(expected, (weight, x))
    torch.testing.assert_close(dweight, whole_dweight[own])
    torch.testing.assert_close(dx, whole_dx)
