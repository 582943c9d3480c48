"""The arguments of one case: drawn on the device, and put back where a peer overwrites them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liger_fn.testing.spec import Arguments, Benchmark, Draw, OpSpec, results


class DeviceDraw(Draw):
    """Draws on the device itself: a head of 2^29 weights takes the CPU seconds."""

    def __post_init__(self) -> None:
        self._generator = torch.Generator(self.device).manual_seed(self.seed)

    def normal(self, *shape, scale=1.0, dtype=None):
        t = torch.randn(shape, generator=self._generator, device=self.device) * scale
        return t.to(dtype or self.dtype)

    def uniform(self, *shape, high=1.0, dtype=None):
        t = torch.rand(shape, generator=self._generator, device=self.device) * high
        return t.to(dtype or self.dtype)

    def integers(self, high, *shape):
        return torch.randint(high, shape, generator=self._generator, device=self.device)


@dataclass
class Inputs:
    """One call's arguments, the ones among them that get a gradient, and the cotangents.

    A cotangent is None where the result is a scalar: autograd then starts from 1, as
    `loss.backward()` does.
    """

    arguments: Arguments
    grads: tuple[str, ...]
    cotangents: tuple[Tensor | None, ...]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.arguments[name] for name in self.grads]

    @property
    def detached(self) -> Arguments:
        """The same storages without gradients: peers ask `requires_grad` even under no_grad."""
        return {n: t.detach() if isinstance(t, Tensor) else t for n, t in self.arguments.items()}

    def forward(self, call: Callable[..., Any]) -> tuple[Tensor, ...]:
        return results(call(**self.arguments))

    def backward(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gradients in fresh tensors: nothing is added to a `.grad`."""
        return torch.autograd.grad(outputs, self.leaves, self.cotangents)

    def tensors(self) -> Iterable[Tensor]:
        yield from (t.detach() for t in self.arguments.values() if isinstance(t, Tensor))
        yield from (t for t in self.cotangents if t is not None)


def draw_inputs(spec: OpSpec, benchmark: Benchmark, draw: Draw) -> Inputs:
    arguments = benchmark.make(draw)
    wanted = benchmark.grads or spec.grads
    grads = tuple(n for n in wanted if isinstance(arguments.get(n), Tensor))
    # On the meta device the reference costs nothing, and says what the results look like.
    outputs = results(spec.reference(**{n: _to_meta(value) for n, value in arguments.items()}))
    cotangents = tuple(draw.normal(*t.shape) if t.dim() else None for t in outputs)
    for name in grads:
        arguments[name].requires_grad_()
    return Inputs(arguments, grads, cotangents)


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


@dataclass
class Overwritten:
    """What a peer changed, with copies of what it was."""

    pairs: list[tuple[Tensor, Tensor]]

    @torch.no_grad()
    def kept(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same values, copied where restoring would change them."""
        ours = {tensor.untyped_storage().data_ptr() for tensor, _ in self.pairs}
        return {
            name: value.clone() if value.untyped_storage().data_ptr() in ours else value
            for name, value in values.items()
        }

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, copy in self.pairs:
            tensor.copy_(copy)


def watch(
    inputs: Inputs, *runs: Callable[[], dict[str, Tensor]]
) -> tuple[dict[str, Tensor], Overwritten]:
    """Make each run on the same numbers; return what they give, and what any of them wrote into."""
    pairs = [(t, t.clone()) for t in inputs.tensors()]
    values: dict[str, Tensor] = {}
    changed: dict[int, tuple[Tensor, Tensor]] = {}
    for run in runs:
        try:
            value = run()
        except Exception:
            # Others are still to come.
            Overwritten(pairs).restore()
            raise
        here = Overwritten([pair for pair in pairs if not _same(*pair)])
        # A peer may give back a gradient in the memory of what it overwrote.
        values |= here.kept(value)
        here.restore()
        changed |= {id(pair): pair for pair in here.pairs}
    return values, Overwritten(list(changed.values()))


def _same(t: Tensor, copy: Tensor) -> bool:
    return bool(((t == copy) | ((t != t) & (copy != copy))).all())
