"""Sinkhorn and Knopp's iterations on small square matrices: towards rows and columns that sum to 1.

    m_1 = columns(softmax_rows(logits) + ε)       m_{t+1} = columns(rows(m_t))

where `rows` and `columns` divide by the sums of rows and of columns, plus ε. The gradient is that
of the iterations done, not of their limit:

    m′ = m / s, s = Σ m + ε       dm = (dm′ − Σ dm′ · m′) / s

A tile is (BLOCK_N, BLOCK_H, BLOCK_H): matrices, rows, columns; beyond H all is zero.
"""

import torch
from torch import Tensor

from liger_fn.functional.core.kernels import times
from liger_fn.functional.core.launch import tl, triton


def reference_sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """The last matrix of logits (..., H, H)."""
    m = torch.softmax(logits, -1) + eps
    m = m / (m.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(-1, keepdim=True) + eps)
        m = m / (m.sum(-2, keepdim=True) + eps)
    return m


@triton.jit
def _divided(m, inside, AXIS: tl.constexpr, EPS: tl.constexpr):
    """Divide by the sums along an axis."""
    # Of a sum there is one inverse for many elements, and a division takes several times as long.
    inverse = 1.0 / (tl.sum(m, axis=AXIS, keep_dims=True) + EPS)
    return tl.where(inside, m * inverse, 0.0)


@triton.jit
def _divided_bwd(m, dm, inside, AXIS: tl.constexpr, EPS: tl.constexpr):
    """Give the gradient of m, of that of m divided by its sums along an axis."""
    inverse = 1.0 / (tl.sum(m, axis=AXIS, keep_dims=True) + EPS)
    along = tl.sum(times(dm, m), axis=AXIS, keep_dims=True) * inverse
    return tl.where(inside, (dm - along) * inverse, 0.0)


@triton.jit
def _softmax_rows(logits, in_h):
    e = tl.exp(logits - tl.max(tl.where(in_h, logits, float("-inf")), axis=2, keep_dims=True))
    e = tl.where(in_h, e, 0.0)
    return e / tl.sum(e, axis=2, keep_dims=True)


@triton.jit
def sinkhorn(logits, inside, in_h, ITERATIONS: tl.constexpr, EPS: tl.constexpr):
    """Give the last matrices; `in_h` says which columns there are, `inside` which elements."""
    m = tl.where(inside, _softmax_rows(logits, in_h) + EPS, 0.0)
    m = _divided(m, inside, 1, EPS)
    for _ in range(ITERATIONS - 1):
        m = _divided(m, inside, 2, EPS)
        m = _divided(m, inside, 1, EPS)
    return m


@triton.jit
def sinkhorn_bwd(
    logits, dm, inside, in_h, scratch_ptr, scratch_stride, at,
    ITERATIONS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Give the gradient of the logits.

    The iterations are done again, each matrix m_t is put down at `scratch_ptr` + `at`, and they are
    taken up in the opposite order.
    """
    p = _softmax_rows(logits, in_h)
    first = tl.where(inside, p + EPS, 0.0)
    m = _divided(first, inside, 1, EPS)
    for t in range(ITERATIONS - 1):
        tl.store(scratch_ptr + t * scratch_stride + at, m, mask=inside)
        m = _divided(m, inside, 2, EPS)
        m = _divided(m, inside, 1, EPS)
    # Another thread may read what one has written.
    tl.debug_barrier()

    scratch_ptr += (ITERATIONS - 2) * scratch_stride
    m = tl.load(scratch_ptr + at, mask=inside & (ITERATIONS > 1), other=0.0)
    for t in range(1, ITERATIONS):
        # Asked for one iteration ahead, it arrives meanwhile.
        scratch_ptr -= scratch_stride
        earlier = tl.load(scratch_ptr + at, mask=inside & (t < ITERATIONS - 1), other=0.0)
        dm = _divided_bwd(_divided(m, inside, 2, EPS), dm, inside, 1, EPS)
        dm = _divided_bwd(m, dm, inside, 2, EPS)
        m = earlier
    dm = _divided_bwd(first, dm, inside, 1, EPS)
    return tl.where(inside, p * (dm - tl.sum(times(dm, p), axis=2, keep_dims=True)), 0.0)
