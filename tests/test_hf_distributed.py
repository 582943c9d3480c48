"""Patched models under DDP and FSDP2, on two processes, and on two GPUs where there are so many."""

from __future__ import annotations

import contextlib
import functools
import gc

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from liger_fn import functional
from liger_fn.functional import using
from liger_fn.hf import apply
from liger_fn.testing.tiny_models import tiny_inputs, tiny_model


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_ddp_and_fsdp2_on_two_processes(backend, tmp_path):
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("nccl needs two GPUs")
    store = str(tmp_path / "store")
    mp.start_processes(run, (backend, store), 2, start_method="spawn")


def run(rank, backend, store):
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(backend, f"file://{store}", rank=rank, world_size=2)
    try:
        with using("kernels" if backend == "nccl" else "reference"):
            ddp(rank, device)
            fsdp2(rank, device)
        torch.distributed.barrier()
    finally:
        # Models in reference cycles keep gloo's groups, whose threads must not outlive the process.
        gc.collect()
        torch.distributed.destroy_process_group()


def small(tie, device):
    model = tiny_model("llama", num_hidden_layers=1, tie_word_embeddings=tie)
    return model.train().to(device)


def batches(device):
    drawn = [tiny_inputs(small(False, "cpu"), seed=seed) for seed in range(2)]
    return [{name: value.to(device) for name, value in batch.items()} for batch in drawn]


def mean_gradients(tie, device):
    """Loss and gradients of the mean of the two batches, on one process, untouched."""
    model = small(tie, device)
    loss = sum(model(**batch).loss for batch in batches(device)) / 2
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def ddp(rank, device):
    for tie, unused in ((False, True), (True, False)):
        model = small(tie, device)
        apply(model)
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
        wrapped(**batches(device)[rank]).loss.backward()
        check_gradients(model, tie, device)


def fsdp2(rank, device):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard as shard

    # Left to itself FSDP takes the GPU where there is one, and gloo does not serve it.
    fully_shard = functools.partial(shard, mesh=init_device_mesh(device.type, (2,)))

    for tie, first in ((False, "apply"), (False, "shard"), (True, "apply")):
        model = small(tie, device)
        if first == "apply":
            report = apply(model)
        for layer in model.model.layers:
            fully_shard(layer)
        if not tie:
            fully_shard(model.lm_head)
        fully_shard(model)
        if first == "shard":
            report = apply(model)
        assert report.replaced()["fused_linear_cross_entropy"] == 1
        with count_fused() as calls:
            model(**batches(device)[rank]).loss.backward()
        assert len(calls) == 1
        check_gradients(model, tie, device)
        report.undo()
        model.zero_grad()
        with count_fused() as calls:
            model(**batches(device)[rank]).loss.backward()
        assert not calls
        check_gradients(model, tie, device)


def check_gradients(model, tie, device):
    expected = mean_gradients(tie, device)
    # The kernels sum in another order than PyTorch does.
    rtol, atol = (1e-3, 1e-5) if device.type == "cuda" else (1e-4, 1e-6)
    for name, p in model.named_parameters():
        gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        torch.testing.assert_close(gradient, expected[name], rtol=rtol, atol=atol)


@contextlib.contextmanager
def count_fused():
    calls = []
    op = functional.fused_linear_cross_entropy
    functional.fused_linear_cross_entropy = lambda *a, **k: calls.append(k) or op(*a, **k)
    try:
        yield calls
    finally:
        functional.fused_linear_cross_entropy = op
