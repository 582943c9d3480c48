"""A function of tokens, a tile of them at a time, forward and backward.

    y       = concat_i f(x_i, params)             x = concat_i x_i, along the tokens
    dx_i    = dy_i · ∂f(x_i, params)/∂x_i         dparams = Σ_i dy_i · ∂f(x_i, params)/∂params

The backward pass computes each tile again, with what autograd keeps of it, and lets go of that
before the next: memory holds the intermediates of one tile. Each parameter gets one gradient a
pass, by the ordinary way, so that whoever waits for gradients (DDP, FSDP2, hooks) sees what it sees
of any other function; their sums over tiles are held in float32.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.checkpoint import checkpoint

from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import forward_mode
from liger_fn.functional.core.launch import accumulator
from liger_fn.functional.core.rules import autocast_dtype


def reference(
    fn: Callable[..., Tensor], x: Tensor, tiles: int, params: Sequence[Tensor] | None = None
) -> Tensor:
    return fn(x, *(params or ()))


def _fails_if_it_captures(y: Tensor) -> Tensor:
    """Of inputs without grad the result has none, or the gradient of something else is lost."""
    if y.requires_grad:
        contract = "get by `params` all that requires grad, or be a module"
        check.fail("tiled_mlp", "fn", contract, "a result that requires grad by other ways")
    return y


def _under(dtype: torch.dtype | None, device: torch.device) -> torch.autocast:
    """The autocast of the forward pass, which no backward pass is in by itself."""
    if device.type == "meta":
        return torch.autocast("cpu", enabled=False)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


class _Tiled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(fn, tiles, dtype, recorded, x, *params):
        params = [p.detach() for p in params]
        first, *rest = x.detach().chunk(tiles, -2)
        with torch.set_grad_enabled(recorded):
            results = [_fails_if_it_captures(fn(first, *params))]
        results += [fn(tile, *params) for tile in rest]
        return torch.cat(results, -2)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.fn, ctx.tiles, ctx.dtype, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, dy):
        x, *params = ctx.saved_tensors
        need_x, *need_params = ctx.needs_input_grad[4:]
        wanted = [i for i, need in enumerate(need_params) if need]
        # A higher derivative, or a transform, differentiates what is done here.
        pull = _pull_by_transform if torch.is_grad_enabled() else _pull
        dx, totals = [], None
        with _under(ctx.dtype, x.device):
            for tile, dtile in zip(x.chunk(ctx.tiles, -2), dy.chunk(ctx.tiles, -2), strict=True):
                d, dparams = pull(ctx.fn, tile, params, need_x, wanted, dtile)
                dx.append(d)
                totals = _added(totals, [g.to(accumulator(g.dtype)) for g in dparams])
        gradients = dict(zip(wanted, totals or (), strict=True))
        return (
            *(None, None, None, None),
            torch.cat(dx, -2) if need_x else None,
            *(gradients[i].to(p.dtype) if i in gradients else None for i, p in enumerate(params)),
        )


def _added(totals: list[Tensor] | None, more: list[Tensor]) -> list[Tensor]:
    """Not in place: two parameters may have one gradient, which may be the cotangent itself."""
    if totals is None:
        return more
    for i, m in enumerate(more):
        totals[i] = totals[i] + m
    return totals


Pulled = tuple[Tensor | None, Sequence[Tensor]]


def _pull(
    fn: Callable, tile: Tensor, params: list[Tensor], need_x: bool, wanted: list[int], dy: Tensor
) -> Pulled:
    """The gradients of one tile, by autograd."""
    tile = tile.detach().requires_grad_(need_x)
    params = [p.detach().requires_grad_(i in wanted) for i, p in enumerate(params)]
    with torch.enable_grad():
        y = fn(tile, *params)
    leaves = [tile] * need_x + [params[i] for i in wanted]
    gradients = torch.autograd.grad(y, leaves, dy, materialize_grads=True)
    return (gradients[0] if need_x else None), gradients[need_x:]


def _pull_by_transform(
    fn: Callable, tile: Tensor, params: list[Tensor], need_x: bool, wanted: list[int], dy: Tensor
) -> Pulled:
    """The same as a function that can be differentiated."""

    def of_wanted(tile: Tensor, *values: Tensor) -> Tensor:
        given = list(params)
        for i, value in zip(wanted, values, strict=True):
            given[i] = value
        return fn(tile, *given)

    pull = torch.func.vjp(of_wanted, tile, *(params[i] for i in wanted))[1]
    d, *dparams = pull(dy)
    return (d if need_x else None), dparams


def tiled_mlp(
    fn: Callable[..., Tensor], x: Tensor, tiles: int, params: Sequence[Tensor] | None = None
) -> Tensor:
    """Compute a function of tokens a tile at a time, so that the intermediates of one are held.

        y = concat_i fn(x_i, *params),  x = concat_i x_i along the tokens

    Args:
        fn: a module, or a function of a tile and params. Each token must be computed by itself, and
            twice the same: no dropout, no batch norm. A module's parameters get their gradients.
        x: (..., T, D), floating point: T tokens.
        tiles: how many tiles T is cut into, at most; 1: none. Where the width between is F, T · F
            numbers become T · F / tiles.
        params: the tensors that fn takes after the tile; None: none. Whatever fn depends on and
            requires grad must be among them, unless it is a module's parameter.

    Returns:
        (..., T, E), what fn(x, *params) is.

    Raises:
        TypeError: fn cannot be called, x is not floating point, tiles is no number.
        ValueError: x has no dimension of tokens, tiles is not positive, params are given to a
            module, or fn depends on a tensor that requires grad and is not in params.

    Precision: that of fn; the gradients of parameters are added up in float32 (float64 for float64)
        over the tiles, and rounded once more where that is wider.
    Memory: forward x, y and the intermediates of one tile; x and the parameters live until the
        backward pass, which holds what autograd keeps of one tile, and the gradients of the
        parameters in float32. Under torch.compile tiles are checkpointed, and the compiler
        decides; forward mode takes all tokens at once.
    Source: Bekman et al., "Arctic Long Sequence Training", 2025 (sequence tiling).
    """
    op = "tiled_mlp"
    if not callable(fn):
        check.fail(op, "fn", "be a module or a function", type(fn).__name__, TypeError)
    check.floating(op, "x", x)
    if x.dim() < 2:
        check.fail(op, "x", "have shape (..., T, D)", check.spell(x.shape))
    positive = isinstance(tiles, (int, torch.SymInt)) and tiles > 0
    check.number(op, "tiles", tiles, "be a positive integer", positive)
    function, tensors = fn, tuple(params or ())
    if isinstance(fn, nn.Module):
        if tensors:
            check.fail(op, "params", "be None for a module, which has its own", len(tensors))
        function, tensors = _functional(fn)

    if forward_mode():
        return function(x, *tensors)
    if is_compiling():
        options: dict[str, Any] = {"use_reentrant": False}
        parts = [checkpoint(function, tile, *tensors, **options) for tile in x.chunk(tiles, -2)]
        return torch.cat(parts, -2)
    dtype, recorded = autocast_dtype(x.device.type), torch.is_grad_enabled()
    return _Tiled.apply(function, tiles, dtype, recorded, x, *tensors)


def _functional(module: nn.Module) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A module as a function of its input and parameters."""
    parameters = dict(module.named_parameters())

    def function(tile: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(module, given, (tile,))

    return function, tuple(parameters.values())
