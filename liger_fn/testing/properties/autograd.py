"""Autograd in eager mode: derivatives of every order, and what goes on around them."""

from functools import partial
from itertools import chain, combinations

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from liger_fn.testing.call import (
    Call,
    Recorder,
    assert_close,
    assert_same_bits,
    cotangents_like,
    forward_ops,
    gradients,
    is_tensor,
    loss,
)
from liger_fn.testing.properties.registry import NotApplicable, holds_for

# Above this many elements a numerical Jacobian takes seconds, and random directions must do.
_ELEMENTS_FOR_FULL_JACOBIAN = 50


@holds_for("cases")
def gradcheck(spec, case, device):
    """The gradients of the kernels are the slopes of the kernels, in float64."""
    call = Call(spec, case, device)
    tensors = call.tensors(requires_grad=True)
    fast = sum(t.numel() for t in tensors) > _ELEMENTS_FOR_FULL_JACOBIAN
    assert torch.autograd.gradcheck(call.op(), tensors, fast_mode=fast)


@holds_for("cases")
def gradgradcheck(spec, case, device):
    """So are the second derivatives, along random directions."""
    call = Call(spec, case, device)
    tensors = call.tensors(requires_grad=True)
    assert torch.autograd.gradgradcheck(call.op(), tensors, fast_mode=True)


@holds_for("cases")
def partial_requires_grad(spec, case, device):
    """Whoever wants fewer gradients gets those alone, and the same ones."""
    call = Call(spec, case, device, torch.float32)
    outputs, grads = gradients(call.op(), call.tensors(requires_grad=True))
    everything = dict(zip(call.wrt, grads, strict=True))
    most = len(call.wrt) - 1
    # Of many gradients each alone, and all but each: the others are of the same two kinds.
    sizes = range(1, most + 1) if most < 3 else (1, most)
    subsets = chain.from_iterable(combinations(call.wrt, k) for k in sizes)
    for wanted in subsets:
        leaves = dict(zip(call.wrt, call.tensors(), strict=True))
        for n in wanted:
            leaves[n].requires_grad_()
        torch.autograd.backward(call.op()(*leaves.values()), cotangents_like(outputs))

        got = {n: t.grad for n, t in leaves.items() if t.grad is not None}
        assert tuple(got) == wanted, f"gradients of {tuple(got)}, where {wanted} are wanted"
        # Not the same bits: of a kernel that computes less, the compiler may fuse other products
        # and sums into one rounding.
        torch.testing.assert_close(
            tuple(got.values()),
            tuple(everything[n] for n in wanted),
            msg=lambda why, wanted=wanted: f"the gradients of {wanted} alone: {why}",
        )


@holds_for("first")
def one_result(spec, case, device):
    """Of several results one may be used alone."""
    call = Call(spec, case, device)
    n = len(call.op()(*call.tensors()))
    if n == 1:
        raise NotApplicable("there is one result")

    def of_one(f, i):
        tensors = call.tensors(requires_grad=True)
        return torch.autograd.grad(f(*tensors)[i].sin().sum(), tensors, materialize_grads=True)

    for i in range(n):
        assert_close(of_one(call.op(), i), of_one(call.reference(), i))


@holds_for("first")
def third_derivative(spec, case, device):
    """Backward through backward through backward."""
    call = Call(spec, case, device)

    def third(f):
        tensors = call.tensors(requires_grad=True)
        g = loss(f)(*tensors)
        for _ in range(2):
            first = torch.autograd.grad(g, tensors, create_graph=True)
            g = sum(t.sin().sum() for t in first)
        return torch.autograd.grad(g, tensors)

    assert_close(third(call.op()), third(call.reference()))


@holds_for("first")
def inference_mode(spec, case, device):
    """No gradient is wanted, and inference tensors are accepted."""
    call = Call(spec, case, device)
    with torch.inference_mode():
        got = call.op()(*(t.clone() for t in call.tensors()))
        assert_close(got, call.reference()(*call.tensors()))


@holds_for("first")
def saved_tensor_hooks(spec, case, device):
    """What is saved for the backward pass may be packed away meanwhile."""
    call = Call(spec, case, device, torch.float32)
    expected = gradients(call.op(), call.tensors(requires_grad=True))
    tensors = call.tensors(requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        outputs = call.op()(*tensors)
    grads = torch.autograd.grad(outputs, tensors, cotangents_like(outputs))
    assert_same_bits(grads, expected[1], "gradients of what was saved elsewhere")


@holds_for("cases")
def autocast(spec, case, device):
    """Autocast casts the inputs of the ops that declare it, and leaves the others alone."""
    call = Call(spec, case, device, torch.float32)
    plain = call
    if spec.autocast:
        names = call.wrt if spec.autocast is True else spec.autocast
        given = {n: call.arguments[n] for n in names if is_tensor(call.arguments.get(n))}
        plain = call.where(**{n: t.to(torch.bfloat16) for n, t in given.items()})
    expected = plain.op()(*plain.tensors(requires_grad=True))

    tensors = call.tensors(requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        outputs = call.op()(*tensors)
    assert_same_bits(outputs, expected, "under autocast")
    grads = torch.autograd.grad(outputs, tensors, cotangents_like(outputs))
    assert [g.dtype for g in grads] == [t.dtype for t in tensors]


def _checkpointed(call: Call, f, **options):
    """The loss of `f` after another function, all recomputed in the backward pass."""
    return lambda *tensors: checkpoint(loss(f), *(t.sin() for t in tensors), **options)


@holds_for("first")
def checkpointing(spec, case, device):
    """Recomputation in the backward pass, reentrant and not."""
    call = Call(spec, case, device)
    expected = _grad(_checkpointed(call, call.reference(), use_reentrant=False), call)
    for reentrant in (False, True):
        got = _grad(_checkpointed(call, call.op(), use_reentrant=reentrant), call)
        assert_close(got, expected)


def _grad(f, call: Call):
    tensors = call.tensors(requires_grad=True)
    f(*tensors).backward()
    return [t.grad for t in tensors]


def saving(ops):
    """A context_fn for `checkpoint`: save what `ops` return, recompute the rest."""

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in ops else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)


@holds_for("first")
def selective_checkpointing(spec, case, device):
    """A policy may save the op: then its forward kernels run once."""
    call = Call(spec, case, device)
    expected = _grad(_checkpointed(call, call.reference(), use_reentrant=False), call)
    ops = forward_ops(call)
    f = _checkpointed(call, call.op(), use_reentrant=False, context_fn=saving(ops))
    with Recorder() as recorder:
        got = _grad(f, call)
    assert_close(got, expected)
    assert sum(op in ops for op, _ in recorder.calls) == len(ops), "the op was computed again"
