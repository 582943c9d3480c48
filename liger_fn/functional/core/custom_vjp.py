"""custom_vjp: a differentiable op from two pure launchers, at home under every PyTorch transform.

    _scale = custom_vjp("scale", reference=..., fwd=..., bwd=..., results="y", grads="x")

JAX's contract in flat form, said by names (names.py):

    fwd(*inputs) -> (*results, *residuals)
    bwd(*what it names) -> (gradient or None for each name in grads)

PyTorch asks for each transform at a dispatcher key; there it is answered, and no caller branches:

    FuncTorchBatched  vmap      fold the batch into rows, else loop                   rules.py
    Autocast*         autocast  cast the declared inputs                              rules.py
    Autograd          VJP, JVP  a Function around (fwd, bwd); in forward mode the reference
    Python            DTensor   row-wise sharding strategies                          rules.py
    Meta              shapes    the launchers themselves, which launch nothing there
    CUDA, CPU         values    the kernels; the reference where Triton cannot run    backend.py

A Python autograd.Function alone would be differentiated by `torch.compile(torch.func.grad(f))`
without its backward; here the compiler sees one opaque op. In plain eager mode, when nothing
watches, a call skips the dispatcher altogether and costs what a bare autograd.Function costs.

The private PyTorch names of the package are all in this file, rules.py, backend.py and direct.py;
tests guard them.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter, or_
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch._functorch.utils import unwrap_dead_wrappers
from torch.compiler import is_compiling

from liger_fn.functional.core import rules
from liger_fn.functional.core.backend import first, kernels_on, on_device
from liger_fn.functional.core.names import Names, read_names
from liger_fn.functional.core.rules import as_tuple

_C = torch._C
_LIBRARY = torch.library.Library("liger_fn", "FRAGMENT")
_AFTER_AUTOGRAD = _C._after_autograd_keyset
_JVP = _C._functorch.TransformType.Jvp
_PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str}

_functorch_active = _C._are_functorch_transforms_active
_is_batched = _C._functorch.is_legacy_batchedtensor
_dispatch_modes = _C._len_torch_dispatch_stack
_any_requires_grad = _C._any_requires_grad
_autocast_active = _C._is_any_autocast_enabled
_jit_tracing_state = _C._get_tracing_state
_grad_enabled = torch.is_grad_enabled
_keep_graph = _C._autograd._get_current_graph_task_keep_graph
_saved_tensors_hooks = partial(_C._autograd._top_saved_tensors_default_hooks, True)


def custom_vjp(
    name: str,
    *,
    reference: Callable,
    fwd: Callable,
    bwd: Callable,
    results: str,
    grads: str,
    residuals: str = "",
    linear: str = "",
    total: str = "",
    unused: bool = False,
    rows: str = "",
    sums: str = "",
    core_dims: int = 1,
    autocast: str = "",
) -> Callable:
    """Join two launchers and a reference into one differentiable op. All names are space-separated.

    Args:
        name: the op becomes `torch.ops.liger_fn.<name>`, its backward
            `torch.ops.liger_fn.<name>_bwd`.
        reference: the meaning in differentiable PyTorch; takes the inputs by name, returns the
            results.
        fwd, bwd: pure launchers, returning tuples of fresh tensors. On meta tensors they only
            allocate. A bwd that is told that its residuals are `donated`, which nobody will read
            again, may write on them and return them.
        results, residuals: what fwd returns, in order; users see the results.
        grads: the inputs that bwd differentiates, in its order; the others are constants.
        linear: inputs that bwd does not need since the op is linear in them; the i-th has the shape
            and dtype of the i-th result.
        total: "s a b", if the result s is the sum of the inputs a and b, of one shape and dtype, on
            which the others depend through s alone. bwd then names s in their place, and returns
            one gradient, of a: b gets the same tensor, as from PyTorch's own sum.
        unused: whether bwd takes None for the cotangent of a result that nobody uses; else zeros
            are made.
        rows: inputs, results and residuals whose dimensions, all but the last `core_dims` of the
            largest, are independent rows. vmap then costs one launch, and DTensor shards them.
        sums: residuals that are sums over rows, in which bwd is linear.
        autocast: inputs that autocast casts.

    Returns:
        A function of the inputs, positional, that returns the result or the tuple of results.
    """
    names = read_names(
        name, fwd, bwd, results, residuals, grads, linear, total,
        rows=rows, sums=sums, autocast=autocast,
    )  # fmt: skip
    op = _Op(names, reference, on_device(fwd), on_device(bwd), unused)
    op.define(frozenset(rows.split()), frozenset(sums.split()), core_dims)
    rules.autocast(op.fwd_op, name, names.fwd, set(autocast.split()), _LIBRARY)
    return _entry(op, casts=bool(autocast))


def _entry(op: "_Op", casts: bool) -> Callable:
    """The function behind a public op: the launchers if nothing watches, else the dispatcher."""
    no_needs = (False,) * len(op.fwd_needs)
    fwd, fwd_op, apply, reference = op.fwd, op.fwd_op, op.apply, op.reference_results
    results = op.results
    returns_one = len(op.names.results + op.names.residuals) == 1

    def dispatched(*args):
        # Not by as_tuple: to symbolic tracing the returns are one proxy.
        out = fwd_op(*args)
        return out if returns_one else results(out)

    def call(*args):
        args += no_needs
        if is_compiling():
            return dispatched(*args)
        if watched(args) or args[0].is_meta or (casts and _autocast_active()):
            rules.sync_dtensor()
            return dispatched(*args)
        if not kernels_on(args[0]):
            return results(reference(*args))
        if _grad_enabled() and _any_requires_grad(*args):
            return apply(None, *args)
        return results(fwd(*args))

    call.__name__ = op.names.op
    call.op, call.bwd_op, call.names = op.fwd_op, op.bwd_op, op.names  # type: ignore[attr-defined]
    return call


# What may be watching a call


def watched(args: Sequence[Any]) -> bool:
    """Say whether a transform, a mode or a tensor subclass must see a call with these arguments."""
    return (
        _functorch_active()
        or _dispatch_modes() > 0
        or forward_ad._current_level >= 0
        or not _PLAIN_TYPES.issuperset(map(type, args))
        or _jit_tracing_state() is not None
    )


def _batched(cotangents: Sequence[torch.Tensor | None]) -> bool:
    """Say whether autograd pulls back many cotangents at once (`is_grads_batched`)."""
    return any(c is not None and _is_batched(c) for c in cotangents)


def forward_mode() -> bool:
    # A compiled jvp opens no dual level of its own, so the functorch stack is asked too.
    stack = _C._functorch.get_interpreter_stack() if _functorch_active() else ()
    return forward_ad._current_level >= 0 or any(level.key() == _JVP for level in stack)


@torch.compiler.assume_constant_result
def checkpointed() -> bool:
    """Say whether torch.utils.checkpoint keeps nothing of this forward pass and will repeat it."""
    hooks = _saved_tensors_hooks()
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def _below_autograd(op, keyset, args):
    # Function.forward runs without grad, but the outer functorch levels must still record.
    recording = torch.enable_grad() if _functorch_active() else contextlib.nullcontext()
    with _C._AutoDispatchBelowAutograd(), recording:
        return op.redispatch(keyset & _AFTER_AUTOGRAD, *args)


def _pick(index: Sequence[int], pool: Sequence[Any]) -> tuple:
    return tuple([pool[i] for i in index])


def _picker(index: Sequence[int]) -> Callable[[Sequence[Any]], tuple]:
    """The same, faster, of one index; Dynamo cannot trace it."""
    return itemgetter(*index) if len(index) > 1 else partial(_pick, index)


class _Op:
    """One op: its names, its launchers, their references, its two dispatcher ops."""

    def __init__(
        self, names: Names, reference: Callable, fwd: Callable, bwd: Callable, unused: bool
    ) -> None:
        self.names, self.reference, self.fwd, self.bwd = names, reference, fwd, bwd
        self.unused = unused
        self.fwd_needs = names.fwd[len(names.inputs) :]
        n_results = len(names.results)
        self.results = (lambda r: r[0]) if n_results == 1 else (lambda r: r[:n_results])

    def define(self, rows: frozenset[str], sums: frozenset[str], core_dims: int) -> None:
        """Register both dispatcher ops, with every rule."""
        names = self.names
        rows = rows | {"d" + n for n in rows}

        self.fwd_op = _define(names.fwd_schema, self.fwd, self.reference_fwd_with_residuals)
        self.bwd_op = _define(names.bwd_schema, self.bwd, self.reference_bwd)
        returns = names.results + names.residuals

        def all_made(args):
            return (True,) * len(returns)

        def needed(args):
            return [need for _, need in self.wanted(dict(zip(names.bwd, args, strict=True)))]

        rules.register(
            rules.RowWise(self.fwd_op, names.fwd, returns, rows, sums, core_dims, all_made),
            _LIBRARY,
        )
        rules.register(
            rules.RowWise(self.bwd_op, names.bwd, names.gradients, rows, sums, core_dims, needed),
            _LIBRARY,
        )
        self.apply = _register_autograd(
            names.op, self.fwd_op, _vjp_function(self), self.reference_fwd, self._has_no_kernels
        )
        _register_autograd(
            names.op + "_bwd", self.bwd_op, _vjp_of_vjp_function(self), self.reference_bwd, _never
        )

    def wanted(self, values: dict[str, Any]) -> list[tuple[str, bool]]:
        """Each differentiable input, and whether bwd called with `values` gives its gradient."""
        return [(n, values.get("need_d" + n, True)) for n in self.names.grads]

    # The references of both passes, in the order of the dispatcher ops

    def reference_results(self, *args) -> tuple:
        """The results by the reference, with gradients for none but the differentiable inputs."""
        names = self.names
        differentiable = {*names.gradient_of, *names.statics}
        inputs = {
            n: x if n in differentiable or x is None else x.detach()
            for n, x in zip(names.inputs, args, strict=False)
        }
        return as_tuple(self.reference(**inputs))

    def reference_fwd(self, *args) -> tuple:
        """The results, then an empty token for each residual: nobody reads it."""
        tokens = (first(args).new_zeros(()),) * len(self.names.residuals)
        return self.reference_results(*args) + tokens

    def reference_fwd_with_residuals(self, *args) -> tuple:
        """The same with residuals of their true shapes: a compiled graph checks shapes."""
        results = self.reference_results(*args)
        on_meta = (a.to("meta") if isinstance(a, torch.Tensor) else a for a in args)
        residuals = self.fwd(*on_meta)[len(results) :]
        return results + tuple(
            None if r is None else torch.zeros_like(r, device=first(args).device) for r in residuals
        )

    def reference_bwd(self, *args) -> tuple:
        values = dict(zip(self.names.bwd, args, strict=True))
        wanted = self.wanted(values)
        gradients = iter(self._reference_vjp(values))
        return tuple(next(gradients) if need else None for _, need in wanted)

    def _reference_vjp(self, values: dict[str, Any]) -> tuple:
        """The gradients that `values` ask for, by differentiating the reference."""
        names = self.names
        cotangents = tuple(values[c] for c in names.cotangents)
        # The op is linear in these, so any point gives its derivative.
        anywhere = {
            n: None if c is None else torch.zeros_like(c)
            for n, c in zip(names.linear, cotangents, strict=False)
        }
        if names.total:
            total, first_summand, second_summand = names.total
            anywhere[first_summand] = values[total]
            anywhere[second_summand] = torch.zeros_like(values[total])
        inputs = {n: values[n] if n in values else anywhere[n] for n in names.inputs}
        wanted = [n for n, need in self.wanted(values) if need]

        def results_of(*wanted_values):
            given = inputs | dict(zip(wanted, wanted_values, strict=True))
            out = as_tuple(self.reference(**given))
            return tuple(r for r, c in zip(out, cotangents, strict=True) if c is not None)

        pull = torch.func.vjp(results_of, *(inputs[n] for n in wanted))[1]
        return pull(tuple(c for c in cotangents if c is not None))

    def _has_no_kernels(self, args: Sequence[Any]) -> bool:
        return not kernels_on(first(args))


def _never(args: Sequence[Any]) -> bool:
    return False


def _define(schema: str, launch: Callable, reference: Callable):
    """Define a dispatcher op: values by kernels or reference, shapes by the launcher."""
    name = schema[: schema.index("(")]
    single = schema.count("Tensor", schema.index("->")) == 1

    def values(*args):
        out = launch(*args) if kernels_on(first(args)) else reference(*args)
        return out[0] if single else out

    def shapes(*args):
        out = launch(*args)
        return out[0] if single else out

    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, values, "CPU")
    _LIBRARY.impl(name, values, "CUDA")
    _LIBRARY.impl(name, shapes, "Meta")
    return getattr(torch.ops.liger_fn, name).default


# Autograd


def _register_autograd(
    name: str, op, function: type, reference: Callable, decomposes: Callable
) -> Callable:
    """Register the Autograd kernel of `op`; return the function's `apply`.

    It is the C++ entry of autograd.Function: Function.apply in Python would hand functorch levels
    to a higher-order op of their own.
    """
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def kernel(keyset, *args):
        rules.sync_dtensor()
        if forward_mode() or decomposes(args):
            out = reference(*args)
            return out if len(out) > 1 else out[0]
        if not (_grad_enabled() and _any_requires_grad(*args)):
            if _functorch_active():
                return _below_autograd(op, keyset, args)
            return op.redispatch(keyset & _AFTER_AUTOGRAD, *args)
        in_functorch = _functorch_active()
        with enable_single_level_autograd_function() if in_functorch else contextlib.nullcontext():
            return apply(keyset, *args)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    return apply


def _either_summand(names: Names) -> Callable[[tuple, Sequence[bool]], tuple]:
    """The needs of bwd where it gives one gradient for two summands: it is wanted for either."""
    if not names.total:
        return lambda needs, needed: needs
    at, also = names.grads.index(names.total[1]), 1 + names.fwd.index(names.total[2])
    return lambda needs, needed: (*needs[:at], needs[at] or needed[also], *needs[at + 1 :])


def _vjp_function(op: _Op) -> type:
    """The first derivative: fwd, keep what bwd names, bwd."""
    names = op.names
    n_results, n_inputs = len(names.results), len(names.inputs)
    pool = names.saved + names.cotangents + names.statics + names.needs + ("donated",)
    returned = names.fwd + names.results + names.residuals
    pick_saved = _picker([returned.index(n) for n in names.saved])
    pick_statics = _picker([names.fwd.index(n) for n in names.statics])
    # ctx.needs_input_grad counts the keyset first
    needs_at = [1 + names.fwd.index(n) for n in names.grads]
    fwd_needs_at = [needs_at[names.needs.index(n)] for n in op.fwd_needs]
    bwd_at = [pool.index(n) for n in names.bwd]
    nothing, gradient_of = len(names.grads), names.gradient_of
    grads_at = [nothing] + [
        names.grads.index(gradient_of[n]) if n in gradient_of else nothing for n in names.fwd
    ]
    pick_needs, pick_fwd_needs, arrange, spread = map(
        _picker, (needs_at, fwd_needs_at, bwd_at, grads_at)
    )
    for_summands = _either_summand(names)
    takes_donations = "donated" in names.bwd
    materialize = n_results > 1 and not op.unused

    class Vjp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, *args):  # keyset None: the direct path, past the dispatcher
            if fwd_needs_at:
                needs = pick_fwd_needs(ctx.needs_input_grad)
                if keyset is not None:
                    # An outer level may have asked already; the direct path asks for nothing.
                    needs = tuple(map(or_, needs, args[n_inputs:]))
                args = args[:n_inputs] + needs
            out = (
                op.fwd(*args)
                if keyset is None
                else as_tuple(_below_autograd(op.fwd_op, keyset, args))
            )
            ctx.save_for_backward(*pick_saved((*args, *out)))
            ctx.statics, ctx.direct = pick_statics(args), keyset is None
            # Hooks may keep what is saved, or give it back more than once.
            ctx.private = takes_donations and keyset is None and not _saved_tensors_hooks()
            ctx.set_materialize_grads(materialize)
            if keyset is None:
                return op.results(out)
            ctx.mark_non_differentiable(*(t for t in out[n_results:] if t is not None))
            return out if len(out) > 1 else out[0]

        @staticmethod
        def backward(ctx, *cotangents):
            cotangents = cotangents[:n_results]
            if cotangents[0] is None and all(c is None for c in cotangents):
                return (None,) * (len(names.fwd) + 1)
            if is_compiling():
                needs = for_summands(_pick(needs_at, ctx.needs_input_grad), ctx.needs_input_grad)
                args = (*ctx.saved_tensors, *cotangents, *ctx.statics, *needs, False)
                args = _pick(bwd_at, args)
                return _pick(grads_at, (*as_tuple(op.bwd_op(*args)), None))
            needs = for_summands(pick_needs(ctx.needs_input_grad), ctx.needs_input_grad)
            direct = ctx.direct and not (
                _grad_enabled() or watched(cotangents) or _batched(cotangents)
            )
            donated = direct and ctx.private and not _keep_graph()
            args = arrange((*ctx.saved_tensors, *cotangents, *ctx.statics, *needs, donated))
            if direct:
                gradients = op.bwd(*args)
            elif forward_mode():
                # No functorch level can be opened inside a forward-mode dispatcher kernel; here it
                # can.
                gradients = op.reference_bwd(*unwrap_dead_wrappers(args))
            else:
                gradients = as_tuple(op.bwd_op(*args))
            return spread((*gradients, None))

    Vjp.__name__ = names.op
    return Vjp


def _vjp_of_vjp_function(op: _Op) -> type:
    """All higher derivatives: bwd's values by the kernels, its derivative by the reference."""
    names = op.names

    class VjpOfVjp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, *args):
            tensors = [n for n in names.bwd if names.is_tensor(n)]
            values = dict(zip(names.bwd, args, strict=True))
            ctx.save_for_backward(*(values[n] for n in tensors))
            ctx.statics = {n: v for n, v in values.items() if not names.is_tensor(n)}
            ctx.tensors = tensors
            return _below_autograd(op.bwd_op, keyset, args)

        @staticmethod
        def backward(ctx, *cotangents):
            values = {**dict(zip(ctx.tensors, ctx.saved_tensors, strict=True)), **ctx.statics}
            # Of a total bwd knows nothing but the sum, at whichever of its summands.
            inputs = [names.total[0] if n in names.total else n for n in names.grads]
            wrt = [n for n in (*inputs, *names.cotangents) if values.get(n) is not None]

            def bwd_of(*wrt_values):
                return op._reference_vjp({**values, **dict(zip(wrt, wrt_values, strict=True))})

            out, pull = torch.func.vjp(bwd_of, *(values[n] for n in wrt))
            given = [c for c, (_, need) in zip(cotangents, op.wanted(values), strict=True) if need]
            gradients = pull(
                tuple(
                    torch.zeros_like(o) if c is None else c for c, o in zip(given, out, strict=True)
                )
            )
            by_name = dict(zip(wrt, gradients, strict=True))
            return (None, *(by_name.get(n) for n in names.bwd))

    VjpOfVjp.__name__ = names.op + "_bwd"
    return VjpOfVjp
