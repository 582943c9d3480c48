"""What an op declares once; tests, `verify`, offline compilation and benchmarks follow from it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]
Config = dict[str, int]


@dataclass
class Draw:
    """Draws the tensors of one call from a seed, on one device, in one dtype."""

    device: torch.device | str
    dtype: torch.dtype
    seed: int = 0
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Always drawn on the CPU, so that every device sees the same numbers.
        self._generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        t = torch.randn(shape, generator=self._generator, dtype=torch.float32) * scale
        return t.to(device=self.device, dtype=dtype or self.dtype)

    def uniform(self, *shape: int, high: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        t = torch.rand(shape, generator=self._generator, dtype=torch.float32) * high
        return t.to(device=self.device, dtype=dtype or self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self._generator).to(self.device)


@dataclass(frozen=True)
class Case:
    """One call of an op: `make(draw)` gives every argument by name."""

    id: str
    make: Callable[[Draw], Arguments]


@dataclass(frozen=True)
class BadCall:
    """A call that must fail: with this error, and with a sentence that contains this text."""

    id: str
    make: Callable[[Draw], Arguments]
    error: type[Exception]
    sentence: str


@dataclass(frozen=True)
class Compilation:
    """One kernel as a launcher would compile it, for a chip that need not be here.

    `signature` maps each runtime argument to Triton's type ("*bf16", "i32", "fp32"); `constants`
    the rest. `chips` are those for which it is meant; none named: all.
    """

    id: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    chips: tuple[int, ...] = ()
    maxnreg: int | None = None


@dataclass(frozen=True)
class Benchmark:
    """One shape to time: `bytes_*` are the least that must move, `flops_*` the matrix work.

    `grads` names the arguments that get a gradient; without it, all that the op differentiates.
    """

    id: str
    make: Callable[[Draw], Arguments]
    bytes_fwd: int = 0
    bytes_bwd: int = 0
    flops_fwd: int = 0
    flops_bwd: int = 0
    grads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Launch:
    """A launch configuration that `python -m benchmarks --mode sweep` tries others in place of.

    Attributes:
        module, config: where it is, and its name there: a pure function of sizes and of facts about
            the chip, asked at every call, that returns a dict: constants of a launch, num_warps.
        mode: the pass that it configures, "fwd" or "bwd".
        candidates: what to try, given what it returns today.
    """

    module: ModuleType
    config: str
    mode: str
    candidates: Callable[[Config], Sequence[Config]]


def around(
    tile: Sequence[str] = (), per_thread: tuple[int, int] = (4, 64), **choices: Sequence[int]
) -> Callable[[Config], list[Config]]:
    """Give candidates: every combination of the choices that a configuration has an entry for.

    Those whose tile has fewer or more elements a thread than `per_thread` are left out: their
    threads idle, or spill. The entries `tile` span it, or else all BLOCK_* and PIECES.
    """

    def candidates(current: Config) -> list[Config]:
        names = [name for name in choices if name in current]
        combinations = product(*(choices[name] for name in names))
        tried = [{**current, **dict(zip(names, values, strict=True))} for values in combinations]
        sides = tile or [n for n in current if n.startswith("BLOCK_") or n == "PIECES"]
        low, high = (32 * bound for bound in per_thread)
        return [c for c in tried if low <= prod(c[n] for n in sides) / c["num_warps"] <= high]

    return candidates


@dataclass(frozen=True)
class OpSpec:
    """An op and the facts that its author states; the suite knows what must follow.

    Attributes:
        op, reference: functions with one signature.
        grads: the arguments that the op differentiates.
        baseline: the same in PyTorch's own ops in the inputs' dtype: its error against float64 is
            the measure of ours. Default: the reference.
        cases: small calls, each put under every property; the first also under the transforms,
            which are slow.
        sizes: larger, ragged, empty and odd calls, for accuracy alone.
        rows: the arguments that share rows: vmap must give the reference's answer when it maps a
            new dimension of any or all of them. In the first case the first size of all is free.
        slack: how much more error than the baseline is allowed, per dtype; of float64, where the
            truth itself is rounded, how much more than a few roundings; each with its reason
            beside it.
        autocast: whether autocast casts the differentiable inputs (of a float32 call) or leaves
            them alone; or the names of all that it casts.
        parted: arguments by row whose gradient is a sum within the row, in as many parts as the
            number of rows leaves multiprocessors for: its last bits depend on that number.
        symbolic: whether this PyTorch can trace the second derivative with symbolic sizes.
        launches: the configurations of its launches that can be swept.
        huge: a call whose `rows` pass 2^31 elements, with results by row, for GPUs that hold it.
    """

    op: Callable[..., Any]
    reference: Callable[..., Any]
    grads: tuple[str, ...]
    cases: tuple[Case, ...]
    sizes: tuple[Case, ...] = ()
    rows: tuple[str, ...] = ()
    baseline: Callable[..., Any] | None = None
    slack: Mapping[torch.dtype, float] = field(default_factory=dict)
    errors: tuple[BadCall, ...] = ()
    kernels: Callable[[], Sequence[Compilation]] = tuple
    benchmarks: tuple[Benchmark, ...] = ()
    parted: tuple[str, ...] = ()
    symbolic: bool = True
    launches: tuple[Launch, ...] = ()
    autocast: bool | tuple[str, ...] = False
    huge: Case | None = None

    @property
    def name(self) -> str:
        return self.op.__name__


def results(out: Any) -> tuple[Tensor, ...]:
    """The tensors that a call returns, but for indices and what was not asked for, as a tuple."""
    returned = out if isinstance(out, (tuple, list)) else (out,)
    return tuple(t for t in returned if isinstance(t, Tensor) and t.is_floating_point())
