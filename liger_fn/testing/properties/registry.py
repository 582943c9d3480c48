"""What may be said of an op: a property is a function of (spec, case, device) that may raise."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from liger_fn.testing.spec import Case, OpSpec


class NotApplicable(Exception):
    """Raised by a property that does not concern an op or a machine, with the reason in words."""


@dataclass(frozen=True)
class Property:
    """`over` says where it must hold: "spec", "first" (case), "cases", or "cases and sizes"."""

    name: str
    holds: Callable[[OpSpec, Case, torch.device], None]
    over: str
    cuda: bool = False

    def check(self, spec: OpSpec, case: Case, device: torch.device) -> None:
        if self.cuda and device.type != "cuda":
            raise NotApplicable("needs a CUDA device")
        self.holds(spec, case, device)

    def cases(self, spec: OpSpec) -> Sequence[Case]:
        if self.over in ("spec", "first"):
            return spec.cases[:1]
        return spec.cases + (spec.sizes if self.over == "cases and sizes" else ())


PROPERTIES: dict[str, Property] = {}


def holds_for(over: str, cuda: bool = False) -> Callable[[Callable], Callable]:
    """Register the decorated function as a property."""

    def register(holds: Callable) -> Callable:
        PROPERTIES[holds.__name__] = Property(holds.__name__, holds, over, cuda)
        return holds

    return register


@dataclass(frozen=True)
class Trial:
    """One property, put to one op in one case."""

    spec: OpSpec
    property: Property
    case: Case

    def id(self) -> str:
        where = "" if self.property.over == "spec" else "-" + self.case.id.replace(" ", "-")
        return f"{self.spec.name}-{self.property.name}{where}"

    def check(self, device: torch.device) -> None:
        self.property.check(self.spec, self.case, device)


def trials(specs: Sequence[OpSpec], names: Sequence[str] = ()) -> Iterator[Trial]:
    """Every trial of `specs`, or those of the named properties."""
    for spec in specs:
        for property in PROPERTIES.values():
            if not names or property.name in names:
                for case in property.cases(spec):
                    yield Trial(spec, property, case)
