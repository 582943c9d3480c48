"""`--mode layer`: a decoder layer of Llama-3-8B, eager and compiled, with and without our ops.

What an op saves alone it may lose in a compiled layer, where the compiler would have fused it with
its neighbours. So each op takes its turn in a layer that is otherwise as Hugging Face writes it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import eager
from benchmarks.answers import LIMITS, Answer, worst
from benchmarks.bench import Bench
from benchmarks.inputs import DeviceDraw
from benchmarks.providers import first_line
from benchmarks.report import Row
from benchmarks.timing import Step, in_turns
from liger_fn import functional
from liger_fn.testing.spec import Benchmark

OPS = ("rms_norm", "rope", "swiglu")
CHOICES = {"none": (), **{op: (op,) for op in OPS}, "all": OPS}


@dataclass(frozen=True)
class Sizes:
    """B samples of T tokens of width D, in H heads and K key-value heads of width C; F the MLP."""

    B: int
    T: int
    D: int
    H: int
    K: int
    C: int
    F: int

    def benchmark(self) -> Benchmark:
        """The matrix products and the causal half of attention; the rest is small beside them."""
        weights = self.D * self.C * 2 * (self.H + self.K) + 3 * self.D * self.F
        attention = 2 * self.T * self.H * self.C
        flops = self.B * self.T * (2 * weights + attention)
        return Benchmark(f"{self.B}x{self.T}", dict, flops_fwd=flops, flops_bwd=2 * flops)


LLAMA_8B = Sizes(B=2, T=4096, D=4096, H=32, K=8, C=128, F=14336)
TINY = Sizes(B=1, T=16, D=32, H=4, K=2, C=8, F=48)

# A dozen ops in a row, each of which rounds.
_DEEPER = 3

Weights = dict[str, Tensor]
Arguments = tuple[Tensor, Tensor, Tensor, Weights]


def weights(sizes: Sizes, draw: DeviceDraw) -> Weights:
    s = sizes
    shapes = {
        "q": (s.H * s.C, s.D), "k": (s.K * s.C, s.D), "v": (s.K * s.C, s.D), "o": (s.D, s.H * s.C),
        "gate": (s.F, s.D), "up": (s.F, s.D), "down": (s.D, s.F),
    }  # fmt: skip
    products = {n: draw.normal(*shape, scale=shape[1] ** -0.5) for n, shape in shapes.items()}
    norms = {n: draw.normal(s.D) for n in ("attention_norm", "mlp_norm")}
    return {n: w.requires_grad_() for n, w in (products | norms).items()}


def layer(
    sizes: Sizes,
    ops: Mapping[str, Callable[..., Any]],
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    w: Weights,
) -> Tensor:
    """LlamaDecoderLayer with these ops."""

    def heads(h: Tensor, name: str) -> Tensor:
        return F.linear(h, w[name]).view(*h.shape[:2], -1, sizes.C).transpose(1, 2)

    h = ops["rms_norm"](x, w["attention_norm"], eps=1e-5, cast_before_weight=True)
    q, k = ops["rope"](heads(h, "q"), heads(h, "k"), cos, sin)
    a = F.scaled_dot_product_attention(q, k, heads(h, "v"), is_causal=True, enable_gqa=True)
    x = x + F.linear(a.transpose(1, 2).flatten(2), w["o"])
    h = ops["rms_norm"](x, w["mlp_norm"], eps=1e-5, cast_before_weight=True)
    return x + F.linear(ops["swiglu"](F.linear(h, w["gate"]), F.linear(h, w["up"])), w["down"])


def with_ours(sizes: Sizes, ours: tuple[str, ...]) -> Callable[..., Tensor]:
    """The layer as a function of its tensors, with some of our ops."""
    ops = {op: getattr(functional if op in ours else eager, op) for op in OPS}

    def call(x: Tensor, cos: Tensor, sin: Tensor, w: Weights) -> Tensor:
        return layer(sizes, ops, x, cos, sin, w)

    return call


def measure(bench: Bench, compiled: bool) -> None:
    """Time forward and backward with each choice of ops; check them against float32."""
    sizes = LLAMA_8B if bench.clock.device.type == "cuda" else TINY
    arguments, cotangent = _draw(bench, sizes)
    want = _answer(with_ours(sizes, ()), *_in_float32(arguments, cotangent))
    limit = _DEEPER * LIMITS[getattr(torch, bench.options.dtype)]
    steps: dict[str, Step] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name, ours in CHOICES.items():
        call = with_ours(sizes, ours)
        if compiled:
            call = torch.compile(call, fullgraph=True, dynamic=False)
        try:
            part, error = worst(_answer(call, arguments, cotangent), want)
        except Exception as failure:
            facts[name] = {"status": "failed", "note": first_line(failure)}
            continue
        facts[name] = {"status": "ok", "error": error, "note": f"largest error in {part}"}
        if error > limit:
            why = f"{part} is off by {error:.2g} of its norm, more than {limit:g}"
            facts[name] |= {"status": "wrong", "note": why}
        else:
            steps[name] = _step(call, arguments, cotangent)
    del want
    bench.write(_rows(bench, sizes, compiled, steps, facts))
    bench.forget()


def _step(call: Callable[..., Tensor], arguments: Arguments, cotangent: Tensor) -> Step:
    leaves = [arguments[0], *arguments[3].values()]

    def run(_: Any) -> tuple[Tensor, ...]:
        y = call(*arguments)
        return y, *torch.autograd.grad(y, leaves, cotangent)

    return Step(lambda: None, run, lambda: None)


def _answer(call: Callable[..., Tensor], arguments: Arguments, cotangent: Tensor) -> Answer:
    values = _step(call, arguments, cotangent).run(None)
    names = ["y", "dx", *(f"d{n}" for n in arguments[3])]
    return {n: t.detach() for n, t in zip(names, values, strict=True)}


def _in_float32(arguments: Arguments, cotangent: Tensor) -> tuple[Arguments, Tensor]:
    def leaf(t: Tensor) -> Tensor:
        return t.detach().float().requires_grad_(t.requires_grad)

    x, cos, sin, w = arguments
    return (leaf(x), leaf(cos), leaf(sin), {n: leaf(t) for n, t in w.items()}), cotangent.float()


def _draw(bench: Bench, sizes: Sizes) -> tuple[Arguments, Tensor]:
    dtype = getattr(torch, bench.options.dtype)
    draw = DeviceDraw(bench.clock.device, dtype, bench.options.seed)
    angle = draw.uniform(1, sizes.T, sizes.C // 2, high=6.28, dtype=torch.float32).repeat(1, 1, 2)
    x = draw.normal(sizes.B, sizes.T, sizes.D).requires_grad_()
    arguments = x, angle.cos().to(dtype), angle.sin().to(dtype), weights(sizes, draw)
    return arguments, draw.normal(*x.shape)


def _rows(
    bench: Bench,
    sizes: Sizes,
    compiled: bool,
    steps: dict[str, Step],
    facts: dict[str, dict[str, Any]],
) -> list[Row]:
    clock, options = bench.clock, bench.options
    benchmark = sizes.benchmark()
    floor = bench.ceilings.floor_ms(benchmark, "full") or 0.0
    for name, timing in in_turns(steps, clock.time, options.budget, options.repeats).items():
        if isinstance(timing, Exception):
            facts[name] = {"status": "failed", "note": first_line(timing)}
            continue
        facts[name] |= {"ms": timing.ms, "spread": timing.spread, "repeats": timing.repeats}
        facts[name] |= {"floor": floor / timing.ms, "peak_mib": clock.peak_mib(steps[name])}
    shape = f"{benchmark.id} " + ("compiled" if compiled else "eager")
    return [
        Row("layer", shape, "layer", options.dtype, name, **facts[name], **bench.about)
        for name in CHOICES
    ]
