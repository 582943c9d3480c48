"""What kernels share."""

from liger_fn.functional.core.launch import tl, triton


@triton.jit
def exp_of(x, SIGN: tl.constexpr = 1.0):
    """exp(SIGN · x), by way of exp2, which takes half the instructions of exp.

    What would be subnormal is 0; float64 cannot spare the digits.
    """
    if x.dtype == tl.float64:
        e = tl.exp(SIGN * x)
    else:
        e = tl.exp2(x * (SIGN * 1.4426950408889634))
    return e


@triton.jit
def no_blocks():
    """An empty tuple, to which blocks are added; to type checkers it says nothing of its length."""
    return ()


@triton.jit
def columns_of(BLOCK: tl.constexpr):
    """The columns of a block, eight in a row: what a thread loads at once when they are 2 bytes."""
    NEAR: tl.constexpr = 8 if BLOCK >= 8 else BLOCK
    return tl.arange(0, BLOCK // NEAR)[:, None] * NEAR + tl.arange(0, NEAR)[None, :]


@triton.jit
def with_block(tops, sums, z):
    """Take a block into the maxima of neighbours and their sums of exponentials, relative to these.

    That is one exponential an element and few instructions more, and no thread waits for another
    before the end of the row.
    """
    higher = tl.maximum(tops, tl.max(z, axis=1))
    sums = sums * exp_of(tops - higher) + tl.sum(exp_of(z - higher[:, None]), axis=1)
    return higher, sums


@triton.jit
def times(a, b, UP_TO: tl.constexpr = 256):
    """Multiply, for a sum of which all lanes get the same bits; `a` has the shape of the product.

    Where a lane has one product, the compiler would fuse it with the sum of two lanes: each rounds
    the other's alone. Of sums that differ so, shared memory keeps whichever the hardware likes. So
    products of up to so many columns, of which a lane may have one, are rounded by themselves,
    which takes an instruction more. UP_TO is None where a lane may have one of any number: rows
    that do not lie in whole vectors are loaded a number at a time, and neighbours are then in other
    lanes, or the rows of a column are (triton 3.9).
    """
    if UP_TO is None or a.shape[len(a.shape) - 1] <= UP_TO:
        product = tl.fma(a, b, tl.zeros_like(a))
    else:
        product = a * b
    return product
