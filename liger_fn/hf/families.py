"""Which op may take the place of what: one row for each op.

A *place* says where an op is called: in a norm, in a gated MLP, in stacked experts or only in their
gate. It knows the structure that makes a module worth a trial, what the trial runs on, and how the
replacement is written. A row of `FAMILIES` is an op, its place, and the keyword arguments to try;
their order does not matter, because the trial decides. To add an op to the adapter, add its row.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from liger_fn import functional
from liger_fn.functional.core import backend
from liger_fn.functional.core.custom_vjp import checkpointed
from liger_fn.functional.core.rules import autocast_dtype
from liger_fn.hf.probe import (
    BF16,
    F32,
    Candidate,
    Proof,
    Rejected,
    Trial,
    own_copy,
    prove,
    quiet,
    random_linear,
    rows_of_all_sizes,
    shadow,
    takes_one_input,
)

EPS_NAMES = (
    *("variance_epsilon", "eps", "epsilon", "norm_eps"),
    *("layer_norm_epsilon", "layer_norm_eps"),
)
LIMITS, ALPHAS = ("swiglu_limit", "limit"), ("swiglu_alpha", "alpha")
# What norms that keep no epsilon write in their forward.
WRITTEN_EPS = (1e-5, 1e-6, 1e-8, 1e-12)
EXPERTS_WEIGHTS = ("gate_up_proj", "down_proj")
EXPERTS_BIASES = ("gate_up_proj_bias", "down_proj_bias")
# What transformers chooses by itself for experts; all compute the same.
STOCK_EXPERTS = (None, "eager", "grouped_mm", "batched_mm")


@dataclass(frozen=True)
class Family:
    """An op, the place it may take, the keyword arguments to try, the parameters it can take.

    Args:
        offset: what the module adds to its weight, where the op has no option for it.
        reads: options that the module keeps, and the names that its attribute may have.
    """

    op: str
    place: Place
    variants: tuple[dict[str, Any], ...]
    parameters: tuple[str, ...] = ()
    offset: float = 0.0
    reads: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the op by its name, so that whoever replaces it in `functional` is heard."""
        return getattr(functional, self.op)(*args, **kwargs)

    def read_from(self, module: nn.Module) -> dict[str, str] | None:
        """For each option that the module keeps, its attribute; None if it keeps not all."""
        held = {option: _number_name(module, names) for option, names in self.reads}
        return None if None in held.values() else held  # type: ignore[return-value]

    def how(self, *notes: str, **options: Any) -> str:
        """Write the op with its options."""
        return f"{self.op}({', '.join([*(f'{k}={v}' for k, v in options.items()), *notes])})"


class Place:
    """Where an op may be called: in the method `method` of modules of some structure."""

    method = "forward"
    # Each trial: dtype of the input, dtype of the parameters; of experts, dtype of their weights.
    dtypes: tuple[tuple[torch.dtype, ...], ...] = ((F32, F32), (BF16, BF16))

    def suggests(self, module: nn.Module) -> bool:
        """Say whether the report should have a line about the module."""
        raise NotImplementedError

    def check(self, module: nn.Module) -> None:
        """Raise `Rejected` unless the module's structure is worth a trial."""

    def candidates(self, module: nn.Module, family: Family) -> Iterator[Candidate]:
        """Write a replacement of the method for each way in which the family may fit."""
        raise NotImplementedError

    def shadow_and_inputs(
        self, module: nn.Module, dtypes: tuple[torch.dtype, ...], g: torch.Generator
    ) -> tuple[Any, ...]:
        """Make what a trial runs on: a shadow, and the other arguments of the method."""
        raise NotImplementedError

    def prove(self, module: nn.Module, families: list[Family]) -> Proof:
        """Find the replacement that a trial proves, or raise `Rejected`."""
        self.check(module)
        candidates = [c for family in families for c in self.candidates(module, family)]
        if not candidates:
            raise Rejected("has parameters that no op here takes")
        with quiet() as g:
            return prove(candidates, self._trials(module, g))

    def original(self, module: nn.Module) -> Any:
        """What a replacement must equal."""
        return getattr(type(module), self.method)

    def _trials(self, module: nn.Module, g: torch.Generator) -> Iterator[Trial]:
        original = self.original(module)
        for dtypes in self.dtypes:
            arguments = self.shadow_and_inputs(module, dtypes, g)
            yield Trial(dtypes[0], functools.partial(original, *arguments), arguments)


class Norm(Place):
    """`y = norm(x)` with nothing but one-dimensional parameters."""

    dtypes = ((F32, F32), (BF16, BF16), (BF16, F32))

    def suggests(self, module):
        named = "norm" in type(module).__name__.lower()
        is_norm = not module._modules and (named or _eps_name(module) is not None)
        return is_norm and not _takes_a_gate(module)

    def check(self, module):
        if not takes_one_input(type(module).forward):
            raise Rejected("takes more than one input")
        if any(p.dim() != 1 for p in _parameters(module).values()):
            raise Rejected("has parameters that are not one-dimensional")

    def candidates(self, module, family):
        names = tuple(_parameters(module))
        if not set(names) <= set(family.parameters) or (family.offset and "weight" not in names):
            return
        held = _eps_name(module)
        epsilons = WRITTEN_EPS if held is None else (held,)
        for eps, options, any_dtype in itertools.product(epsilons, family.variants, (True, False)):
            run = _norm_forward(type(module), family, names, eps, options, any_dtype)
            notes = () if names else ("no weight",)
            notes += (f"weight + {family.offset}",) if family.offset else ()
            notes += () if held else (f"eps={eps}",)
            yield Candidate(family.op, family.how(*notes, **options), run)

    def shadow_and_inputs(self, module, dtypes, g):
        width = _width(module)
        parameters = {
            name: nn.Parameter(torch.randn(width, generator=g, dtype=F32).to(dtypes[1]))
            for name in _parameters(module)
        }
        # Parameters that are None stay in the dictionary: a forward may ask for them.
        s = shadow(module, {**module._parameters, **parameters}, {})
        return s, rows_of_all_sizes(width, dtypes[0], g)


class GatedNorm(Norm):
    """A norm of `hidden_states` that an activated `gate` multiplies, before or after."""

    def suggests(self, module):
        return not module._modules and _takes_a_gate(module)

    def check(self, module):
        if any(p.dim() != 1 for p in _parameters(module).values()):
            raise Rejected("has parameters that are not one-dimensional")
        if _eps_name(module) is None:
            raise Rejected("has no epsilon that is a number")

    def candidates(self, module, family):
        names, eps = tuple(_parameters(module)), _eps_name(module)
        if not set(names) <= set(family.parameters):
            return
        for options, any_dtype in itertools.product(family.variants, (True, False)):
            run = _gated_norm_forward(family, names, eps, options, any_dtype)
            yield Candidate(family.op, family.how(**options), run)

    def shadow_and_inputs(self, module, dtypes, g):
        s, x = super().shadow_and_inputs(module, dtypes, g)
        # Small rows meet small gates, large ones meet ordinary ones, and ordinary ones large ones.
        return s, x, rows_of_all_sizes(x.shape[-1], dtypes[0], g).flip(0)


class Activation(Place):
    """A module that squares the positive part of what it gets, and does nothing else."""

    def suggests(self, module):
        return "relusquared" in type(module).__name__.lower()

    def check(self, module):
        if module._modules or module._parameters or not takes_one_input(type(module).forward):
            raise Rejected("is more than a function of one input")

    def candidates(self, module, family):
        yield Candidate(family.op, family.how(), _activation_forward(family))

    def shadow_and_inputs(self, module, dtypes, g):
        return own_copy(module), rows_of_all_sizes(24, dtypes[0], g)


class GatedMLP(Place):
    """`down(act(gate(x)) * up(x))`, or the same with gate and up in one matrix."""

    def suggests(self, module):
        name = type(module).__name__.lower()
        if name.endswith(("mlp", "ffn", "feedforward")):
            return True
        return len(_linears(module)) == 3 and takes_one_input(type(module).forward)

    def check(self, module):
        if not takes_one_input(type(module).forward):
            raise Rejected("takes more than one input")
        if _parameters(module) or any(map(_has_parameters, _others(module).values())):
            raise Rejected("has parameters outside its linear layers")
        if len(_linears(module)) not in (2, 3):
            raise Rejected(f"has {len(_linears(module))} linear layers, not 2 or 3")
        if not _roles(module):
            raise Rejected("has linear layers that do not fit together as gate, up and down")

    def candidates(self, module, family):
        held = family.read_from(module)
        if held is None:
            return
        for options, names in itertools.product(family.variants, _roles(module)):
            for notes, run in _mlp_forwards(_Reading(family, options, held), *names):
                yield Candidate(family.op, family.how(*notes, **options, **held), run)

    def shadow_and_inputs(self, module, dtypes, g):
        linears, small = _linears(module), _small_sizes(module)
        children = {name: own_copy(child) for name, child in _others(module).items()}
        for name, linear in linears.items():
            rows, columns = small[linear.out_features], small[linear.in_features]
            children[name] = random_linear(rows, columns, dtypes[1], g)
        *_, down = _roles(module)[0]
        width = small[linears[down].out_features]
        return shadow(module, {}, children), rows_of_all_sizes(width, dtypes[0], g)


class Experts(Place):
    """`Σ weight · down[e](act(gate[e](x)) · up[e](x))` over a token's experts, held in two tensors.

    Compared is the loop over the experts that the class writes, which transformers' grouped and
    batched implementations stand for.
    """

    dtypes = ((F32, F32, F32), (BF16, BF16, BF16), (BF16, BF16, F32))

    def suggests(self, module):
        return "gate_up_proj" in module._parameters or hasattr(type(module), "_apply_gate")

    def check(self, module):
        names = set(_parameters(module))
        if not names >= set(EXPERTS_WEIGHTS):
            raise Rejected(f"has not both {' and '.join(EXPERTS_WEIGHTS)}")
        if names - {*EXPERTS_WEIGHTS, *EXPERTS_BIASES} or any(
            map(_has_parameters, module.children())
        ):
            raise Rejected("has parameters that fused_moe does not take")
        if len(inspect.signature(self.original(module)).parameters) != 4:
            raise Rejected("takes other inputs than tokens, their experts and the weights of these")
        if not isinstance(getattr(module, "num_experts", None), int):
            raise Rejected("does not say how many experts it has")
        if _implementation(module) not in STOCK_EXPERTS:
            raise Rejected(f"runs the implementation {_implementation(module)!r}")

    def candidates(self, module, family):
        held = family.read_from(module)
        if held is None:
            return
        notes = ("transposed",) if _is_transposed(module) else ()
        for options in family.variants:
            run = _experts_forward(_Reading(family, options, held), bool(notes))
            yield Candidate(family.op, family.how(*notes, **options, **held), run)

    def original(self, module):
        return inspect.unwrap(type(module).forward)

    def shadow_and_inputs(self, module, dtypes, g):
        E, K, D, F = 5, 2, 24, 20
        shapes = {"gate_up_proj": (E, 2 * F, D), "down_proj": (E, D, F)}
        if _is_transposed(module):
            shapes = {name: (e, columns, rows) for name, (e, rows, columns) in shapes.items()}
        shapes |= {"gate_up_proj_bias": (E, 2 * F), "down_proj_bias": (E, D)}
        parameters = {
            name: nn.Parameter((0.4 * torch.randn(shapes[name], generator=g)).to(dtypes[1]))
            for name in _parameters(module)
        }
        children = {name: own_copy(child) for name, child in module.named_children()}
        s = shadow(module, {**module._parameters, **parameters}, children)
        s.__dict__["num_experts"] = E
        x = rows_of_all_sizes(D, dtypes[0], g).flatten(0, 1)
        routed = torch.rand(len(x), E, generator=g).topk(K)
        return s, x, routed.indices, routed.values.to(dtypes[2])


class ExpertsGate(Place):
    """`act(gate) * up` on the packed output of the experts' first matrix product.

    For experts that keep their products. Transformers' grouped and batched implementations call
    this method; the eager one, which loops over the experts, does not.
    """

    method = "_apply_gate"

    def suggests(self, module):
        return hasattr(type(module), "_apply_gate") and getattr(module, "has_gate", False)

    def candidates(self, module, family):
        held = family.read_from(module)
        if held is None:
            return
        for options in family.variants:
            run = _gate(_Reading(family, options, held))
            yield Candidate(family.op, family.how("packed", **options, **held), run)

    def shadow_and_inputs(self, module, dtypes, g):
        children = {
            name: own_copy(child)
            for name, child in module.named_children()
            if not _has_parameters(child)
        }
        return shadow(module, {}, children), rows_of_all_sizes(24, dtypes[0], g)


NORM, GATED_NORM, ACTIVATION = Norm(), GatedNorm(), Activation()
GATED_MLP, EXPERTS, EXPERTS_GATE = GatedMLP(), Experts(), ExpertsGate()

CASTS = ({"cast_before_weight": True}, {"cast_before_weight": False})
GELUS = ({"approximate": "tanh"}, {"approximate": "none"})
GELU_NAMES = {"tanh": "gelu_pytorch_tanh", "none": "gelu"}
GATES = ({}, {"activation": "gelu_pytorch_tanh"}, {"activation": "gelu"})
# Bounds on gate and up, in DeepSeek's form and in that of GPT-OSS.
BOUNDED = (
    (({}, {"limit_activated": True}), (("limit", LIMITS),)),
    (
        ({"up_offset": 1.0}, {"up_offset": 1.0, "interleaved": True}),
        (("limit", LIMITS), ("alpha", ALPHAS)),
    ),
)
GATED_NORMS = tuple(
    {"gate_first": first, "activation": activation, **cast}
    for first in (False, True)
    for activation in ("silu", "sigmoid")
    for cast in CASTS
)
FAMILIES = [
    Family("rms_norm", NORM, (*CASTS, *({"offset": 1.0, **cast} for cast in CASTS)), ("weight",)),
    Family("layer_norm", NORM, ({},), ("weight", "bias")),
    Family("layer_norm", NORM, ({},), ("weight", "bias"), offset=1.0),
    Family("fused_moe", EXPERTS, GATES),
    *(Family("fused_moe", EXPERTS, variants, reads=reads) for variants, reads in BOUNDED),
    Family("swiglu", GATED_MLP, ({},)),
    Family("swiglu", EXPERTS_GATE, ({},)),
    Family("geglu", GATED_MLP, GELUS),
    Family("geglu", EXPERTS_GATE, GELUS),
    *(
        Family("gated_activation", place, variants, reads=reads)
        for place in (GATED_MLP, EXPERTS_GATE)
        for variants, reads in BOUNDED
    ),
    Family("gated_rms_norm", GATED_NORM, GATED_NORMS, ("weight",)),
    Family("relu_squared", ACTIVATION, ({},)),
]


# The replacements. Each bears the name of the method it replaces: pickle then finds the original by
# that name, and a model that is saved whole needs nothing of us when it is loaded.


def _norm_forward(norm, family, names, eps, options, any_dtype):
    autocasts = _calls_torch_s_norm(norm)
    is_torch_s_own = norm.forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
    is_written = isinstance(eps, float)
    op, offset = family.op, family.offset

    def forward(self, x):
        # Autocast makes float32 of what torch's norms get; what is float32 already stays so.
        may_change = autocasts and not (is_torch_s_own and x.dtype == F32)
        if may_change and autocast_dtype(x.device.type) is not None:
            return type(self).forward(self, x)
        parameters = {}
        for name in names:
            parameters[name] = p = getattr(self, name)
            if not any_dtype and p.dtype != x.dtype:
                return type(self).forward(self, x)
        if offset:
            parameters["weight"] = parameters["weight"] + offset
        epsilon = eps if is_written else getattr(self, eps)
        return getattr(functional, op)(x, **parameters, eps=epsilon, **options)

    return forward


def _gated_norm_forward(family, names, eps, options, any_dtype):
    def forward(self, hidden_states, gate=None):
        parameters, dtype = {name: getattr(self, name) for name in names}, hidden_states.dtype
        is_mixed = any(p.dtype != dtype for p in parameters.values()) and not any_dtype
        if gate is None or gate.dtype != dtype or gate.shape != hidden_states.shape or is_mixed:
            return type(self).forward(self, hidden_states, gate)
        width = hidden_states.shape[-1]
        groups = width // getattr(self, "group_size", width)
        epsilon = getattr(self, eps)
        return family(hidden_states, gate, **parameters, eps=epsilon, groups=groups, **options)

    return forward


def _activation_forward(family):
    def forward(self, input):
        return family(input)

    return forward


@dataclass(frozen=True)
class _Reading:
    """An op with options, some of which are attributes of the module."""

    family: Family
    options: dict[str, Any]
    held: dict[str, str]

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.held:
            return self.family(*args, **kwargs, **self.options)
        return self.family(*args, **kwargs, **self.options, **self._read(module))

    def _read(self, module: nn.Module) -> dict[str, Any]:
        return {option: getattr(module, name) for option, name in self.held.items()}

    @functools.cached_property
    def of_linear(self) -> dict[str, Any]:
        """The options as `gated_linear` calls them."""
        if self.family.op == "geglu":
            return {"activation": GELU_NAMES[self.options.get("approximate", "tanh")]}
        return self.options

    def then(self, module: nn.Module, layer: Any, gate: Any, up: Any = None) -> Any:
        """The unit and the layer after it: one op where that layer is no more than its weight."""
        if not _is_plain(layer, gate):
            return layer(_as_kept(layer, self(module, gate, up)))
        read, own = self._read(module) if self.held else {}, layer._parameters
        return functional.gated_linear(
            gate, up, own["weight"], own["bias"], **self.of_linear, **read
        )


def _mlp_forwards(op, *names):
    if len(names) == 3:
        yield (), _separate(op, *names)
    else:
        yield ("packed",), _packed(op, *names)
        yield ("packed, up first",), _packed_up_first(op, *names)


def _separate(op, gate, up, down):
    def forward(self, x):
        return op.then(self, getattr(self, down), getattr(self, gate)(x), getattr(self, up)(x))

    return forward


def _packed(op, gate_up, down):
    def forward(self, x):
        return op.then(self, getattr(self, down), getattr(self, gate_up)(x))

    return forward


def _packed_up_first(op, up_gate, down):
    def forward(self, x):
        up, gate = getattr(self, up_gate)(x).chunk(2, -1)
        return op.then(self, getattr(self, down), gate, up)

    return forward


def _experts_forward(op, transposed):
    def forward(self, hidden_states, *routing, **kwargs):
        gate_up, down = self.gate_up_proj, self.down_proj
        if kwargs or not _is_served(self, hidden_states, gate_up):
            return type(self).forward(self, hidden_states, *routing, **kwargs)
        if transposed:
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        biases = (getattr(self, name, None) for name in EXPERTS_BIASES)
        y = op(
            self, hidden_states, *routing, gate_up, down,
            **dict(zip(("gate_up_bias", "down_bias"), biases, strict=True)),
        )  # fmt: skip
        # Autocast computes in its dtype, and experts return that of the tokens.
        return y.to(hidden_states.dtype)

    return forward


def _is_served(experts: Any, x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Say whether the op takes these, and nobody has chosen another implementation since."""
    if _implementation(experts) not in STOCK_EXPERTS or type(weight).__name__ == "DTensor":
        return False
    if weight.dtype != x.dtype and autocast_dtype(x.device.type) is None:
        return False
    # Where the reference would run because there are no kernels, it would run all the experts.
    return backend.chosen() != "auto" or backend.kernels_on(x)


def _is_plain(layer: Any, x: torch.Tensor) -> bool:
    """Say whether calling a layer is `F.linear` and nothing else, and the op serves x better.

    Adapters, quantised weights, sharding and offloading show as another class, hook or forward.
    """
    if (
        type(layer) is not nn.Linear
        or "forward" in layer.__dict__
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    ):
        return False
    # Not by the module's own getattr, which costs as much as the rest. A weight that somebody has
    # put there as a plain attribute is none of its parameters.
    weight = layer._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return False
    if weight.dtype is not x.dtype and autocast_dtype(x.device.type) is not x.dtype:
        return False
    # A checkpoint repeats a layer up to the last tensor that is kept: of F.linear its input, of the
    # op only what comes after the product, which would be computed again for nothing.
    if checkpointed():
        return False
    # Without kernels the backward pass would compute the product of the forward pass once more.
    return x.is_cuda or backend.chosen() != "auto"


def _as_kept(layer: Any, a: torch.Tensor) -> torch.Tensor:
    """What a layer gets that its model keeps in float32 and casts for, as T5's do."""
    weight = getattr(layer, "weight", None)
    if a.dtype is F32 or getattr(weight, "dtype", None) is not F32:
        return a
    return a if autocast_dtype(a.device.type) else a.float()


def _gate(op):
    def _apply_gate(self, gate_up_out):
        return op(self, gate_up_out)

    return _apply_gate


# Structure. Modules of other libraries are read through plain attributes, hence `Any`.


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module._parameters.items() if p is not None}


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _eps_name(module: nn.Module) -> str | None:
    return _number_name(module, EPS_NAMES)


def _number_name(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """Which of the names is an attribute that is a number."""
    return next((name for name in names if isinstance(getattr(module, name, None), float)), None)


def _implementation(experts: Any) -> str | None:
    """Which of transformers' implementations of experts the configuration names."""
    return getattr(getattr(experts, "config", None), "_experts_implementation", None)


def _is_transposed(experts: Any) -> bool:
    return getattr(experts, "is_transposed", False)


def _takes_a_gate(module: nn.Module) -> bool:
    parameters = inspect.signature(type(module).forward).parameters
    return list(parameters) == ["self", "hidden_states", "gate"]


def _width(module: nn.Module) -> int:
    """How many features a norm normalises; some insist on their number."""
    # Sharded parameters may be empty here; another width will do for most norms.
    sizes = [p.shape[-1] for p in _parameters(module).values() if p.numel()]
    return [48, *sizes, *getattr(module, "normalized_shape", ())][-1]


def _calls_torch_s_norm(norm: type) -> bool:
    """Say whether the forward of a class calls `F.layer_norm` or `F.rms_norm`."""
    forwards = (vars(cls)["forward"] for cls in norm.__mro__ if "forward" in vars(cls))
    codes = (getattr(inspect.unwrap(forward), "__code__", None) for forward in forwards)
    return any({"layer_norm", "rms_norm"} & set(getattr(code, "co_names", ())) for code in codes)


def _linears(module: nn.Module) -> dict[str, Any]:
    """Children that stand for one matrix: linear layers, also quantised or with an adapter."""

    def is_linear(child):
        sizes = (getattr(child, name, None) for name in ("in_features", "out_features"))
        return all(isinstance(size, int) for size in sizes)

    return {name: child for name, child in module.named_children() if is_linear(child)}


def _others(module: nn.Module) -> dict[str, nn.Module]:
    linears = _linears(module)
    return {name: child for name, child in module.named_children() if name not in linears}


def _roles(module: nn.Module) -> list[tuple[str, ...]]:
    """Every way to call the linear layers (gate, up, down), or (packed, down), that sizes allow."""
    linears = _linears(module)
    orders = itertools.permutations(linears)
    return [names for names in orders if _fits(*(linears[name] for name in names))]


def _fits(first: Any, *rest: Any) -> bool:
    *second, down = rest
    up = second[0] if second else first
    same = up.in_features == first.in_features and up.out_features == first.out_features
    width = first.out_features if second else first.out_features / 2
    return same and down.in_features == width and down.out_features == first.in_features


def _small_sizes(module: nn.Module) -> dict[int, int]:
    """Small sizes for a trial: distinct where the real ones are, and double where they are."""
    linears = _linears(module).values()
    sizes = sorted({size for c in linears for size in (c.in_features, c.out_features)})
    small = dict(zip(sizes, (12, 20, 28), strict=False))
    for size in sizes:
        if 2 * size in small and len(linears) == 2:
            small[2 * size] = 2 * small[size]
    return small
