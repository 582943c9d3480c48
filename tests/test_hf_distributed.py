"""Patched models under DDP and FSDP2, on two processes, and on two GPUs where there are so many."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from liger_fn import functional
from liger_fn.functional import using
from liger_fn.hf import apply
from liger_fn.hf.output_head import ask
from liger_fn.hf.trl import tokens_of
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
            experts(rank, device)
            asked(rank, device)
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


def mean_gradients(model, device):
    """Gradients of the mean of the two batches, on one process, of an untouched model."""
    loss = sum(model(**batch).loss for batch in batches(device)) / 2
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def ddp(rank, device):
    for tie, unused in ((False, True), (True, False)):
        model = small(tie, device)
        apply(model)
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
        wrapped(**batches(device)[rank]).loss.backward()
        check_gradients(model, mean_gradients(small(tie, device), device), device)


def experts(rank, device):
    """Of a mixture each process has all experts, whole while a layer computes."""
    for is_sharded in (False, True):
        model = mixture(device)
        assert apply(model).replaced()["fused_moe"] == 1
        wrapped = model
        if is_sharded:
            sharded(model, device)
        else:
            wrapped = nn.parallel.DistributedDataParallel(model)
        with count("fused_moe") as calls:
            wrapped(**batches(device)[rank]).loss.backward()
        assert len(calls) == 1
        check_gradients(model, mean_gradients(mixture(device), device), device)


def mixture(device):
    return tiny_model("mixtral", num_hidden_layers=1).train().to(device)


def asked(rank, device):
    """Log-probabilities are taken inside of what wraps the model, which then knows of them."""
    for tie in (False, True):
        expected = small(tie, device)
        (sum(loss_asked(expected, batch) for batch in batches(device)) / 2).backward()
        expected = {name: p.grad for name, p in expected.named_parameters()}
        for wrap in (
            lambda model: nn.parallel.DistributedDataParallel(model, find_unused_parameters=True),
            lambda model: sharded(model, device, own_head=False, reshard_after_forward=True),
        ):
            model = small(tie, device)
            apply(model)
            wrapped = wrap(model)
            with count("fused_linear_logprobs") as calls:
                loss_asked(wrapped, batches(device)[rank]).backward()
            assert len(calls) == 1
            check_gradients(model, expected, device)


def loss_asked(model, batch):
    labels = batch["labels"][:, 1:]
    logps = ask(
        model,
        lambda outputs: tokens_of(outputs.logits[:, :-1], labels, more=False).logps,
        **{name: value for name, value in batch.items() if name != "labels"},
    )
    return -logps.sum() / (labels != -100).sum()


def sharded(model, device, own_head=True, **root):
    """Shard a model over both processes, each layer and maybe the head by itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Left to itself FSDP takes the GPU where there is one, and gloo does not serve it.
    mesh = init_device_mesh(device.type, (2,))
    for part in (*model.model.layers, *([model.lm_head] if own_head else [])):
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh, **root)


def fsdp2(rank, device):
    for tie, first in ((False, "apply"), (False, "shard"), (True, "apply")):
        expected = mean_gradients(small(tie, device), device)
        model = small(tie, device)
        if first == "apply":
            report = apply(model)
        sharded(model, device, own_head=not tie)
        if first == "shard":
            report = apply(model)
        assert report.replaced()["fused_linear_cross_entropy"] == 1
        with count("fused_linear_cross_entropy") as calls:
            model(**batches(device)[rank]).loss.backward()
        assert len(calls) == 1
        check_gradients(model, expected, device)
        report.undo()
        model.zero_grad()
        with count("fused_linear_cross_entropy") as calls:
            model(**batches(device)[rank]).loss.backward()
        assert not calls
        check_gradients(model, expected, device)


def check_gradients(model, expected, device):
    # The kernels sum in another order than PyTorch does.
    rtol, atol = (1e-3, 1e-5) if device.type == "cuda" else (1e-4, 1e-6)
    for name, p in model.named_parameters():
        gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        torch.testing.assert_close(gradient, expected[name], rtol=rtol, atol=atol)


@contextlib.contextmanager
def count(name):
    calls = []
    op = getattr(functional, name)
    setattr(functional, name, lambda *a, **k: calls.append(k) or op(*a, **k))
    try:
        yield calls
    finally:
        setattr(functional, name, op)
