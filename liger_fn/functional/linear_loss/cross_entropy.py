"""Cross entropy of a linear head, C rows of logits at a time.

    logits = x · weightᵀ + bias         loss = Σ_rows cross_entropy(logits, y)

    g  = dloss/dlogits                  dweight = gᵀ · x
    dx = g · weight                     dbias   = Σ_rows g

`logits` and `g` share one buffer of C rows, in the dtype of x; the kernel of loss/cross_entropy.py
writes g over the logits: 6 bytes move per 2-byte logit. All else is matrix products: 2·N·H·V
operations for the loss, 4·N·H·V for the gradients.

A sum has one upstream number, so its gradients are made in the forward pass, for an upstream of 1
(`unit_dx`, `unit_dweight`, `unit_dbias`; only those wanted), and the backward pass multiplies them
by that number. They are held in float32, since then each is rounded once, at the very end; in 16
bits the product with the upstream number would be a second rounding, and float16 might overflow.
Losses by row have an upstream number each: forward keeps `lse`, 4 bytes a row, and backward makes
the logits again, another 2·N·H·V operations.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.launch import (
    accumulator,
    cdiv,
    has_work,
    tl,
    triton,
    unit_stride,
)
from liger_fn.functional.core.rules import autocast_dtype
from liger_fn.functional.loss.cross_entropy import (
    check_options,
    check_target,
    launch_rows,
    mean,
    reduced,
    reference_rows,
)


def reference(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    chunk_size: int | None = None,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    options = {
        "class_weight": class_weight,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "logit_scale": logit_scale,
    }
    loss = reference_of_rows(weight, x, y, bias, chunk_size, **options)
    return reduced(loss, y, class_weight, ignore_index, reduction)


def reference_of_rows(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    chunk_size: int | None,
    **options: Any,
) -> Tensor:
    return reference_rows(F.linear(x, weight, bias), y, **options)


def reference_of_sum(**arguments: Any) -> Tensor:
    return reference_of_rows(**arguments).sum()


# The entries of g are probabilities: in a large vocabulary they lie where float16 has few bits left
# or none. 256 times as large they do not, and cannot overflow unless class weight, logit scale and
# z-loss together take an entry to 255.
_UNIT = {torch.float16: 256.0}

_BUFFER_BYTES = 1 << 30


def _chunk_size(N: int, V: int, H: int, itemsize: int) -> int:
    """Rows per chunk: few large products run at full speed.

    The buffer takes 1 GiB, or as much as the weight if that is more. Multiples of 128 rows fill the
    tiles of the products, and equal chunks leave no stub.
    """
    most = max(1, max(_BUFFER_BYTES // itemsize, V * H) // V)
    if most >= N:
        return N
    tile = min(128, most)
    balanced = cdiv(N, cdiv(N, most // tile * tile))
    return cdiv(balanced, tile) * tile


@contextlib.contextmanager
def _dtypes_as_given(device: torch.device) -> Iterator[None]:
    """Autocast has cast the inputs already, and must not cast the float32 sums."""
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield


def _chunks(
    weight: Tensor, x: Tensor, bias: Tensor | None, chunk_size: int | None
) -> Iterator[tuple[slice, Tensor, int]]:
    """Give the rows, the logits and the padded width of each chunk; all logits share one buffer."""
    (N, H), V = x.shape, weight.shape[0]
    C = min(N, chunk_size or _chunk_size(N, V, H, x.element_size()))
    # Rows that begin on 16 bytes keep products and kernel fast for any V.
    width = cdiv(V, 16) * 16
    buffer = x.new_empty((C, width))
    for start in range(0, N, C):
        rows = slice(start, min(start + C, N))
        logits = buffer[: rows.stop - start, :V]
        if bias is None:
            torch.mm(x[rows], weight.t(), out=logits)
        else:
            torch.addmm(bias, x[rows], weight.t(), out=logits)
        yield rows, logits, width


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """Write a · b to out, or add it, in the dtype of out, which may be wider than theirs."""
    options: dict[str, Any] = {}
    if a.dtype is not out.dtype and a.is_cuda:
        options = {"out_dtype": out.dtype}
    elif a.dtype is not out.dtype:
        # PyTorch has this product for CUDA alone.
        a, b = a.to(out.dtype), b.to(out.dtype)
    if add:
        torch.addmm(out, a, b, out=out, **options)
    else:
        torch.mm(a, b, out=out, **options)


def _pull_back(
    g: Tensor, weight: Tensor, x: Tensor, rows: slice,
    dweight: Tensor | None, dx: Tensor | None, dbias: Tensor | None,
) -> None:  # fmt: skip
    """Write these rows of dx; add their share to dweight and dbias, which the first rows write."""
    later = rows.start > 0
    if dx is not None:
        _product(g, weight, dx[rows])
    if dweight is not None:
        _product(g.t(), x[rows], dweight, add=later)
    if dbias is not None:
        total = g.sum(0, dtype=dbias.dtype)
        torch.add(dbias, total, out=dbias) if later else dbias.copy_(total)


def fused_linear_cross_entropy_fwd(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    chunk_size: int | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    need_dweight: bool,
    need_dx: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    acc = accumulator(x.dtype)
    # The sum over no rows is 0; other sums are written before they are read.
    make = x.new_empty if has_work(y) else x.new_zeros
    unit_dweight = make(weight.shape, dtype=acc) if need_dweight else None
    unit_dx = make(x.shape, dtype=acc) if need_dx else None
    unit_dbias = make(weight.shape[:1], dtype=acc) if need_dbias else None
    if not has_work(y):
        return x.new_zeros((), dtype=acc), unit_dweight, unit_dx, unit_dbias

    x, y = x.reshape(y.numel(), x.shape[-1]), y.reshape(-1)
    dx = None if unit_dx is None else unit_dx.view(x.shape)
    loss, lse = x.new_empty((2, len(y)), dtype=acc)
    needed = need_dweight or need_dx or need_dbias
    with _dtypes_as_given(x.device):
        for rows, logits, width in _chunks(weight, x, bias, chunk_size):
            launch_rows(
                logits, y[rows], class_weight, lse[rows],
                ignore_index, label_smoothing, z_loss, softcap, logit_scale,
                loss=loss[rows], dlogits=logits if needed else None,
                unit=_UNIT.get(x.dtype, 1.0), width=width,
            )  # fmt: skip
            _pull_back(logits, weight, x, rows, unit_dweight, dx, unit_dbias)
    return loss.sum(), unit_dweight, unit_dx, unit_dbias


@triton.jit
def _times_scalar_kernel(
    unit_ptr, scalar_ptr, out_ptr, n, UNIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    unit = tl.load(unit_ptr + i, mask=i < n, other=0.0)
    scalar = tl.load(scalar_ptr) / UNIT
    tl.store(out_ptr + i, unit * scalar, mask=i < n)


def _times_scalar(unit: Tensor, scalar: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply the gradients of a unit upstream by the true one, which stays on the device."""
    out = unit.new_empty(unit.shape, dtype=dtype)
    if has_work(out):
        n, factor = out.numel(), _UNIT.get(dtype, 1.0)
        _times_scalar_kernel[(cdiv(n, 4096),)](
            unit_stride(unit), scalar, out, n, UNIT=factor, BLOCK=4096, num_warps=8
        )
    return out


def fused_linear_cross_entropy_bwd(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    unit_dweight: Tensor | None,
    unit_dx: Tensor | None,
    unit_dbias: Tensor | None,
    dloss: Tensor,
    chunk_size: int | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    need_dweight: bool,
    need_dx: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (
        _times_scalar(unit_dweight, dloss, x.dtype) if need_dweight else None,
        _times_scalar(unit_dx, dloss, x.dtype) if need_dx else None,
        _times_scalar(unit_dbias, dloss, x.dtype) if need_dbias else None,
    )


_of_sum = custom_vjp(
    "fused_linear_cross_entropy",
    reference=reference_of_sum,
    fwd=fused_linear_cross_entropy_fwd,
    bwd=fused_linear_cross_entropy_bwd,
    results="loss",
    residuals="unit_dweight unit_dx unit_dbias",
    grads="weight x bias",
    rows="x y unit_dx",
    sums="unit_dweight unit_dbias",
    autocast="weight x bias",
)


def fused_linear_cross_entropy_rows_fwd(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    chunk_size: int | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    loss = x.new_empty(y.shape, dtype=accumulator(x.dtype))
    lse = torch.empty_like(loss)

    if has_work(loss):
        x, y = x.reshape(y.numel(), x.shape[-1]), y.reshape(-1)
        each_loss, each_lse = loss.view(-1), lse.view(-1)
        with _dtypes_as_given(x.device):
            for rows, logits, width in _chunks(weight, x, bias, chunk_size):
                launch_rows(
                    logits, y[rows], class_weight, each_lse[rows],
                    ignore_index, label_smoothing, z_loss, softcap, logit_scale,
                    loss=each_loss[rows], width=width,
                )  # fmt: skip
    return loss, lse


def fused_linear_cross_entropy_rows_bwd(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    lse: Tensor,
    dloss: Tensor,
    chunk_size: int | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    need_dweight: bool,
    need_dx: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    make = x.new_empty if has_work(y) else x.new_zeros
    dweight = make(weight.shape, dtype=lse.dtype) if need_dweight else None
    dx = make(x.shape) if need_dx else None
    dbias = make(weight.shape[:1], dtype=lse.dtype) if need_dbias else None

    if has_work(y):
        x, y = x.reshape(y.numel(), x.shape[-1]), y.reshape(-1)
        lse, dloss = lse.reshape(-1), dloss.reshape(-1)
        each_dx = None if dx is None else dx.view(x.shape)
        with _dtypes_as_given(x.device):
            for rows, logits, width in _chunks(weight, x, bias, chunk_size):
                launch_rows(
                    logits, y[rows], class_weight, lse[rows],
                    ignore_index, label_smoothing, z_loss, softcap, logit_scale,
                    dloss=dloss[rows], dlogits=logits, width=width,
                )  # fmt: skip
                _pull_back(logits, weight, x, rows, dweight, each_dx, dbias)
    return (
        None if dweight is None else dweight.to(x.dtype),
        dx,
        None if dbias is None else dbias.to(x.dtype),
    )


_of_rows = custom_vjp(
    "fused_linear_cross_entropy_rows",
    reference=reference_of_rows,
    fwd=fused_linear_cross_entropy_rows_fwd,
    bwd=fused_linear_cross_entropy_rows_bwd,
    results="loss",
    residuals="lse",
    grads="weight x bias",
    rows="x y loss lse",
    autocast="weight x bias",
)


def _dtype_inside(t: Tensor) -> torch.dtype:
    """The dtype in which the op sees t."""
    given = autocast_dtype(t.device.type)
    return t.dtype if given is None or t.dtype is torch.float64 else given


def _check_factor(name: str, t: Tensor, x: Tensor) -> None:
    op = "fused_linear_cross_entropy"
    check.floating(op, name, t)
    if t.dtype is not x.dtype and _dtype_inside(t) is not _dtype_inside(x):
        check.fail(op, name, f"have the dtype of `x`, {x.dtype}", t.dtype, TypeError)
    check.device(op, name, t, x, "x")


def fused_linear_cross_entropy(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    chunk_size: int | None = None,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Compute the cross entropy of a linear head without holding its logits.

        loss = cross_entropy(x · weightᵀ + bias, y)

    Args:
        weight: (V, H), floating point: the head, as torch.nn.Linear holds it.
        x: (..., H), the dtype of weight (under autocast all are cast as F.linear casts them).
        y: (...), any integer dtype: the targets. A target outside [0, V) that is not ignore_index
            makes the loss and the gradients NaN.
        chunk_size: rows of logits held at once; None: as many as fit in 1 GiB, or in the bytes of
            weight if that is more, in equal chunks. Results agree for every size up to rounding.
        bias: (V,), the dtype of weight; None: no bias.
        class_weight, ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale: as in
            `cross_entropy`; softcap and scale apply after the bias.

    Returns:
        float32 (float64 for float64 x): a scalar, or (...) for reduction "none".

    Raises:
        TypeError: weight, x, bias or class_weight is not floating point, their dtypes differ, y is
            not of an integer dtype, an option is no number.
        ValueError: a shape or device does not fit, an option is out of its range.

    Precision: logits and their gradients are rounded to the dtype of x, as F.linear rounds them;
        the loss and dweight add up in float32. For "mean" and "sum" every gradient is rounded once,
        after the upstream gradient has multiplied it (in float16 they are 256 times as large until
        then). float64 throughout for float64 inputs.
    Memory: one buffer of chunk_size · V logits while a pass runs. Until the backward pass live
        weight, x, y and, for "mean" and "sum", the wanted gradients in float32 (4·V·H bytes for
        weight, 4·H a row for x); for "none" 4 bytes a row, and the backward pass makes the logits
        again. The reference, which is what runs on a CPU, holds all logits.
    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024; Hsu et al.,
        "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024 (gradients made forward).
    """
    op = "fused_linear_cross_entropy"
    check.floating(op, "x", x)
    check.at_least_1d(op, "x", x)
    _check_factor("weight", weight, x)
    if weight.dim() != 2 or weight.shape[0] == 0:
        shape = check.spell(weight.shape)
        check.fail(op, "weight", "have shape (V, H) with at least one class", shape)
    V = weight.shape[0]
    check.shape(op, "weight", weight, (V, x.shape[-1]), "(V, H) with the last size of `x`")
    check_target(op, "y", y, x, "x")
    if bias is not None:
        _check_factor("bias", bias, x)
        check.shape(op, "bias", bias, (V,), "one per class")
    if chunk_size is not None:
        positive = isinstance(chunk_size, (int, torch.SymInt)) and chunk_size > 0
        check.number(op, "chunk_size", chunk_size, "be a positive integer, or None", positive)
    check_options(
        op, x, "x", V, class_weight, ignore_index, reduction,
        label_smoothing, z_loss, softcap, logit_scale,
    )  # fmt: skip

    options = (chunk_size, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    if reduction == "none":
        return _of_rows(weight, x, y, bias, class_weight, *options)
    total = _of_sum(weight, x, y, bias, class_weight, *options)
    return total if reduction == "sum" else mean(total, y, class_weight, ignore_index)
