"""Blocks of a few rows and some columns, for norms that go over their columns more than once.

What a program has read a moment ago it reads again out of the cache, so that rows may be of any
width and the memory moves them once.
"""

from liger_fn.functional.core.launch import next_power_of_2, tl, triton


@triton.jit
def load_block(ptr, row, stride_n, in_n, start, D, COMPUTE: tl.constexpr, BLOCK_D: tl.constexpr):
    col = start + tl.arange(0, BLOCK_D)
    inside = in_n[:, None] & (col < D)[None, :]
    block = tl.load(ptr + row[:, None] * stride_n + col[None, :], mask=inside, other=0.0)
    return block.to(COMPUTE)


@triton.jit
def store_block(ptr, row, stride_n, in_n, start, D, block, BLOCK_D: tl.constexpr):
    col = start + tl.arange(0, BLOCK_D)
    inside = in_n[:, None] & (col < D)[None, :]
    tl.store(ptr + row[:, None] * stride_n + col[None, :], block, mask=inside)


@triton.jit
def load_features(ptr, start, D, COMPUTE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load what all rows share as one row; None if there is none."""
    features = None
    if ptr is not None:
        col = start + tl.arange(0, BLOCK_D)
        features = tl.load(ptr + col, mask=col < D, other=0.0).to(COMPUTE)[None, :]
    return features


@triton.jit
def add_to_part(part_ptr, step, start, D, share, BLOCK_D: tl.constexpr):
    """Add a share to this program's sums in memory, which hold nothing before step 0.

    Between two steps there must be a barrier: what one thread has written, another may read.
    """
    col = start + tl.arange(0, BLOCK_D)
    held = tl.where(step > 0, D, 0)
    so_far = tl.load(part_ptr + col, mask=col < held, other=0.0)
    tl.store(part_ptr + col, so_far + share, mask=col < D)


def block_config(D: int) -> dict:
    """4096 elements for eight warps: two 16-byte loads of each input a thread.

    Four rows at least, where they are wide, share what is read and written of a program's sums.
    """
    block_d = min(1024, next_power_of_2(D))
    return {"BLOCK_D": block_d, "BLOCK_N": min(32, 4096 // block_d), "num_warps": 8}


# Programs of 256 threads that fit on a multiprocessor with the registers of a backward pass.
PER_SM = 2
