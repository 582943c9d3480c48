"""Patched models under DDP and FSDP2, on two processes."""

from __future__ import annotations

import contextlib
import functools
import gc

import torch
import torch.multiprocessing as mp
from torch import nn

from liger_fn import functional
from liger_fn.functional import using
from liger_fn.hf import apply
from liger_fn.testing.tiny_models import tiny_inputs, tiny_model


def test_ddp_and_fsdp2_on_two_processes(tmp_path):
    mp.start_processes(run, (str(tmp_path / "store"),), 2, start_method="spawn")


def run(rank, store):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    try:
        with using("reference"):
            ddp(rank)
            fsdp2(rank)
        torch.distributed.barrier()
    finally:
        # Models in reference cycles keep gloo's groups, whose threads must not outlive the process.
        gc.collect()
        torch.distributed.destroy_process_group()


def small(tie):
    return tiny_model("llama", num_hidden_layers=1, tie_word_embeddings=tie).train()


def batches():
    return [tiny_inputs(small(False), seed=seed) for seed in range(2)]


def mean_gradients(tie):
    """Loss and gradients of the mean of the two batches, on one process, untouched."""
    model = small(tie)
    loss = sum(model(**batch).loss for batch in batches()) / 2
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def ddp(rank):
    for tie, unused in ((False, True), (True, False)):
        model = small(tie)
        apply(model)
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
        wrapped(**batches()[rank]).loss.backward()
        check_gradients(model, tie)


def fsdp2(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard as shard

    # Left to itself FSDP takes the GPU where there is one, and gloo does not serve it.
    fully_shard = functools.partial(shard, mesh=init_device_mesh("cpu", (2,)))

    for tie, first in ((False, "apply"), (False, "shard"), (True, "apply")):
        model = small(tie)
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
            model(**batches()[rank]).loss.backward()
        assert len(calls) == 1
        check_gradients(model, tie)
        report.undo()
        model.zero_grad()
        with count_fused() as calls:
            model(**batches()[rank]).loss.backward()
        assert not calls
        check_gradients(model, tie)


def check_gradients(model, tie):
    expected = mean_gradients(tie)
    for name, p in model.named_parameters():
        gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@contextlib.contextmanager
def count_fused():
    calls = []
    op = functional.fused_linear_cross_entropy
    functional.fused_linear_cross_entropy = lambda *a, **k: calls.append(k) or op(*a, **k)
    try:
        yield calls
    finally:
        functional.fused_linear_cross_entropy = op
