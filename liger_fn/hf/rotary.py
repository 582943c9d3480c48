"""The op `rope` in the place of a modelling file's rotary function.

The function is reached through the globals of the file that calls it, so its replacement serves
every model of that file in the process. It is therefore the original with a guard in front: calls
that were proved go to the op, all others (part of a head, no keys, learned angles, unknown
arguments) to the original. It is taken away when the last model that asked for it is.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from liger_fn import functional
from liger_fn.hf.probe import BF16, F32, TOLERANCE, Rejected, distance, quiet

# How a rotary function turns pairs. `weave`: pairs lie next to each other in the input and half a
# head apart in the output (DeepSeek). `backwards`: in the other direction (nanochat).
FORMS: tuple[dict[str, bool], ...] = (
    {},
    {"interleaved": True},
    {"weave": True},
    {"backwards": True},
)
# How the angles, one per pair, are laid out in cos and sin (all twice, each twice, or once), and
# how to get them back.
ANGLES: dict[str, tuple[Callable, Callable]] = {
    "halves": (lambda a: torch.cat([a, a], -1), lambda c: c[..., : c.shape[-1] // 2]),
    "pairs": (lambda a: a.repeat_interleave(2, -1), lambda c: c[..., ::2]),
    "once": (lambda a: a, lambda c: c),
}
# What a rotary function may take first; the rest of its arguments may be anything.
ONE, ONE_SIN_FIRST = ("x", "cos", "sin"), ("tensor", "sin", "cos")
BOTH, BOTH_COMPLEX = ("q", "k", "cos", "sin"), ("xq", "xk", "freqs_cis")
TAKES = (ONE, ONE_SIN_FIRST, BOTH, BOTH_COMPLEX)
BATCH, TOKENS, HEADS, KV_HEADS, WIDTH = 2, 5, 4, 2, 16


# What decides whether the op may serve a call: its unsqueeze_dim, whether only a part of the head
# is rotated, whether the angles have another dtype. A plain tuple: compiled code looks it up.
Call = tuple[int | None, bool, bool]


@dataclass(frozen=True)
class Form:
    """How to write a rotary function with the op `rope`."""

    options: dict[str, bool]
    angles: str
    promotes: bool
    takes: tuple[str, ...]

    def __call__(self, layout: str, cos: torch.Tensor, sin: torch.Tensor, *xs: Any) -> Any:
        """Rotate one or two tensors; return what the original function returns."""
        rotated = cos.shape[-1] * self.features
        if self.is_adapted or (self.promotes and cos.dtype != xs[0].dtype):
            cos, sin, *xs = self._adapted(rotated, cos, sin, *xs)
        q, k = xs if len(xs) == 2 else (*xs, None)
        return functional.rope(
            q, k, cos, sin, rotary_dim=rotated, interleaved=self.is_interleaved, layout=layout
        )

    def _adapted(self, rotated: int, cos: torch.Tensor, sin: torch.Tensor, *xs: Any) -> tuple:
        """Turn the arguments into those of the op."""
        if self.has_other_angles:
            cos, sin = (ANGLES[self.angles][1](c) for c in (cos, sin))
        if "backwards" in self.options:
            sin = -sin
        if self.promotes:
            xs = tuple(x.to(torch.promote_types(x.dtype, cos.dtype)) for x in xs)
        if "weave" in self.options:
            xs = tuple(_halves_apart(x, rotated) for x in xs)
        return cos, sin, *xs

    # Asked in every layer, hence kept.

    @functools.cached_property
    def features(self) -> int:
        """How many features of a head an entry of cos rotates."""
        return 2 if self.angles == "once" else 1

    @functools.cached_property
    def is_interleaved(self) -> bool:
        return "interleaved" in self.options

    @functools.cached_property
    def has_other_angles(self) -> bool:
        return self.angles != ("pairs" if self.is_interleaved else "halves")

    @functools.cached_property
    def is_adapted(self) -> bool:
        return self.has_other_angles or "backwards" in self.options or "weave" in self.options

    def original(self, function: Callable, cos: Any, sin: Any, *xs: Any, **extra: Any) -> Any:
        """Call the rotary function with its arguments in its order."""
        if self.takes == BOTH_COMPLEX:
            return function(*xs, torch.complex(cos.float(), sin.float()), **extra)
        angles = (sin, cos) if self.takes == ONE_SIN_FIRST else (cos, sin)
        return function(*xs, *angles, **extra)


@dataclass(frozen=True)
class Domain:
    """A form, the layout of each call for which it equals the original, the largest distances."""

    form: Form
    calls: dict[Call, str]
    error32: float
    error16: float

    @property
    def how(self) -> str:
        options = [f"{name}={value}" for name, value in self.form.options.items()]
        return f"rope({', '.join(options)})"

    def layout(self, unsqueeze_dim: Any, cos: Any, sin: Any, *xs: Any) -> str | None:
        """The layout of a call, or None if nothing was proved about it. Called in every layer."""
        if cos is None or sin is None:
            return None
        size = cos.shape
        # Learned angles: the op would compute in plain PyTorch, as the original does.
        if len(size) != 3 or sin.shape != size or cos.requires_grad or sin.requires_grad:
            return None
        batch, tokens, angles = size
        rotated, dtype, width = angles * self.form.features, xs[0].dtype, xs[0].shape[-1]
        layout = self.calls.get((unsqueeze_dim, rotated < width, cos.dtype != dtype))
        if layout is None or rotated > width:
            return None
        at = 1 if layout == "bthc" else 2
        for x in xs:
            if x is None:
                return None
            size = x.shape
            if len(size) != 4 or size[3] != width or x.dtype != dtype:
                return None
            if size[at] != tokens or (batch != 1 and batch != size[0]):
                return None
        return layout


def rotary_functions(model: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Find the global names of rotary functions that the forwards of a model refer to."""
    found = {}
    for cls in dict.fromkeys(type(module) for module in model.modules()):
        forward: Any = inspect.unwrap(cls.forward)
        for name in getattr(getattr(forward, "__code__", None), "co_names", ()):
            named = ("rotary" in name or "rope" in name) and name in forward.__globals__
            if named and _is_function(forward.__globals__[name]):
                found[id(forward.__globals__), name] = forward.__globals__
    for (_, name), namespace in found.items():
        yield namespace, name


def prove_rotary(function: Callable) -> Domain:
    """Find the form of a rotary function and the calls for which the op equals it.

    Raises:
        Rejected: the op equals it for no call.
    """
    names = tuple(_parameters(function))
    takes = [known for known in TAKES if names[: len(known)] == known]
    if not takes:
        raise Rejected(f"takes ({', '.join(names)}), not ({', '.join(BOTH)}) or the like")
    forms = itertools.product(FORMS, ANGLES, (False, True), takes)
    domains = [_prove_form(function, Form(*form)) for form in forms]
    best = max(domains, key=lambda domain: (len(domain.calls), -domain.error16))
    if not best.calls:
        raise Rejected("is no rotation that rope can do")
    return best


def guarded(function: Callable, domain: Domain) -> Callable:
    """Write the replacement: the op for the calls that were proved, the original for all others."""
    default, layout_of, form = _default_axis(function), domain.layout, domain.form

    def axis_of(args, kwargs):
        known = not args and all(v is None for k, v in kwargs.items() if k != "unsqueeze_dim")
        return kwargs.get("unsqueeze_dim", default) if known else "unknown"

    def rotate(x, cos=None, sin=None, *args, **kwargs):
        layout = layout_of(axis_of(args, kwargs) if args or kwargs else default, cos, sin, x)
        if layout is None:
            return function(x, cos, sin, *args, **kwargs)
        return form(layout, cos, sin, x)

    def rotate_both(q, k=None, cos=None, sin=None, *args, **kwargs):
        layout = layout_of(axis_of(args, kwargs) if args or kwargs else default, cos, sin, q, k)
        if layout is None:
            return function(q, k, cos, sin, *args, **kwargs)
        return form(layout, cos, sin, q, k)

    def rotate_sin_first(tensor, sin=None, cos=None, *args, **kwargs):
        layout = layout_of(axis_of(args, kwargs) if args or kwargs else default, cos, sin, tensor)
        if layout is None:
            return function(tensor, sin, cos, *args, **kwargs)
        return form(layout, cos, sin, tensor)

    def rotate_complex(xq, xk, freqs_cis, *args, **kwargs):
        cos, sin = (freqs_cis.real, freqs_cis.imag) if freqs_cis.is_complex() else (None, None)
        layout = layout_of(axis_of(args, kwargs) if args or kwargs else default, cos, sin, xq, xk)
        if layout is None:
            return function(xq, xk, freqs_cis, *args, **kwargs)
        return form(layout, cos, sin, xq, xk)

    replacements = {
        ONE: rotate, ONE_SIN_FIRST: rotate_sin_first,
        BOTH: rotate_both, BOTH_COMPLEX: rotate_complex,
    }  # fmt: skip
    return functools.update_wrapper(replacements[domain.form.takes], function, updated=())


def _prove_form(function: Callable, form: Form) -> Domain:
    calls: dict[Call, str] = {}
    errors = {F32: 0.0, BF16: 0.0}
    known = _default_axis(function) is not None
    axes = ((1 if known else None, "bhtc"), (2 if known else None, "bthc"))
    for (axis, layout), partial in itertools.product(axes, (False, True)):
        error32, error16, mixed = (
            _distance(function, form, axis, layout, partial, dtypes)
            for dtypes in ((F32, F32), (BF16, BF16), (BF16, F32))
        )
        if error32 <= TOLERANCE[F32] and error16 <= TOLERANCE[BF16]:
            calls[axis, partial, False] = layout
            errors = {F32: max(errors[F32], error32), BF16: max(errors[BF16], error16)}
            if mixed <= TOLERANCE[BF16]:
                calls[axis, partial, True] = layout
    return Domain(form, calls, errors[F32], errors[BF16])


def _distance(function, form, axis, layout, partial, dtypes) -> float:
    """The distance of op and original for one kind of call; infinite if one cannot do it."""
    with quiet() as g, contextlib.suppress(Exception):
        rotated = WIDTH // 2 if partial else WIDTH
        angle = 6 * torch.rand(BATCH, TOKENS, rotated // 2, generator=g, dtype=F32)
        angle = ANGLES[form.angles][0](angle)
        cos, sin = angle.cos().to(dtypes[1]), angle.sin().to(dtypes[1])
        heads = (HEADS,) if form.takes in (ONE, ONE_SIN_FIRST) else (HEADS, KV_HEADS)
        xs = [_heads(n, layout, g).to(dtypes[0]) for n in heads]
        extra = {} if axis is None else {"unsqueeze_dim": axis}
        expected = form.original(function, cos, sin, *(x.clone() for x in xs), **extra)
        return distance(form(layout, cos, sin, *xs), expected)
    return float("inf")


def _heads(heads: int, layout: str, g: torch.Generator) -> torch.Tensor:
    x = torch.randn(BATCH, heads, TOKENS, WIDTH, generator=g, dtype=F32)
    return x if layout == "bhtc" else x.transpose(1, 2)


def _halves_apart(x: torch.Tensor, rotated: int) -> torch.Tensor:
    """Bring pairs that lie next to each other half of the rotated width apart."""
    head, tail = x[..., :rotated], x[..., rotated:]
    head = torch.cat([head[..., ::2], head[..., 1::2]], -1)
    return torch.cat([head, tail], -1) if tail.shape[-1] else head


def _default_axis(function: Callable) -> int | None:
    parameter = _parameters(function).get("unsqueeze_dim")
    return parameter.default if parameter is not None else None


def _is_function(value: Any) -> bool:
    """Say whether a global is a function, or the module that `kernels` makes of one."""
    return inspect.isfunction(value) or hasattr(type(value), "kernel_layer_name")


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    signed = function.forward if isinstance(function, nn.Module) else function
    return inspect.signature(signed).parameters
