"""The rules that follow from declarations: vmap and DTensor from shared rows, and autocast."""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

_C = torch._C


@dataclass(frozen=True)
class RowWise:
    """Which arguments and returns of a dispatcher op are made of independent rows.

    `rows` names them, with their gradients and cotangents; all dimensions but the last `core_dims`
    of the largest are rows. `sums` names inputs that are sums over rows in which the op is linear.
    `made(args)` says which returns a call under vmap may produce.
    """

    op: Any
    arguments: tuple[str, ...]
    returns: tuple[str, ...]
    rows: frozenset[str]
    sums: frozenset[str]
    core_dims: int
    made: Callable[[Sequence[Any]], Sequence[bool]]


_unknown_to_dtensor: list[RowWise] = []


def as_tuple(r: Any) -> tuple:
    return tuple(r) if isinstance(r, (tuple, list)) else (r,)


def register(declared: RowWise, lib: torch.library.Library) -> None:
    """Register the vmap rule of an op now, and its DTensor strategies once DTensor is imported."""
    torch.library.register_vmap(declared.op, _vmap_rule(declared), lib=lib)
    _unknown_to_dtensor.append(declared)


def _vmap_rule(d: RowWise) -> Callable:
    def rule(info, dims, *args):
        batched = {n for n, dim in zip(d.arguments, dims, strict=True) if dim is not None}
        wanted = {n for n, made in zip(d.returns, d.made(args), strict=True) if made}
        if batched | wanted <= d.rows:
            out = as_tuple(d.op(*_with_batch_as_rows(d, info.batch_size, dims, args)))
        else:
            out = _one_call_per_sample(d, info.batch_size, dims, args)
        # A token in a residual's place has no dimension.
        out_dims = tuple(None if t is None or t.dim() == 0 else 0 for t in out)
        return (out, out_dims) if len(out) > 1 else (out[0], out_dims[0])

    return rule


def _with_batch_as_rows(d: RowWise, size: int, dims, args) -> list:
    def lead(name, x, dim):
        if name not in d.rows or x is None:
            return x
        return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)

    return [lead(*each) for each in zip(d.arguments, args, dims, strict=True)]


def _one_call_per_sample(d: RowWise, size: int, dims, args) -> tuple:
    calls = [
        as_tuple(
            d.op(
                *(x if dim is None else x.select(dim, i) for x, dim in zip(args, dims, strict=True))
            )
        )
        for i in range(size)
    ]
    return tuple(
        None if parts[0] is None else torch.stack(parts) for parts in zip(*calls, strict=True)
    )


def sync_dtensor() -> None:
    """Tell DTensor, once it is imported, how the ops shard."""
    if not _unknown_to_dtensor or "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    keys = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    while _unknown_to_dtensor:
        declared = _unknown_to_dtensor.pop()
        register_sharding(declared.op)(_sharding_rule(declared))
        # A strategy is remembered by the tensors of a call and what follows the first integer. But
        # which gradients are wanted, by which there are returns or none, may follow no integer.
        # Floats decide nothing, and an annealed one is another in every call.
        keys[declared.op] = RuntimeSchemaInfo(_first_flag(declared.op), needs_pytree=True)


def _first_flag(op: Any) -> int:
    """Where the arguments of an op begin that are neither tensors nor floats."""
    kinds = [str(a.type) for a in op._schema.arguments]
    flags = (i for i, k in enumerate(kinds) if "Tensor" not in k and "float" not in k)
    return next(flags, len(kinds))


def _made_on_meta(d: RowWise, specs: Sequence[Any]) -> list[bool]:
    """Ask the shapes which returns a call makes, for DTensor wants a placement of these alone.

    A call that nobody will differentiate may keep nothing. A mode that watches calls is not to see
    this one; of symbolic sizes only the mode that made them knows.
    """
    metas = [getattr(s, "tensor_meta", None) for s in specs]
    known = all(type(n) is int for m in metas if m for n in (*m.shape, *m.stride))
    with _disable_current_modes() if known else nullcontext(), _C._AutoDispatchBelowAutograd():
        on_meta = (
            torch.empty_strided(m.shape, m.stride, dtype=m.dtype, device="meta") if m else s
            for m, s in zip(metas, specs, strict=True)
        )
        return [r is not None for r in as_tuple(d.op(*on_meta))]


def _sharding_rule(d: RowWise) -> Callable:
    """Rows shard together; other inputs replicate; other outputs are partial sums."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    def placed(specs, made, row, total) -> tuple[list, list]:
        outs = [
            (row if n in d.rows else total) if is_made else None
            for n, is_made in zip(d.returns, made, strict=True)
        ]
        ins = [
            (row if n in d.rows else total if n in d.sums else Replicate())
            if hasattr(s, "ndim")
            else None
            for n, s in zip(d.arguments, specs, strict=True)
        ]
        return outs, ins

    def strategies(*specs):
        row_dims = [
            s.ndim
            for n, s in zip(d.arguments, specs, strict=True)
            if n in d.rows and hasattr(s, "ndim")
        ]
        shards = max(row_dims, default=d.core_dims) - d.core_dims
        made = _made_on_meta(d, specs)
        return [placed(specs, made, Replicate(), Replicate())] + [
            placed(specs, made, Shard(i), Partial()) for i in range(shards)
        ]

    return strategies


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast gives a matrix product on a type of device; None if it is off."""
    # Asked about the meta device, PyTorch raises.
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def dtype_inside(x: torch.Tensor) -> torch.dtype:
    """The dtype in which an op sees x that autocast casts."""
    given = autocast_dtype(x.device.type)
    return x.dtype if given is None or x.dtype is torch.float64 else given


def _casts(x: torch.Tensor | None) -> bool:
    """Autocast leaves integers and float64 alone, as for PyTorch's own ops."""
    return x is not None and x.is_floating_point() and x.dtype is not torch.float64


def autocast(op, schema_name: str, arguments: tuple[str, ...], cast: set[str], lib) -> None:
    """Under autocast, cast the inputs named in `cast` to the autocast dtype."""
    for device in ("cuda", "cpu") if cast else ():
        key = _C.DispatchKeySet(getattr(_C.DispatchKey, f"Autocast{device.upper()}"))

        def kernel(keyset, *args, device=device, key=key):
            dtype = torch.get_autocast_dtype(device)
            with _C._ExcludeDispatchKeyGuard(key):
                return op(
                    *(
                        x.to(dtype) if n in cast and _casts(x) else x
                        for n, x in zip(arguments, args, strict=True)
                    )
                )

        lib.impl(schema_name, kernel, f"Autocast{device.upper()}", with_keyset=True)
