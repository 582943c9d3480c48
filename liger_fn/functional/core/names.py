"""The names of an op: read once from the signatures of its two launchers, checked at import.

    fwd(x, weight, eps)                        -> (*results, *residuals)
    bwd(x, weight, rstd, dy, eps, need_dx, ..) -> one gradient, or None, per differentiable input

What `bwd` names is what the op keeps: inputs, results and residuals by their own names, `d<result>`
for a cotangent, `need_d<input>` for the question whether that gradient is wanted, `donated` for the
question whether the residuals are its own to write on, as nobody will read them again. `fwd` may
ask for `need_d<input>` too, last, if it computes gradients ahead or keeps what only they need: it
then returns None for a residual. Everything follows from these names: what is saved for the
backward pass, the schemas of the two dispatcher ops, the order of every argument.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "SymInt",
    int | None: "SymInt?",
    float: "float",
    float | None: "float?",
    str: "str",
}


@dataclass(frozen=True)
class Names:
    """Who is who in an op; `types` maps each name to its type in a dispatcher schema."""

    op: str
    inputs: tuple[str, ...]
    fwd: tuple[str, ...]
    bwd: tuple[str, ...]
    results: tuple[str, ...]
    residuals: tuple[str, ...]
    grads: tuple[str, ...]
    linear: tuple[str, ...]
    total: tuple[str, ...]
    types: dict[str, str] = field(repr=False)

    @property
    def cotangents(self) -> tuple[str, ...]:
        return tuple("d" + n for n in self.results)

    @property
    def gradients(self) -> tuple[str, ...]:
        return tuple("d" + n for n in self.grads)

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple("need_d" + n for n in self.grads)

    @property
    def gradient_of(self) -> dict[str, str]:
        """Each differentiable input, and the one in `grads` whose gradient is its own too."""
        summands = {self.total[2]: self.total[1]} if self.total else {}
        return {n: n for n in self.grads} | summands

    @property
    def statics(self) -> tuple[str, ...]:
        return tuple(n for n in self.inputs if not self.is_tensor(n))

    @property
    def saved(self) -> tuple[str, ...]:
        """The inputs, results and residuals that bwd gets, in its order."""
        known = {*self.inputs, *self.results, *self.residuals}
        return tuple(n for n in self.bwd if n in known and self.is_tensor(n))

    def is_tensor(self, name: str) -> bool:
        return self.types[name].startswith("Tensor")

    @property
    def fwd_schema(self) -> str:
        return self._schema(self.op, self.fwd, self.results + self.residuals)

    @property
    def bwd_schema(self) -> str:
        return self._schema(self.op + "_bwd", self.bwd, self.gradients)

    def _schema(self, op: str, takes: tuple[str, ...], gives: tuple[str, ...]) -> str:
        # No defaults: the dispatcher drops arguments that equal them before a Python kernel sees
        # them.
        arguments = ", ".join(f"{self.types[n]} {n}" for n in takes)
        return f"{op}({arguments}) -> ({', '.join('Tensor' for _ in gives)})"


def read_names(
    op: str,
    fwd: Callable,
    bwd: Callable,
    results: str,
    residuals: str,
    grads: str,
    linear: str,
    total: str,
    **declared: str,
) -> Names:
    """Read and check the names of `op`; every mistake is a TypeError at import.

    `declared` are further declarations about inputs, results and residuals: they are only checked.
    """
    annotations = {
        n: p.annotation for n, p in inspect.signature(fwd, eval_str=True).parameters.items()
    }
    names = Names(
        op=op,
        inputs=tuple(n for n in annotations if not n.startswith("need_")),
        fwd=tuple(annotations),
        bwd=tuple(inspect.signature(bwd).parameters),
        results=tuple(results.split()),
        residuals=tuple(residuals.split()),
        grads=tuple(grads.split()),
        linear=tuple(linear.split()),
        total=tuple(total.split()),
        types={n: _schema_type(op, n, t) for n, t in annotations.items()},
    )
    names.types.update(dict.fromkeys(names.results + names.residuals, "Tensor?"))
    names.types.update(dict.fromkeys(names.cotangents, "Tensor?"))
    names.types.update(dict.fromkeys((*names.needs, "donated"), "bool"))
    _check(names, declared)
    return names


def _schema_type(op: str, name: str, annotation: Any) -> str:
    if annotation not in _SCHEMA_TYPES:
        raise TypeError(
            f"custom_vjp({op}): fwd must annotate `{name}` with one of "
            f"{', '.join(str(getattr(t, '__name__', t)) for t in _SCHEMA_TYPES)}; got {annotation}."
        )
    return _SCHEMA_TYPES[annotation]


def _check(names: Names, declared: dict[str, str]) -> None:
    def contract(holds: bool, sentence: str) -> None:
        if not holds:
            raise TypeError(f"custom_vjp({names.op}): {sentence}.")

    kept = {*names.inputs, *names.results, *names.residuals}
    for n in names.bwd:
        contract(
            n in {*kept, *names.cotangents, *names.needs, "donated"},
            f"bwd names `{n}`, which is no input, result, residual, cotangent or need",
        )
    for n in names.fwd[len(names.inputs) :]:
        contract(
            n in names.inputs + names.needs, f"fwd names `{n}`, which is no need of a gradient"
        )
    for what, given in declared.items():
        for n in given.split():
            contract(n in kept, f"{what} names `{n}`, which is no input, result or residual")
    for n in names.grads + names.linear:
        contract(
            n in names.inputs and names.is_tensor(n), f"`{n}` is differentiated but no tensor input"
        )
    if names.total:
        contract(
            len(names.total) == 3
            and names.total[0] in names.results
            and names.total[1] in names.grads
            and names.total[2] in names.inputs,
            "total must name a result, a differentiable input and another input",
        )
    for n in names.cotangents:
        contract(n in names.bwd, f"bwd must name the cotangent `{n}`")
    for n in names.inputs:
        contract(
            n in names.bwd or n in names.linear or n in names.total[1:],
            f"a second derivative needs `{n}`: bwd must name it, or the op be `linear` in it",
        )
    contract(
        names.fwd == names.inputs + names.fwd[len(names.inputs) :],
        "fwd must take its `need_` parameters last",
    )
