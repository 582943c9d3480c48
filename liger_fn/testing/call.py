"""One call of an op, prepared: its arguments, what to differentiate, how answers are compared."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from liger_fn.testing.spec import Case, Draw, OpSpec, results


def is_tensor(a: Any) -> bool:
    return isinstance(a, Tensor)


def is_float(a: Any) -> bool:
    return is_tensor(a) and a.is_floating_point()


def in_float64(a: Any) -> Any:
    return a.double() if is_float(a) else a


class Call:
    """The arguments of a case on a device; in float64, unless said otherwise, all that float."""

    def __init__(
        self,
        spec: OpSpec,
        case: Case,
        device: torch.device | str,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        arguments = case.make(Draw(device, dtype))
        if dtype is torch.float64:
            arguments = {n: in_float64(a) for n, a in arguments.items()}
        self.spec, self.arguments = spec, arguments
        self.wrt = tuple(n for n in spec.grads if is_float(arguments.get(n)))
        self.rows = tuple(n for n in spec.rows if is_tensor(arguments.get(n)))

    def where(self, **changes: Any) -> "Call":
        """The same call with other arguments."""
        call = copy.copy(self)
        call.arguments = {**self.arguments, **changes}
        return call

    def tensors(self, requires_grad: bool = False) -> tuple[Tensor, ...]:
        """Fresh leaves with the values, and the memory, of the differentiable arguments."""
        return tuple(self.arguments[n].detach().requires_grad_(requires_grad) for n in self.wrt)

    def of(self, f: Callable, names: Sequence[str] | None = None) -> Callable[..., tuple]:
        """`f` as a function of the arguments `names` (the differentiable ones), giving a tuple."""
        arguments, names = self.arguments, tuple(self.wrt if names is None else names)

        def function(*tensors):
            return results(f(**{**arguments, **dict(zip(names, tensors, strict=True))}))

        return function

    def op(self) -> Callable[..., tuple]:
        return self.of(self.spec.op)

    def reference(self) -> Callable[..., tuple]:
        return self.of(self.spec.reference)

    def resized(self, n: int) -> "Call":
        """The same call with `n` rows: the first size of every `rows` argument, repeated or cut."""
        rows = {m: self.arguments[m] for m in self.rows}
        return self.where(
            **{m: t[torch.arange(n, device=t.device) % len(t)] for m, t in rows.items()}
        )


def loss(f: Callable[..., tuple]) -> Callable[..., Tensor]:
    """A scalar of all results, with a derivative of every order."""

    def scalar(*tensors):
        return sum(r.sin().sum() for r in f(*tensors))

    return scalar


def cotangents_like(outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(o.shape, generator=generator).to(o) for o in outputs)


def gradients(
    f: Callable[..., tuple], tensors: Sequence[Tensor], cotangents: Sequence[Tensor] | None = None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The results of `f`, detached, and the gradients of `tensors`, which require grad."""
    outputs = f(*tensors)
    given = cotangents_like(outputs) if cotangents is None else cotangents
    return tuple(o.detach() for o in outputs), torch.autograd.grad(outputs, tensors, given)


def assert_close(got: Any, expected: Any, rtol: float = 1e-9) -> None:
    """Compare, in float64 unless said otherwise.

    Two orders of summation differ by far less than 1e-9, and wrong formulas by more.
    """
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol, equal_nan=True)


def bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(torch.uint8) if t.dim() else bits(t.detach()[None])


def assert_same_bits(got: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{what}: tensor {i} has another type"
        assert torch.equal(bits(a), bits(b)), f"{what}: tensor {i} has other bits"


@contextlib.contextmanager
def fresh_memory(full_of_nan: bool) -> Iterator[None]:
    """Choose what `torch.empty` and its kin return within the block: NaN, or what was there."""
    settings: Any = torch.utils.deterministic
    was = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(full_of_nan, warn_only=True)
    settings.fill_uninitialized_memory = full_of_nan
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)
        settings.fill_uninitialized_memory = filled


class Recorder(TorchDispatchMode):
    """Notes every call of an op of this package that reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "liger_fn":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def dispatched(call: Call) -> list[tuple[Any, tuple]]:
    """The dispatcher ops behind a public call, forward and backward, with their arguments."""
    with Recorder() as recorder:
        gradients(call.op(), call.tensors(requires_grad=True))
    return recorder.calls


def forward_ops(call: Call) -> set:
    """The dispatcher ops of the forward pass."""
    ops = {op for op, _ in dispatched(call) if not op.__name__.endswith("_bwd.default")}
    assert ops, "no op reached the dispatcher"
    return ops
