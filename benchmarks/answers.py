"""Is a peer's answer right? Results and gradients are compared with the op's meaning in float64."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import Inputs
from liger_fn.testing.spec import OpSpec, results

Answer = dict[str, Tensor]

# Right is within about ten roundings of the dtype, in the norm of the whole tensor: room for peers
# that round every step or add gradients in bf16, none for a missing term.
LIMITS = {
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
    torch.float32: 1e-4,
    torch.float64: 1e-10,
}

_ALONE = " without grad"

# The most float64 logits that the reference holds at once.
_SLICE = 2**27


def answer(inputs: Inputs, call: Callable[..., Any]) -> Answer:
    """The results and gradients of `call`, by name."""
    outputs = inputs.forward(call)
    return _named(inputs, outputs, inputs.backward(outputs))


def answer_without_grad(inputs: Inputs, call: Callable[..., Any]) -> Answer:
    """The results of a call that no gradient will follow: some have kernels of their own for it."""
    with torch.no_grad():
        outputs = results(call(**inputs.detached))
    return {f"result {i}{_ALONE}": t for i, t in enumerate(outputs)}


def exact(spec: OpSpec, inputs: Inputs) -> Answer:
    """The same of the reference, in float64 on the very same numbers."""
    if "reduction" in inspect.signature(spec.reference).parameters:
        return _exact_loss(spec, inputs)
    wide = {name: _widen(value) for name, value in inputs.arguments.items()}
    leaves = [wide[name].requires_grad_() for name in inputs.grads]
    outputs = results(spec.reference(**wide))
    cotangents = [_widen(t) for t in inputs.cotangents]
    return _named(inputs, outputs, torch.autograd.grad(outputs, leaves, cotangents))


def _exact_loss(spec: OpSpec, inputs: Inputs) -> Answer:
    """Over slices of rows, added up: all of the logits in float64 may not fit."""
    arguments = inputs.detached
    mean = arguments.pop("reduction", "mean") in ("mean", "batchmean")
    by_row = [name for name in spec.rows if isinstance(arguments.get(name), Tensor)]
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    rows, step = arguments[by_row[0]].shape[0], max(1, _SLICE // max(max(t.shape) for t in tensors))

    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    gradients = {name: torch.zeros_like(t) for name, t in _wanted(inputs, by_row).items()}
    for start in range(0, rows, step):
        here = slice(start, start + step)
        part = {n: _widen(t[here] if n in by_row else t) for n, t in arguments.items()}
        leaves = [part[name].requires_grad_() for name in inputs.grads]
        loss = spec.reference(**part, reduction="sum")
        for name, gradient in zip(inputs.grads, torch.autograd.grad(loss, leaves), strict=True):
            (gradients[name][here] if name in by_row else gradients[name]).add_(gradient)
        total += loss.detach()

    for t in (total, *gradients.values()):
        t /= _counted(arguments, by_row, rows) if mean else 1
    return _named(inputs, (total,), gradients.values())


def _wanted(inputs: Inputs, by_row: list[str]) -> dict[str, Tensor]:
    """What the gradients look like: in float32 where rows are written once, else in float64."""
    return {
        name: leaf.detach().to(torch.float32 if name in by_row else torch.float64)
        for name, leaf in zip(inputs.grads, inputs.leaves, strict=True)
    }


def _counted(arguments: dict[str, Any], by_row: list[str], rows: int) -> Tensor | int:
    """How many rows a mean divides by: those not ignored, if there are targets that say so."""
    targets = [arguments[n] for n in by_row if not arguments[n].is_floating_point()]
    return (targets[0] != arguments.get("ignore_index", -100)).sum() if targets else rows


def worst(got: Answer, want: Answer) -> tuple[str, float]:
    """The part with the largest error, relative in norm; infinite for NaN and a wrong shape."""
    errors = {name: _error(got[name], want[name.removesuffix(_ALONE)]) for name in got}
    name = max(errors, key=errors.__getitem__)
    return name, errors[name]


def _error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    distance = torch.linalg.vector_norm(got.float() - want.float())
    size = torch.linalg.vector_norm(want.float())
    error = (distance / size if size > 0 else distance).item()
    return error if error == error else float("inf")


def _named(inputs: Inputs, outputs: Any, gradients: Any) -> Answer:
    parts = {f"result {i}": t.detach() for i, t in enumerate(outputs)}
    return parts | {f"d{n}": t for n, t in zip(inputs.grads, gradients, strict=True)}


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double()
    return value
