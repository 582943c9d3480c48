"""Causal attention without a mask, also in compiled code.

A model that is given neither a mask nor positions nor a cache attends to all that came before.
Transformers then leaves the mask out, so that attention can run its causal kernels; but it finds
this out by reading positions back from the device, which compiled code cannot: there it makes a
mask after all, and attention computes the half that is masked, on keys repeated for all heads.

That nothing was given can be seen where the model is called, without reading anything. The forward
that is put there runs the original's code for such calls, with one name in its globals changed:
`create_causal_mask` answers None, as it would outside of compiled code. All other calls go to the
original.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn
from transformers import masking_utils

from liger_fn.hf.probe import Candidate, Proof, Rejected, check_own, quiet

OP = "causal_mask"
MAKER = "create_causal_mask"
# What may say that more is masked; from version 5.24 on the last is called `cache`.
MASK, POSITIONS, CACHES = "attention_mask", "position_ids", ("past_key_values", "cache")
# What a plain causal mask is made of.
USUAL = ("config", "inputs_embeds", POSITIONS, *CACHES)


def masked_models(model: nn.Module) -> Iterator[nn.Module]:
    """Find the modules whose forward makes the causal mask."""
    for module in model.modules():
        forward: Any = inspect.unwrap(type(module).forward)
        code = getattr(forward, "__code__", None)
        if code is not None and MAKER in code.co_names:
            yield module


def prove_unmasked(module: Any) -> Proof:
    """Write the forward that makes no mask where nothing was given.

    Raises:
        Rejected: the forward is not known to be of that kind, or makes a mask in any case.
    """
    check_own(module, "forward")
    forward = type(module).forward
    inner: Any = inspect.unwrap(forward)
    names = tuple(inspect.signature(inner).parameters)[1:]
    if inner.__globals__.get(MAKER) is not masking_utils.create_causal_mask:
        raise Rejected(f"calls a {MAKER} of its own")
    if not {MASK, POSITIONS} <= set(names) or not set(CACHES) & set(names):
        raise Rejected("does not take a mask, positions and a cache")
    # Positions that are counted are those of one sequence; others may say where sequences begin.
    if "arange" not in inner.__code__.co_names or "cumsum" in inner.__code__.co_names:
        raise Rejected("does not count its positions")
    if not _leaves_the_mask_out(module.config):
        raise Rejected("has attention that needs a mask in any case")
    run = _forward(_rebound(forward, {MAKER: _no_mask}), names)
    return Proof(Candidate(OP, "is_causal", run), 0.0, 0.0)


def _forward(unmasked: Callable, names: tuple[str, ...]) -> Callable:
    def forward(self, *args, **kwargs):
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if (
            self.config._attn_implementation != "sdpa"
            or any(given.get(name) is not None for name in (MASK, POSITIONS, *CACHES))
            # What is exported may be run on a single token, where nothing is masked.
            # (Of `is_exporting` Dynamo says True in PyTorch 2.11, whatever it does.)
            or torch.compiler._is_exporting_flag
            or torch.jit.is_tracing()
        ):
            return type(self).forward(self, *args, **kwargs)
        return unmasked(self, *args, **kwargs)

    return forward


def _no_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Make no causal mask; whatever else is asked for, as ever."""
    more = (value for name, value in kwargs.items() if name not in USUAL)
    if args or any(value is not None for value in more):
        return masking_utils.create_causal_mask(*args, **kwargs)
    return None


def _leaves_the_mask_out(config: Any) -> bool:
    """Ask transformers: does it make no mask for four tokens in a row?"""
    if config._attn_implementation != "sdpa":
        return False
    with quiet():
        mask = masking_utils.create_causal_mask(
            config=config,
            inputs_embeds=torch.zeros(2, 4, 1),
            attention_mask=None,
            position_ids=torch.arange(4)[None],
            **_no_cache(),
        )
    return mask is None


def _no_cache() -> dict[str, None]:
    taken = inspect.signature(masking_utils.create_causal_mask).parameters
    return dict.fromkeys(set(CACHES) & set(taken))


def _rebound(function: Any, changes: dict[str, Any]) -> Any:
    """Copy a function, inside all its decorators, with other values for some of its globals."""
    wrapped, namespace, closure = (
        getattr(function, "__wrapped__", None),
        function.__globals__,
        function.__closure__,
    )
    if wrapped is None:
        namespace = {**namespace, **changes}
        # By this name Dynamo would look for the globals in the module.
        del namespace["__name__"]
    else:
        inside = _rebound(wrapped, changes)
        held = [cell.cell_contents is wrapped for cell in closure or ()]
        if not any(held):
            raise Rejected("has a forward that a decorator hides")
        closure = tuple(
            CellType(inside) if holds else cell for cell, holds in zip(closure, held, strict=True)
        )
    copy = FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, closure
    )
    copy.__kwdefaults__, copy.__module__ = function.__kwdefaults__, function.__module__
    copy.__qualname__ = function.__qualname__
    return copy
