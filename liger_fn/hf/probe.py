"""Prove on numbers that a replacement computes what a module computes.

Names and source code only suggest. What decides is a *shadow*: an object of the module's own class
with its own attributes, but with small random parameters on the CPU and without hooks. The original
forward and the replacement are both run on it. So the module itself may live anywhere (meta,
sharded, offloaded), and is not touched. The trials are chosen so that what only looks alike fails:

| trial                                     | what it shows                                     |
| ----------------------------------------- | ------------------------------------------------- |
| rows of size 1e-3                         | another epsilon                                   |
| rows of size 300                          | a clamp                                           |
| training mode, twice                      | dropout                                           |
| float32, then bfloat16                    | the order of rounding, the dtype of the result    |
| bfloat16 with float32 parameters          | type promotion                                    |
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from liger_fn.functional.core.backend import using

F32, BF16 = torch.float32, torch.bfloat16
SCALES = (1.0, 1e-3, 300.0)
# Relative to the largest value of a row. float32: a few roundings of 2^-24, magnified by a matrix
# product. bfloat16: up to three roundings of 2^-9 in the original, one in the op, and the product.
TOLERANCE = {F32: 1e-5, BF16: 2**-6}


class Rejected(Exception):
    """A replacement is not possible; the message is the reason that the report gives."""


@dataclass(frozen=True)
class Candidate:
    """A replacement: `run` takes the original's arguments, `how` is the op with its options."""

    op: str
    how: str
    run: Callable


@dataclass(frozen=True)
class Proof:
    """A candidate and its largest distance to the original, in float32 and in bfloat16."""

    candidate: Candidate
    error32: float
    error16: float


@dataclass(frozen=True)
class Trial:
    """One comparison: the original as a call without arguments, and a candidate's arguments."""

    dtype: torch.dtype
    original: Callable[[], Any]
    arguments: tuple


def prove(candidates: Sequence[Candidate], trials: Iterable[Trial]) -> Proof:
    """Return the candidate that equals the original in every trial; of several, the closest.

    Raises:
        Rejected: none does, or the original cannot be run, or it changes from call to call.
    """
    worst = {candidate: {F32: 0.0, BF16: 0.0} for candidate in candidates}
    for trial in trials:
        expected = _run_twice(trial.original)
        for candidate, errors in list(worst.items()):
            error = _try(candidate, trial.arguments, expected)
            errors[trial.dtype] = max(errors[trial.dtype], error)
            if error > TOLERANCE[trial.dtype]:
                del worst[candidate]
        if not worst:
            names = " or ".join(dict.fromkeys(candidate.op for candidate in candidates))
            dtype = str(trial.dtype).removeprefix("torch.")
            raise Rejected(f"is not {names}: the results differ in {dtype}")
    best = min(worst, key=lambda candidate: worst[candidate][BF16])
    return Proof(best, worst[best][F32], worst[best][BF16])


def distance(got: Any, expected: Any) -> float:
    """The largest difference relative to its row; infinite if the two cannot be compared."""
    if isinstance(expected, tuple):
        alike = isinstance(got, tuple) and len(got) == len(expected)
        return max(map(distance, got, expected)) if alike else float("inf")
    if not isinstance(got, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return float("inf")
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return float("inf")
    got, expected = got.double(), expected.double()
    size = expected.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return torch.nan_to_num((got - expected).abs() / size, nan=float("inf")).max().item()


@contextlib.contextmanager
def quiet() -> Iterator[torch.Generator]:
    """Make tensors on the CPU, run reference code, and leave the global random state alone."""
    state = torch.get_rng_state()
    no_autocast = torch.autocast("cpu", enabled=False)
    # An original may warn of dtypes that no user has given it.
    no_warnings = warnings.catch_warnings(action="ignore")
    with torch.device("cpu"), torch.no_grad(), no_autocast, using("reference"), no_warnings:
        try:
            yield torch.Generator().manual_seed(0)
        finally:
            torch.set_rng_state(state)


def shadow(
    module: nn.Module, parameters: dict[str, Any], children: dict[str, nn.Module]
) -> nn.Module:
    """Copy `module` without its parameters, children and hooks, in training mode."""
    new = object.__new__(type(module))
    new.__dict__.update(module.__dict__)
    for name in [name for name in new.__dict__ if name.endswith("_hooks")]:
        new.__dict__[name] = type(module.__dict__[name])()
    for installed in ("forward", "_old_forward"):
        new.__dict__.pop(installed, None)
    new.__dict__.update(_parameters=parameters, _modules=children, training=True)
    return new


def random_linear(rows: int, columns: int, dtype: torch.dtype, g: torch.Generator) -> nn.Linear:
    """Make a linear layer (columns to rows) without any of PyTorch's initialisation.

    Contexts that change how modules are made (meta, no_init, ZeRO-3) then do not reach it.
    """
    linear = object.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.in_features, linear.out_features = columns, rows
    weight = 0.4 * torch.randn(rows, columns, generator=g, dtype=F32)
    bias = torch.randn(rows, generator=g, dtype=F32)
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return linear


def rows_of_all_sizes(width: int, dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    """Make an input (3, 4, width): ordinary rows, and rows where an epsilon or a clamp counts."""
    x = torch.randn(len(SCALES), 4, width, generator=g, dtype=F32)
    return (x * torch.tensor(SCALES, dtype=F32)[:, None, None]).to(dtype)


def own_copy(child: nn.Module) -> nn.Module:
    """Copy a child without parameters (an activation, a dropout), in training mode."""
    return copy.deepcopy(child).train()


def fingerprint(module: nn.Module) -> tuple:
    """What two modules must share to share a proof: class, attributes, parameters, children."""
    attributes = tuple(
        (name, value if _is_plain(value) else id(value))
        for name, value in module.__dict__.items()
        if not name.startswith("_")
    )
    parameters = tuple((n, None if p is None else p.dim()) for n, p in module._parameters.items())
    children = ((name, fingerprint(child)) for name, child in module.named_children())
    return type(module), attributes, parameters, tuple(children)


def takes_one_input(function: Callable) -> bool:
    """Say whether a method takes `self` and exactly one more argument."""
    return len(inspect.signature(function).parameters) == 2


def slot_of(module: nn.Module, method: str) -> str:
    """The instance attribute that is called for a method: accelerate's hooks move the forward."""
    return "_old_forward" if method == "forward" and "_hf_hook" in module.__dict__ else method


def is_own(module: nn.Module, method: str) -> bool:
    """Say whether the method that an instance calls is the one of its class."""
    installed = module.__dict__.get(slot_of(module, method))
    return installed is None or getattr(installed, "__func__", None) is getattr(
        type(module), method
    )


def check_own(module: nn.Module, method: str, whose: str = "") -> None:
    """Raise `Rejected` if the instance has a method that is not the one of its class."""
    if not is_own(module, method):
        raise Rejected(f"{whose} has a {method} of another library on the instance".strip())


def _run_twice(original: Callable[[], Any]) -> Any:
    try:
        first, second = original(), original()
    except Exception as error:
        raise Rejected(f"cannot be run on its own: {type(error).__name__}: {error}") from error
    if distance(first, second) != 0:
        raise Rejected("changes from call to call in training mode: it has dropout, or a state")
    return first


def _try(candidate: Candidate, arguments: tuple, expected: Any) -> float:
    # A candidate need not fit the original at all; that it cannot be run is an answer.
    with contextlib.suppress(Exception):
        return distance(candidate.run(*arguments), expected)
    return float("inf")


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | torch.dtype | None)
