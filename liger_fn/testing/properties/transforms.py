"""torch.func and forward mode: the op under a transform equals the reference under it."""

import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from liger_fn.functional.core.backend import using
from liger_fn.testing.call import Call, assert_close, loss
from liger_fn.testing.properties.registry import PROPERTIES, Property, holds_for


def _all(tensors) -> tuple[int, ...]:
    return tuple(range(len(tensors)))


def _stacked(tensors):
    """A batch of three for each tensor."""
    return [torch.stack([t, -t, 0.5 * t]) for t in tensors]


def _grad(f, *tensors):
    return grad(loss(f), _all(tensors))(*tensors)


def _vjp(f, *tensors):
    outputs, pull = vjp(f, *tensors)
    return outputs, pull(tuple(o.cos() for o in outputs))


def _vjp_without_grad(f, *tensors):
    outputs, pull = vjp(f, *tensors)
    with torch.no_grad():
        return pull(tuple(o.cos() for o in outputs))


def _jvp(f, *tensors):
    return jvp(f, tensors, tuple(t.cos() for t in tensors))


def _dual_numbers(f, *tensors):
    with forward_ad.dual_level():
        outputs = f(*(forward_ad.make_dual(t, t.cos()) for t in tensors))
        return [forward_ad.unpack_dual(o).tangent for o in outputs]


def _jacrev(f, *tensors):
    return jacrev(f, _all(tensors))(*tensors)


def _jacfwd(f, *tensors):
    return jacfwd(f, _all(tensors))(*tensors)


def _hessian(f, *tensors):
    return hessian(loss(f), _all(tensors))(*tensors)


def _hessian_of_first(f, *tensors):
    return hessian(loss(f))(*tensors)


def _hessian_reverse(f, *tensors):
    return jacrev(jacrev(loss(f)))(*tensors)


def _grad_of_grad(f, *tensors):
    def of_first(*tensors):
        return sum(g.square().sum() for g in _grad(f, *tensors))

    return grad(of_first, _all(tensors))(*tensors)


def _grad_over_outer_graph(f, *tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(sum(g.square().sum() for g in _grad(f, *leaves)), leaves)


def _jvp_of_pullback(f, *tensors):
    outputs, pull = vjp(f, *tensors)
    return jvp(lambda *c: pull(c), tuple(o.cos() for o in outputs), tuple(o.sin() for o in outputs))


def _per_sample_grads(f, *tensors):
    return vmap(grad(loss(f), _all(tensors)))(*_stacked(tensors))


def _grad_of_vmap(f, *tensors):
    return _grad(lambda *t: vmap(f)(*_stacked(t)), *tensors)


def _vmap(f, *tensors):
    return vmap(f)(*_stacked(tensors))


def _vmap_of_vmap(f, *tensors):
    return vmap(vmap(f))(*_stacked(_stacked(tensors)))


def _vmap_under_autograd(f, *tensors):
    leaves = [t.clone().requires_grad_() for t in _stacked(tensors)]
    return torch.autograd.grad(loss(vmap(f))(*leaves), leaves)


def _jvp_of_vmap(f, *tensors):
    batches = tuple(_stacked(tensors))
    return jvp(vmap(f), batches, tuple(b.cos() for b in batches))


def _many_cotangents(f, *tensors):
    """What autograd's vectorized jacobian does."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    outputs = [o for o in f(*leaves) if o.requires_grad]
    cotangents = [torch.stack([o.cos(), o.sin()]).detach() for o in outputs]
    return torch.autograd.grad(outputs, leaves, cotangents, is_grads_batched=True)


TRANSFORMS = {
    transform.__name__.strip("_"): transform
    for transform in (
        _grad,
        _vjp,
        _vjp_without_grad,
        _jvp,
        _dual_numbers,
        _jacrev,
        _jacfwd,
        _hessian,
        _hessian_of_first,
        _hessian_reverse,
        _grad_of_grad,
        _grad_over_outer_graph,
        _jvp_of_pullback,
        _per_sample_grads,
        _grad_of_vmap,
        _vmap,
        _vmap_of_vmap,
        _vmap_under_autograd,
        _jvp_of_vmap,
        _many_cotangents,
    )
}


def _agrees_under(transform):
    def holds(spec, case, device):
        call = Call(spec, case, device)
        assert_close(
            transform(call.op(), *call.tensors()), transform(call.reference(), *call.tensors())
        )

    return holds


for _name, _transform in TRANSFORMS.items():
    PROPERTIES[_name] = Property(_name, _agrees_under(_transform), "first")


@holds_for("first")
def vmap_each(spec, case, device):
    """vmap over each row-wise or differentiable argument alone, then over all rows together."""
    call = Call(spec, case, device)
    for name in dict.fromkeys(call.rows + call.wrt):
        _vmap_agrees(call, (name,), 0)
    if len(call.rows) > 1:
        _vmap_agrees(call, call.rows, 0)
    _vmap_agrees(call, call.rows or call.wrt, -1)


def _vmap_agrees(call: Call, names, dim: int) -> None:
    values = [call.arguments[n] for n in names]
    batch = [torch.stack([t, t.flip(0) if t.dim() else t], dim) for t in values]
    op, reference = call.of(call.spec.op, names), call.of(call.spec.reference, names)
    one_by_one = [reference(*(b.select(dim, i) for b in batch)) for i in range(2)]
    expected = tuple(torch.stack(parts) for parts in zip(*one_by_one, strict=True))
    assert_close(vmap(op, dim)(*batch), expected)


@holds_for("first")
def reference_backend(spec, case, device):
    """Without kernels the same transforms hold."""
    call = Call(spec, case, device)
    with using("reference"):
        for transform in TRANSFORMS.values():
            expected = transform(call.reference(), *call.tensors())
            assert_close(transform(call.op(), *call.tensors()), expected)
