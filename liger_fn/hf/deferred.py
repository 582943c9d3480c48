"""Fused linear cross entropy without a copied forward: logits that are not computed yet.

While a model computes a loss, its output head returns a `Deferred` instead of logits. The model's
own code runs on it: it shifts, slices, reshapes, scales, soft-caps and casts it, and each of these
is only written down. When it reaches `F.cross_entropy`, the head is called a second time, now with
the targets, and runs the fused op where its weight is at hand: inside its own hooks (FSDP, ZeRO-3,
offloading). A sum waits for what divides it (`DeferredSum`). Whatever is asked of a `Deferred` that
it does not understand, it answers as the real logits would. How the head comes to return one is in
`output_head.py`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from liger_fn import functional
from liger_fn.functional.core.rules import autocast_dtype

# Where logits are needed after all, but only to be summed up: 256 MiB of 128k float32 logits.
_ROWS_AT_ONCE = 512


def _recorded(method: Callable) -> Callable:
    """Write an operation down; if the logits exist and were written to, apply it to them."""

    @functools.wraps(method)
    def operation(self, *args, **kwargs):
        if self.written_to():
            return getattr(self.value, method.__name__)(*args, **kwargs)
        return method(self, *args, **kwargs)

    return operation


class Circumstances(NamedTuple):
    """Under what a head was called, so that the same comes out when it is called later.

    Args:
        grad: whether autograd was on.
        device: the type of the device.
        autocast: the dtype that autocast gives a matrix product, None if it was off.
        versions: the head's parameters, and how often each had been written to.
    """

    grad: bool
    device: str
    autocast: torch.dtype | None
    versions: tuple[tuple[torch.Tensor, int], ...]

    @classmethod
    def now(cls, head: nn.Module | None, hidden: torch.Tensor) -> Circumstances:
        kept = () if head is None or torch.compiler.is_compiling() else _parameters(head)
        versions = tuple([(p, p._version) for p in kept if not p.is_inference()])
        device = hidden.device.type
        return cls(torch.is_grad_enabled(), device, autocast_dtype(device), versions)

    def again(self) -> contextlib.AbstractContextManager:
        if autocast_dtype(self.device) == self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device, self.autocast, enabled=self.autocast is not None)


def _parameters(module: nn.Module) -> Collection[torch.Tensor]:
    """All parameters; `module.parameters()` takes several times as long where there are few."""
    if module._modules:
        return list(module.parameters())
    return [p for p in module._parameters.values() if p is not None]


class Lazy:
    """What stands for a tensor, and becomes one as soon as somebody needs it."""

    def materialize(self) -> torch.Tensor:
        """Compute the tensor."""
        raise NotImplementedError

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.materialize(), name)

    def __array__(self, dtype=None, copy=None):
        array = self.materialize().__array__(dtype)
        return array.copy() if copy else array

    def __reduce_ex__(self, protocol):
        # Saved and copied are the numbers; not the head.
        return self.materialize().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        named = {name: real_values(value) for name, value in (kwargs or {}).items()}
        return function(*real_values(args), **named)


def _as_a_tensor_does(name: str) -> Callable:
    def operator(self, *args):
        return getattr(self.materialize(), name)(*map(real_values, args))

    return operator


# Python looks these up on the class, not through __getattr__.
for _name in (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "mod"),
    *("pow", "rpow", "matmul", "rmatmul", "neg", "abs", "eq", "ne", "lt", "le", "gt", "ge"),
    *("iter", "bool", "float", "int"),
):
    setattr(Lazy, f"__{_name}__", _as_a_tensor_does(f"__{_name}__"))
Lazy.__hash__ = object.__hash__  # type: ignore[method-assign]


def real_values(value: Any) -> Any:
    """Replace everything lazy in nested lists and tuples by its tensor."""
    if isinstance(value, Lazy):
        return value.materialize()
    if type(value) in (list, tuple):
        return type(value)(map(real_values, value))
    return value


class _SaysWhatToDo(type):
    """Libraries name the class of what they cannot take: so their errors say what to do."""

    def __repr__(cls) -> str:
        return (
            f"<class '{cls.__module__}.{cls.__name__}': logits that are not computed yet; for a "
            "tensor call its materialize(), or the model with skip_logits=False>"
        )


class Deferred(Lazy, metaclass=_SaysWhatToDo):
    """Logits that are not computed yet.

    z = head(hidden)[..., :vocab], or hidden[..., :vocab] if `head` is None
    value = cap * tanh(scale * z) if a cap was recorded, else scale * z

    Args:
        head: the output head, or None if `hidden` are logits already.
        hidden: (..., H) what the head is applied to.
        vocab: V, the number of logits that are kept of each row.
        scale, cap: the elementwise operations recorded so far.
        dtype: of the value.
        born: under what the head was called.
    """

    layout, is_sparse, is_quantized, is_nested = torch.strided, False, False, False

    def __init__(self, head, hidden, vocab, scale=1.0, cap=None, dtype=None, born=None):
        self.head, self.hidden, self.vocab = head, hidden, vocab
        self.scale, self.cap = scale, cap
        self.born = born or Circumstances.now(head, hidden)
        self.dtype = dtype or (head is not None and self.born.autocast) or hidden.dtype
        self.shape = torch.Size((*hidden.shape[:-1], vocab))
        self.value, self.version, self.has_graph = None, 0, False

    def _with(self, hidden=None, vocab=None, scale=None, cap=None, dtype=None):
        return Deferred(
            self.head,
            self.hidden if hidden is None else hidden,
            self.vocab if vocab is None else vocab,
            self.scale if scale is None else scale,
            self.cap if cap is None else cap,
            dtype or self.dtype,
            self.born,
        )

    # What can be known without computing anything.

    device = property(lambda self: self.hidden.device)
    ndim = property(lambda self: len(self.shape))

    @property
    def requires_grad(self):
        weights = () if self.head is None else _parameters(self.head)
        return self.born.grad and any(t.requires_grad for t in (self.hidden, *weights))

    def size(self, dim=None):
        return self.shape if dim is None else self.shape[dim]

    def dim(self):
        return len(self.shape)

    def numel(self):
        return self.shape.numel()

    def is_floating_point(self):
        return True

    def __len__(self):
        return self.shape[0]

    # What is written down.

    @_recorded
    def __mul__(self, other):
        if not isinstance(other, (int, float)):
            return self.materialize() * other
        if self.cap is None:
            return self._with(scale=self.scale * other)
        return self._with(cap=self.cap * other)

    __rmul__ = __mul__

    @_recorded
    def __truediv__(self, other):
        if not isinstance(other, (int, float)):
            return self.materialize() / other
        return self * (1.0 / other)

    @_recorded
    def tanh(self):
        return self._with(cap=1.0) if self.cap is None else self.materialize().tanh()

    @_recorded
    def float(self):
        return self._with(dtype=torch.float32)

    @_recorded
    def to(self, *args, **kwargs):
        given = (*args, kwargs.get("dtype"), kwargs.get("device"))
        if any(_is_elsewhere(a, self.device) for a in given):
            return self.materialize().to(*args, **kwargs)
        like = (a.dtype if isinstance(a, torch.Tensor) else a for a in given)
        dtype = next((a for a in like if isinstance(a, torch.dtype)), self.dtype)
        return self._with(dtype=dtype)

    def contiguous(self, **_):
        return self

    @_recorded
    def reshape(self, *shape):
        if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
            shape = tuple(shape[0])
        rows = math.prod(shape[:-1])
        keeps_rows = shape and (
            shape[-1] == self.vocab or (shape[-1] == -1 and rows * self.vocab == self.numel())
        )
        if not keeps_rows:
            return self.materialize().reshape(*shape)
        return self._with(hidden=self.hidden.reshape(*shape[:-1], self.hidden.shape[-1]))

    view = reshape

    @_recorded
    def __getitem__(self, index):
        parts = index if isinstance(index, tuple) else (index,)
        if Ellipsis in [part for part in parts if not isinstance(part, torch.Tensor)]:
            at = next(i for i, part in enumerate(parts) if part is Ellipsis)
            missing = self.dim() - (len(parts) - 1)
            parts = parts[:at] + (slice(None),) * missing + parts[at + 1 :]
        if len(parts) > self.dim() or not all(isinstance(part, (slice, int)) for part in parts):
            return self.materialize()[index]
        last = parts[-1] if len(parts) == self.dim() else slice(None)
        if isinstance(last, int) or last.start not in (None, 0) or last.step not in (None, 1):
            return self.materialize()[index]
        return self._with(
            hidden=self.hidden[parts[: self.dim() - 1]], vocab=len(range(self.vocab)[last])
        )

    # Where it ends.

    def cross_entropy(
        self, target, weight=None, size_average=None, ignore_index=-100, reduce=None,
        reduction="mean", label_smoothing=0.0,
    ):  # fmt: skip
        """`F.cross_entropy` of the logits, by the fused op if that can do it."""
        options = {"ignore_index": ignore_index, "reduction": reduction}
        options["label_smoothing"] = label_smoothing
        is_old_style = size_average is not None or reduce is not None
        if is_old_style or target.is_floating_point() or not self._is_fusable():
            z = self.materialize()
            return F.cross_entropy(z, target, weight, size_average, reduce=reduce, **options)
        options.update(class_weight=weight, **self._scaling())
        if self.head is None:
            return functional.cross_entropy(self.hidden[..., : self.vocab], target, **options)
        loss = {"op": "cross_entropy", "vocab": self.vocab, **options}
        # Only in the model's own code: what users get from F.cross_entropy is a tensor.
        if reduction == "sum" and getattr(self.head, "_liger_loss", None) is not None:
            return DeferredSum(self, target, loss)
        return self.call_head(target=target, loss=loss)

    def logprobs(self, target, *, chunk_size=None, **options):
        """`functional.logprobs` of the logits, by the fused op if that can do it."""
        if not self._is_fusable():
            return functional.logprobs(self.materialize(), target, **options)
        options.update(self._scaling())
        if self.head is None:
            return functional.logprobs(self.hidden[..., : self.vocab], target, **options)
        loss = {"op": "logprobs", "vocab": self.vocab, "chunk_size": chunk_size, **options}
        return self.call_head(target=target, loss=loss)

    def rows(self, mask):
        """The logits of the rows in a boolean mask, (N, V), which are not computed either."""
        if self.written_to():
            return self.value[mask]
        return self._with(hidden=self.hidden[mask])

    @torch.no_grad()
    def sum_of_means(self):
        """The mean logit of each row, summed over the rows; a constant."""
        wide = torch.promote_types(self.hidden.dtype, torch.float32)
        if self.cap is None and len(self):
            # Linear: what it makes of the mean row is the mean of what it makes of all rows.
            mean = self.hidden.mean(0, keepdim=True, dtype=wide).to(self.hidden.dtype)
            return self._with(hidden=mean).materialize().to(wide).mean() * len(self)
        parts = (self._with(hidden=few) for few in self.hidden.split(_ROWS_AT_ONCE))
        return sum(part.materialize().to(wide).mean(-1).sum() for part in parts)

    def _scaling(self):
        # softcap * tanh(logit_scale * z / softcap) is how the ops write cap * tanh(scale * z).
        scale = self.scale if self.cap is None else self.scale * self.cap
        return {"softcap": self.cap, "logit_scale": scale}

    def call_head(self, **kwargs):
        if torch.is_grad_enabled() and not self.born.grad:
            with torch.no_grad():
                return self.call_head(**kwargs)
        if self._head_has_changed():
            raise RuntimeError(
                "logits: `outputs.logits` must be read before the output head changes; got a head "
                "with other weights, after an optimizer step or outside of functional_call for "
                "example (call the model with skip_logits=False for logits that last)."
            )
        with self.born.again():
            return nn.Module.__call__(self.head, self.hidden, **kwargs)

    def _is_fusable(self):
        return self.dim() == 2 and (self.cap is None or self.cap > 0) and not self.written_to()

    def _head_has_changed(self):
        # Sharded and gathered parameters are other objects with the same numbers; those of
        # torch.func.functional_call are no nn.Parameter, and have other numbers.
        return any(
            p._version != version or not (isinstance(p, nn.Parameter) or self._head_has(p))
            for p, version in self.born.versions
        )

    def _head_has(self, p):
        return any(p is known for known in self.head.parameters())

    def materialize(self) -> torch.Tensor:
        """Compute the logits; once, unless that was without a graph and one is wanted now."""
        wants_graph = self.born.grad and torch.is_grad_enabled()
        if self.value is None or (wants_graph and not self.has_graph and not self.written_to()):
            with torch.set_grad_enabled(wants_graph):
                self.value = self._compute()
            self.version, self.has_graph = self.value._version, wants_graph
        return self.value

    def _compute(self):
        z = self.hidden if self.head is None else self.call_head()
        z = z[..., : self.vocab]
        z = z if self.scale == 1 else z * self.scale
        z = z if self.cap is None else torch.tanh(z) * self.cap
        return z.to(self.dtype)

    def written_to(self) -> bool:
        return self.value is not None and self.value._version != self.version

    def __setitem__(self, index, value):
        self.materialize()[index] = value

    def __repr__(self):
        return f"Deferred(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if args and isinstance(args[0], cls):
            if function is F.cross_entropy:
                return args[0].cross_entropy(*args[1:], **(kwargs or {}))
            if function in (torch.tanh, torch.Tensor.tanh):
                return args[0].tanh()
        return super().__torch_function__(function, types, args, kwargs)


class DeferredSum(Lazy):
    """A sum of losses that waits for what divides it.

    The op makes gradients in the forward pass, for an upstream gradient of 1. That of a sum which
    is divided is another, and would be multiplied into all of dweight; a mean has the division in
    its gradients already.

    Args:
        logits: of which it is the loss.
        target, loss: what the head is called with.
    """

    def __init__(self, logits: Deferred, target: torch.Tensor, loss: dict[str, Any]):
        self.logits, self.target, self.loss = logits, target, loss
        self.device, self.value = logits.device, None

    def __truediv__(self, items):
        if self.value is not None or not _is_count(items):
            return self.materialize() / items
        loss = {**self.loss, "reduction": "mean", "num_items": items}
        return self.logits.call_head(target=self.target, loss=loss)

    def materialize(self):
        if self.value is None:
            self.value = self.logits.call_head(target=self.target, loss=self.loss)
        return self.value


def _is_elsewhere(place: Any, device: torch.device) -> bool:
    """Say whether an argument of `Tensor.to` asks for another device."""
    if isinstance(place, torch.Tensor):
        place = place.device
    elif isinstance(place, str | int) and not isinstance(place, bool):
        place = torch.device(place)
    # Without an index it is the current one, which need not be that of the logits.
    return isinstance(place, torch.device) and place != device


def _is_count(items: Any) -> bool:
    """Say whether a mean may divide by it, and is then what the quotient would be."""
    if isinstance(items, torch.Tensor):
        stays_float32 = torch.promote_types(items.dtype, torch.float32) == torch.float32
        return items.dim() == 0 and stays_float32 and not items.requires_grad
    return isinstance(items, int | float) and items > 0
