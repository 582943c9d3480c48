"""Argument errors, one sentence each, from metadata only: op: `x` must <contract>; got <fact>."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from liger_fn.functional.core import rules

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def fail(
    op: str, name: str, contract: str, got: Any, error: type[Exception] = ValueError
) -> NoReturn:
    """Raise `error` with the one sentence that all ops use."""
    raise error(f"{op}: `{name}` must {contract}; got {got}.")


def tensor(op: str, name: str, x: Any) -> None:
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        fail(op, name, "be a tensor", type(x).__name__, TypeError)


def floating(op: str, name: str, x: Any) -> None:
    if isinstance(x, torch.Tensor) and x.dtype in FLOATS:
        return
    tensor(op, name, x)
    if x.dtype not in FLOATS:
        fail(
            op,
            name,
            "have a floating-point dtype (float16, bfloat16, float32, float64)",
            x.dtype,
            TypeError,
        )


def integer(op: str, name: str, x: Any) -> None:
    tensor(op, name, x)
    if x.dtype not in INTEGERS:
        fail(op, name, "have an integer dtype", x.dtype, TypeError)


def dtype(op: str, name: str, x: torch.Tensor, like: torch.Tensor, like_name: str) -> None:
    if x.dtype != like.dtype:
        fail(op, name, f"have the dtype of `{like_name}`, {like.dtype}", x.dtype, TypeError)


def dtype_inside(op: str, name: str, x: torch.Tensor, like: torch.Tensor, like_name: str) -> None:
    """Check a dtype as an op sees it: autocast makes one of two."""
    if x.dtype is not like.dtype and rules.dtype_inside(x) is not rules.dtype_inside(like):
        dtype(op, name, x, like, like_name)


def device(op: str, name: str, x: torch.Tensor, like: torch.Tensor, like_name: str) -> None:
    if x.device != like.device:
        fail(op, name, f"be on the device of `{like_name}`, {like.device}", x.device)


def shape(op: str, name: str, x: torch.Tensor, expected: Sequence[int], because: str) -> None:
    """Check an exact shape; `because` says where it comes from."""
    if x.shape != expected and tuple(x.shape) != tuple(expected):
        fail(op, name, f"have shape {spell(expected)}, {because}", spell(x.shape))


def at_least_1d(op: str, name: str, x: torch.Tensor) -> None:
    if x.dim() == 0:
        fail(op, name, "have at least one dimension", "a scalar")


def one_of(op: str, name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        fail(op, name, f"be one of {', '.join(map(repr, allowed))}", repr(value))


def number(op: str, name: str, value: Any, contract: str, ok: bool) -> None:
    """Check a plain number; `ok` is the contract's answer."""
    if ok and type(value) in (float, int):
        return
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) or isinstance(value, bool):
        fail(op, name, "be a number", type(value).__name__, TypeError)
    if not ok:
        fail(op, name, contract, value)


def spell(sizes: Sequence[int]) -> str:
    """A shape as Python writes it, symbolic sizes included."""
    return "(" + ", ".join(map(str, sizes)) + ("," if len(sizes) == 1 else "") + ")"
