"""Numbers: accuracy, purity, determinism, memory layouts, unwritten memory."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from liger_fn.functional.core.launch import accumulator, interpreted
from liger_fn.testing.call import (
    Call,
    assert_close,
    assert_same_bits,
    cotangents_like,
    fresh_memory,
    gradients,
    in_float64,
    is_tensor,
)
from liger_fn.testing.properties.registry import holds_for
from liger_fn.testing.spec import results


@contextlib.contextmanager
def _whole_float32() -> Iterator[None]:
    """Let cuDNN multiply float32 as it is: by default its algorithms differ in that."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@holds_for("cases and sizes")
@_whole_float32()
def accuracy(spec, case, device):
    """Results and gradients err at most slack times as much as the baseline in the same dtype."""
    in_float32: dict[str, float] = {}
    for dtype in _dtypes(spec, case, device):
        call = Call(spec, case, device, dtype)
        with fresh_memory(full_of_nan=True):
            outputs, grads = gradients(call.op(), call.tensors(requires_grad=True))
        given = cotangents_like(outputs)
        baseline = _of_baseline(call, given)
        exact = _exact(call, given)

        names = [f"result {i}" for i in range(len(outputs))] + [f"d{n}" for n in call.wrt]
        # Where the terms of a gradient cancel, their rounding remains, of the cotangent's size.
        sizes = [0.0] * len(outputs) + [_norm(given)] * len(grads)
        slack = spec.slack.get(dtype, 1.0)
        for name, a, b, truth, size in zip(
            names, outputs + grads, baseline, exact, sizes, strict=True
        ):
            cancelled = 16 * torch.finfo(accumulator(a.dtype)).eps * size
            theirs = _error(b, truth)
            if dtype is torch.float32:
                in_float32[name] = theirs
            elif dtype is torch.float64:
                # The truth is rounded as the baseline is, which seems to err less than it does: as
                # in float32, in other units.
                units = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
                theirs = max(theirs, units * in_float32[name])
            _compare(f"{name}, {dtype}", a, theirs, truth, slack, cancelled)


def _dtypes(spec, case, device) -> tuple[torch.dtype, ...]:
    if device.type == "cpu" and case not in spec.cases:
        # The interpreter needs seconds for the large sizes, and the cases have shown every dtype.
        return torch.float32, torch.bfloat16
    return torch.float32, torch.bfloat16, torch.float16, torch.float64


def _of_baseline(call: Call, given) -> tuple[Tensor, ...]:
    tensors = call.tensors(requires_grad=True)
    outputs = call.of(call.spec.baseline or call.spec.reference)(*tensors)
    # It may answer in another dtype than we do.
    given = [c.to(o.dtype) for c, o in zip(given, outputs, strict=True)]
    return outputs + torch.autograd.grad(outputs, tensors, given)


def _exact(call: Call, given) -> tuple[Tensor, ...]:
    """The reference in float64, of the very inputs and cotangents."""
    arguments = {n: in_float64(a) for n, a in call.arguments.items()}
    tensors = [arguments[n].detach().requires_grad_() for n in call.wrt]
    outputs = results(
        call.spec.reference(**{**arguments, **dict(zip(call.wrt, tensors, strict=True))})
    )
    return outputs + torch.autograd.grad(outputs, tensors, [c.double() for c in given])


def _compare(
    what: str, a: Tensor, theirs: float, truth: Tensor, slack: float, cancelled: float
) -> None:
    assert a.shape == truth.shape, f"{what}: shape {tuple(a.shape)}, not {tuple(truth.shape)}"
    assert torch.equal(a.isnan(), truth.isnan()), f"{what}: NaN in other places"
    error = _error(a, truth)
    size = _norm([truth.nan_to_num(nan=0.0)])
    rounding = _rounding(a.dtype) * size
    if a.dtype is torch.float64:
        # The baseline is as good as the truth, which errs like us: slack is in that error.
        rounding *= slack
    allowed = slack * theirs + rounding + cancelled
    assert error <= allowed, (
        f"{what}: error {error:.2e} where {allowed:.2e} is allowed (baseline {theirs:.2e}, "
        f"norm {size:.2e})"
    )


def _error(t: Tensor, truth: Tensor) -> float:
    return _norm([(t.double() - truth).nan_to_num(nan=0.0)])


def _norm(tensors) -> float:
    return sum(float(t.detach().double().norm()) ** 2 for t in tensors) ** 0.5


def _rounding(dtype: torch.dtype) -> float:
    """The relative error that rounding costs when everything else is exact."""
    eps = torch.finfo(dtype).eps
    if dtype is torch.bfloat16 and interpreted():
        return eps  # Triton's interpreter truncates float32 to bfloat16
    if dtype is torch.float64:
        return 8 * eps  # a few operations in this very type, of ours and of the truth
    if accumulator(dtype) is dtype:
        return 4 * eps  # a few operations in this very type
    return eps / 2  # one rounding to nearest


@holds_for("cases")
def purity(spec, case, device):
    """What is passed keeps its bits and its version; no answer shares memory with anything.

    Only gradients that are one tensor in PyTorch's own sum may be one here.
    """
    call = Call(spec, case, device, torch.float32)
    tensors = call.tensors(requires_grad=True)
    given = cotangents_like(call.op()(*tensors))
    passed = [a for a in call.arguments.values() if is_tensor(a)] + [*tensors, *given]
    before, versions = [t.detach().clone() for t in passed], [t._version for t in passed]

    outputs, grads = gradients(call.op(), tensors, given)

    assert_same_bits(passed, before, "an argument or cotangent")
    assert [t._version for t in passed] == versions, "an argument or cotangent was written"
    own = gradients(call.reference(), call.tensors(requires_grad=True), given)
    shared = _sharing(outputs + grads) - _sharing(sum(own, ()))
    assert not shared, f"two answers share memory: {shared}"
    assert not set(_memory(outputs + grads)) & set(_memory(passed)), (
        "an answer shares memory with an argument"
    )


def _memory(tensors) -> list[int]:
    return [t.untyped_storage().data_ptr() for t in tensors if t.numel()]


def _sharing(tensors) -> set[tuple[int, int]]:
    """The pairs of tensors, by position, that lie in the same memory."""
    full = [(i, t.untyped_storage().data_ptr()) for i, t in enumerate(tensors) if t.numel()]
    return {(i, j) for i, a in full for j, b in full if i < j and a == b}


@holds_for("cases")
def determinism(spec, case, device):
    """Twice the same call, and twice the same backward pass, give the same bits."""
    call = Call(spec, case, device, torch.float32)
    once, again = (gradients(call.op(), call.tensors(requires_grad=True)) for _ in range(2))
    assert_same_bits(sum(again, ()), sum(once, ()), "a second call")

    tensors = call.tensors(requires_grad=True)
    outputs = call.op()(*tensors)
    given = cotangents_like(outputs)
    for _ in range(2):
        grads = torch.autograd.grad(outputs, tensors, given, retain_graph=True)
        assert_same_bits(grads, once[1], "a second backward pass")


def _transposed(t: Tensor) -> Tensor:
    """The same values, the first dimension varying fastest."""
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def _sliced(t: Tensor) -> Tensor:
    """The same values, every second element of memory that is otherwise NaN."""
    wide = t.new_empty((*t.shape, 2)).fill_(float("nan") if t.is_floating_point() else -1)
    wide[..., 1] = t
    return wide[..., 1]


def _expanded(t: Tensor) -> Tensor:
    """One row, seen as many: stride zero."""
    return t[:1].expand_as(t) if t.dim() and t.numel() else t


@holds_for("cases")
def strides(spec, case, device):
    """Any memory layout of arguments and cotangents gives the values of the contiguous one."""
    call = Call(spec, case, device)
    outputs = call.op()(*call.tensors())
    for layout in (_transposed, _sliced, _expanded):
        given = [layout(c) for c in cotangents_like(outputs)]
        laid_out = call.where(**{n: layout(a) for n, a in call.arguments.items() if is_tensor(a)})
        got = gradients(laid_out.op(), laid_out.tensors(requires_grad=True), given)

        dense = laid_out.where(
            **{n: a.contiguous() for n, a in laid_out.arguments.items() if is_tensor(a)}
        )
        given = [c.contiguous() for c in given]
        assert_close(got, gradients(dense.op(), dense.tensors(requires_grad=True), given))


@holds_for("cases")
def unwritten_memory(spec, case, device):
    """What was in fresh memory has no influence: full of NaN, it gives the same bits."""
    call = Call(spec, case, device, torch.float32)

    def run(full_of_nan: bool) -> tuple[Tensor, ...]:
        with fresh_memory(full_of_nan):
            return sum(gradients(call.op(), call.tensors(requires_grad=True)), ())

    assert_same_bits(run(True), run(False), "fresh memory full of NaN")
