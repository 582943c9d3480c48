"""Deferred logits by themselves: every way through them gives what the real logits give."""

from __future__ import annotations

import functools
import io
import operator
import pickle

import einops
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.trainer_pt_utils import nested_concat

from liger_fn import functional
from liger_fn.hf.deferred import Deferred
from liger_fn.hf.output_head import FUSED, DeferringHead, deferring, swap

ROWS, TOKENS, HIDDEN, VOCAB = 2, 5, 8, 11


pytestmark = pytest.mark.usefixtures("reference_path")


@pytest.fixture
def head():
    head = nn.Linear(HIDDEN, VOCAB)
    swap(head, DeferringHead)
    return head


@pytest.fixture
def hidden():
    return torch.randn(ROWS, TOKENS, HIDDEN, requires_grad=True)


@pytest.fixture
def target():
    target = torch.randint(0, VOCAB, (ROWS * TOKENS,))
    target[3] = -100
    return target


def real_and_deferred(head, hidden):
    real = head(hidden)
    with deferring(head, FUSED):
        lazy = head(hidden)
    assert type(lazy) is Deferred
    return real, lazy


@pytest.fixture
def fused(monkeypatch):
    calls = []
    op = functional.fused_linear_cross_entropy
    record = lambda *a, **k: calls.append(k) or op(*a, **k)  # noqa: E731
    monkeypatch.setattr(functional, "fused_linear_cross_entropy", record)
    return calls


# What a model does to its logits on the way to the loss, and whether that can be written down.
TAILS = {
    "nothing": (lambda z: z, True),
    "float": (lambda z: z.float(), True),
    "scaled": (lambda z: z * 0.5, True),
    "scaled from the left": (lambda z: 0.5 * z, True),
    "divided": (lambda z: z / 3.0, True),
    "soft cap": (lambda z: torch.tanh(z / 5.0) * 5.0, True),
    "soft cap, method": (lambda z: (z / 5.0).tanh() * 5.0, True),
    "soft cap of scaled": (lambda z: 3.0 * torch.tanh(2.0 * z / 3.0), True),
    "part of the vocabulary": (lambda z: z[..., :9], True),
    "to a dtype": (lambda z: z.to(torch.float32).contiguous(), True),
    "to a tensor's dtype": (lambda z: z.to(torch.ones(1)), True),
    "negative cap": (lambda z: torch.tanh(z) * -2.0, False),
    "shifted": (lambda z: z + 1.0, False),
    "scaled by a tensor": (lambda z: z * torch.tensor(0.5), False),
    "divided by itself": (lambda z: z / (z.abs() + 1), False),
    "two caps": (lambda z: torch.tanh(torch.tanh(z)), False),
    "clamped": (lambda z: z.clamp(-0.5, 0.5), False),
    "log softmax": (lambda z: torch.log_softmax(z, -1), False),
    "other end of the vocabulary": (lambda z: z[..., 2:], False),
}


@pytest.mark.parametrize("name", TAILS)
def test_tails(head, hidden, target, fused, name):
    tail, is_written_down = TAILS[name]
    results = []
    for logits in real_and_deferred(head, hidden):
        z = tail(logits)
        z = z.reshape(-1, z.shape[-1])
        wanted = target.clamp(max=z.shape[-1] - 1)
        loss = F.cross_entropy(z, wanted, label_smoothing=0.1)
        results.append((loss, *torch.autograd.grad(loss, (hidden, head.weight, head.bias))))
    for got, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, expected)
    assert len(fused) == is_written_down


def test_shifts_and_shapes(head, hidden, fused):
    real, lazy = real_and_deferred(head, hidden)
    labels = torch.randint(0, VOCAB, (ROWS, TOKENS))
    losses = [
        F.cross_entropy(
            z[..., :-1, :].contiguous().view(-1, VOCAB),
            labels[..., 1:].reshape(-1),
            reduction="sum",
        )
        for z in (real, lazy)
    ]
    torch.testing.assert_close(losses[1], losses[0])
    assert len(fused) == 1
    assert (lazy.shape, lazy.size(-1), lazy.dim(), lazy.ndim) == (real.shape, VOCAB, 3, 3)
    assert (len(lazy), lazy.numel(), lazy.dtype) == (len(real), real.numel(), real.dtype)
    assert (lazy.device, lazy.requires_grad) == (real.device, True)
    assert lazy[0, 1].shape == real[0, 1].shape
    for index in (
        0,
        (0, 1),
        (..., 3),
        (slice(None), -1),
        (0, slice(1, 3), slice(0, 4)),
        labels > 5,
    ):
        value = lazy[index]
        value = value.materialize() if isinstance(value, Deferred) else value
        torch.testing.assert_close(value, real[index])


def test_class_weights_and_reductions(head, hidden, target, fused):
    real, lazy = (z.view(-1, VOCAB) for z in real_and_deferred(head, hidden))
    weight = torch.rand(VOCAB)
    for reduction in ("mean", "sum", "none"):
        options = {"weight": weight, "reduction": reduction, "ignore_index": 4}
        wanted = target.masked_fill(target < 0, 4)
        torch.testing.assert_close(
            F.cross_entropy(lazy, wanted, **options), F.cross_entropy(real, wanted, **options)
        )
    module = nn.CrossEntropyLoss(weight=weight)
    torch.testing.assert_close(module(lazy, target), module(real, target))
    assert len(fused) == 4


DIVISORS = {
    "a number": (7, True),
    "a tensor": (torch.tensor(7), True),
    "a narrow tensor": (torch.tensor(3.5, dtype=torch.bfloat16), True),
    "a wide tensor": (torch.tensor(3.5, dtype=torch.float64), False),
    "a negative number": (-2.0, False),
    "a tensor with a gradient": (torch.tensor(7.0, requires_grad=True), False),
    "a tensor of one dimension": (torch.tensor([7.0]), False),
}


@pytest.mark.parametrize("name", DIVISORS)
def test_a_sum_waits_for_what_divides_it(head, hidden, target, fused, name):
    items, is_mean = DIVISORS[name]
    expected = F.cross_entropy(head(hidden).view(-1, VOCAB), target, reduction="sum") / items
    wanted = torch.autograd.grad(expected.sum(), (hidden, head.weight))
    with deferring(head, FUSED):
        total = F.cross_entropy(head(hidden).view(-1, VOCAB), target, reduction="sum")
        assert total.device == hidden.device
        assert not fused
        loss = total / items
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss.sum(), (hidden, head.weight))
    torch.testing.assert_close(gradients, wanted)
    assert [call["reduction"] for call in fused] == ["mean" if is_mean else "sum"]
    assert ("Div" in type(loss.grad_fn).__name__) != is_mean


def test_a_sum_that_nothing_divides(head, hidden, target, fused):
    """It is a tensor for everybody who does something else with it, and is computed once."""
    real = F.cross_entropy(head(hidden).view(-1, VOCAB), target, reduction="sum")
    with deferring(head, FUSED):
        total = F.cross_entropy(head(hidden).view(-1, VOCAB), target, reduction="sum")
    for use in (
        lambda loss: loss + 1,
        lambda loss: 2 * loss,
        lambda loss: torch.stack([loss, loss]),
        lambda loss: loss.mean(),
        lambda loss: loss / 3,
        lambda loss: loss.item(),
    ):
        torch.testing.assert_close(use(total), use(real))
    total.backward()
    assert hidden.grad is not None
    assert len(fused) == 1


def test_a_sum_outside_of_the_model_s_own_code_is_a_tensor(head, hidden, target):
    _, lazy = real_and_deferred(head, hidden)
    assert type(F.cross_entropy(lazy.view(-1, VOCAB), target, reduction="sum")) is torch.Tensor


def test_what_the_op_does_not_know_gets_real_logits(head, hidden, target, fused):
    real, lazy = real_and_deferred(head, hidden)
    soft = torch.rand(ROWS * TOKENS, VOCAB)
    flat, lazy_flat = real.view(-1, VOCAB), lazy.view(-1, VOCAB)
    torch.testing.assert_close(F.cross_entropy(lazy_flat, soft), F.cross_entropy(flat, soft))
    by_class = target.view(ROWS, TOKENS).clamp(min=0)
    torch.testing.assert_close(
        F.cross_entropy(lazy.transpose(1, 2), by_class), F.cross_entropy(real.mT, by_class)
    )
    torch.testing.assert_close(F.mse_loss(lazy, real.detach()), torch.zeros(()))
    assert not fused


@pytest.mark.parametrize(
    "name", ["add", "sub", "pow", "matmul", "eq", "ne", "lt", "le", "gt", "ge", "mod"]
)
def test_operators(head, hidden, name):
    real, lazy = real_and_deferred(head, hidden)
    other = torch.rand(VOCAB, VOCAB) if name == "matmul" else 2.0
    function = getattr(operator, name)
    torch.testing.assert_close(function(lazy, other), function(real, other), equal_nan=True)
    if name in ("add", "sub"):
        torch.testing.assert_close(function(other, lazy), function(other, real))
    torch.testing.assert_close(torch.cat([lazy, lazy]), torch.cat([real, real]))
    torch.testing.assert_close(-lazy, -real)
    torch.testing.assert_close(1.0 / lazy, 1.0 / real)
    assert len(list(lazy)) == ROWS


def test_writing_into_the_logits_counts(head, hidden, target, fused):
    real, lazy = real_and_deferred(head, hidden)
    real = real.clone()
    for z in (real, lazy):
        z[..., 3] = -1e4
    wanted = target.masked_fill(target == 3, 0)
    torch.testing.assert_close(
        F.cross_entropy(lazy.float().view(-1, VOCAB), wanted),
        F.cross_entropy(real.view(-1, VOCAB), wanted),
    )
    assert not fused


def test_a_look_without_a_graph_does_not_cut_the_graph(head, hidden):
    _, lazy = real_and_deferred(head, hidden)
    with torch.no_grad():
        assert not lazy.argmax(-1).requires_grad
    lazy.square().sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is not None


def of_a_library_that_shards(hook):
    hook.__module__ = "deepspeed.runtime.zero.parameter_offload"
    return hook


def test_the_logits_are_computed_once(head, hidden):
    calls = []
    head.register_forward_hook(of_a_library_that_shards(lambda *_: calls.append(1)))
    _, lazy = real_and_deferred(head, hidden)
    calls.clear()
    lazy.sum()
    lazy.argmax(-1)
    assert len(calls) == 1


def test_the_op_runs_inside_the_head_s_hooks(head, hidden, target):
    events = []
    head.register_forward_pre_hook(lambda *_: events.append("before"))
    head.register_forward_hook(of_a_library_that_shards(lambda *_: events.append("after")))
    with deferring(head, FUSED):
        lazy = head(hidden)
    assert not events
    F.cross_entropy(lazy.view(-1, VOCAB), target)
    assert events == ["before", "after"]


class Watcher:
    def __call__(self, *_):
        pass


@pytest.mark.parametrize(
    "hook",
    [lambda *_: None, functools.partial(lambda *_: None), Watcher(), Watcher().__call__],
    ids=["function", "partial", "object", "method"],
)
@pytest.mark.parametrize(
    "register", ["forward_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_a_hook_of_a_stranger_gets_real_logits(head, hidden, hook, register):
    getattr(head, f"register_{register}")(hook)
    with deferring(head, FUSED):
        assert type(head(hidden)) is torch.Tensor


def test_a_hook_before_the_head_stays_before_it(head, hidden, target, fused):
    head.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    real, lazy = real_and_deferred(head, hidden)
    loss = F.cross_entropy(lazy.view(-1, VOCAB), target)
    torch.testing.assert_close(loss, F.cross_entropy(real.view(-1, VOCAB), target))
    assert len(fused) == 1


# What users do with `outputs.logits`.


def test_what_is_born_without_a_graph_has_none(head, hidden):
    with torch.no_grad():
        real, lazy = real_and_deferred(head, hidden)
    assert not lazy.requires_grad
    np.testing.assert_allclose(np.asarray(lazy), real.numpy(), rtol=1e-6)
    assert np.asarray(lazy, dtype=np.float16).dtype == np.float16
    assert np.argmax(lazy, -1).shape == (ROWS, TOKENS)


def test_a_loss_of_what_is_born_without_a_graph_has_none(head, hidden, target, fused):
    with torch.no_grad():
        _, lazy = real_and_deferred(head, hidden)
    assert not F.cross_entropy(lazy.view(-1, VOCAB), target).requires_grad
    assert len(fused) == 1


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (("meta",), {}),
        ((torch.device("meta"), torch.float64), {}),
        ((torch.empty(0, device="meta"),), {}),
        ((), {"device": "meta", "dtype": torch.float64}),
    ],
    ids=["name", "device", "tensor", "keyword"],
)
def test_another_device(head, hidden, args, kwargs):
    real, lazy = real_and_deferred(head, hidden)
    expected, moved = real.to(*args, **kwargs), lazy.to(*args, **kwargs)
    assert (moved.device, moved.dtype) == (expected.device, expected.dtype)
    assert type(lazy.to(hidden.device)) is Deferred


def test_numpy_asks_for_detach_as_always(head, hidden):
    _, lazy = real_and_deferred(head, hidden)
    with pytest.raises(RuntimeError, match=r"Use tensor.detach\(\).numpy\(\) instead"):
        np.asarray(lazy)
    assert np.asarray(lazy.detach()).shape == lazy.shape


def test_inference_mode(head, hidden):
    with torch.inference_mode():
        real, lazy = real_and_deferred(head, hidden.detach())
    assert torch.equal(lazy.argmax(-1), real.argmax(-1))


def test_saved_are_the_logits_and_not_the_head(head, hidden):
    real, lazy = real_and_deferred(head, hidden)
    file = io.BytesIO()
    torch.save({"logits": lazy}, file)
    file.seek(0)
    for copied in (torch.load(file)["logits"], pickle.loads(pickle.dumps(lazy))):
        assert type(copied) is torch.Tensor
        torch.testing.assert_close(copied.detach(), real.detach())


def test_logits_that_would_come_from_a_later_head_are_refused(head, hidden, target):
    real, lazy = real_and_deferred(head, hidden)
    _, read = real_and_deferred(head, hidden)
    read.sum()
    with torch.no_grad():
        head.weight.add_(1.0)
    torch.testing.assert_close(read.exp(), real.exp())
    for use in (lambda: lazy.argmax(-1), lambda: F.cross_entropy(lazy.view(-1, VOCAB), target)):
        with pytest.raises(RuntimeError, match="must be read before the output head changes"):
            use()


def test_logits_of_functional_call_are_refused_outside_of_it(head, hidden):
    doubled = {name: 2 * p for name, p in head.named_parameters()}
    with deferring(head, FUSED):
        lazy = torch.func.functional_call(head, doubled, (hidden,))
    with pytest.raises(RuntimeError, match="got a head with other weights"):
        lazy.argmax(-1)


def test_read_outside_of_autocast(head, hidden, target, fused):
    with torch.autocast("cpu", torch.bfloat16):
        real, lazy = real_and_deferred(head, hidden.detach().bfloat16())
    assert real.dtype == lazy.dtype == torch.bfloat16
    assert torch.equal(lazy.detach(), real)
    loss = F.cross_entropy(lazy.float().view(-1, VOCAB), target)
    torch.testing.assert_close(loss, F.cross_entropy(real.float().view(-1, VOCAB), target))
    assert len(fused) == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda z: pytest.importorskip("accelerate.utils").concatenate([z, z]),
        lambda z: pytest.importorskip("accelerate.utils").pad_across_processes(z),
        lambda z: einops.rearrange(z, "b t v -> (b t) v"),
        lambda z: torch.vmap(torch.sum)(z),
        lambda z: nested_concat(z, z),
    ],
)
def test_who_takes_only_tensors_says_what_to_do(head, hidden, use):
    _, lazy = real_and_deferred(head, hidden)
    with pytest.raises(Exception, match=r"call its materialize\(\), or the model with skip_logits"):
        use(lazy)
    assert use(lazy.materialize()).numel()


# What trainers ask of them


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("count", [0, 7])
def test_sums_of_mean_logits(cap, count):
    hidden, head = torch.randn(9, 8, dtype=torch.float64), torch.nn.Linear(8, 5).double()
    logits = Deferred(head, hidden, 5, scale=0.5, cap=cap)
    mask = torch.arange(9) < count
    real = head(hidden) * 0.5
    real = real if cap is None else cap * torch.tanh(real)
    torch.testing.assert_close(logits.rows(mask).sum_of_means(), real[mask].mean(-1).sum())


def test_rows_of_logits_that_were_written_to():
    logits = Deferred(None, torch.randn(3, 4), 4)
    logits[0] = 0.0
    assert torch.equal(logits.rows(torch.tensor([True, False, False])), torch.zeros(1, 4))
