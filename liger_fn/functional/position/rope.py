"""Rotary position embedding of queries and keys in one launch.

    (a, b) the features of a pair, θ its angle at a token:

    a′ = a · cos θ − b · sin θ          da = da′ · cos θ + db′ · sin θ
    b′ = b · cos θ + a · sin θ          db = db′ · cos θ − da′ · sin θ

Pairs are (i, i + R/2) in halves and (2i, 2i + 1) interleaved; the features from R on are copied.
The backward pass is the same kernel turning back. Memory traffic in bytes per element of 2-byte q
and k: 4 forward, 4 backward, and cos and sin once, for the heads of a token are neighbouring rows,
which find its angles in the cache. cos and sin are kept, q and k are not.
"""

import functools
from typing import overload

import torch
from einops import rearrange
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.direct import MOST, Bound
from liger_fn.functional.core.launch import (
    accumulator,
    cdiv,
    dense_like,
    has_work,
    next_power_of_2,
    tl,
    triton,
    triton_dtype,
)


def reference(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    layout: str = "bhtc",
) -> Tensor | tuple[Tensor, Tensor]:
    R = q.shape[-1] if rotary_dim is None else rotary_dim
    q_out, k_out = _reference(q, k, cos, sin, R, interleaved, layout)
    return q_out if k_out is None else (q_out, k_out)


def _reference(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    interleaved: bool,
    layout: str,
) -> tuple[Tensor, Tensor | None]:
    compute, R = accumulator(q.dtype), rotary_dim
    features = "... (c pair)" if interleaved else "... (pair c)"
    one_copy = slice(None, None, 2) if _each_twice(cos, R, interleaved) else slice(R // 2)
    heads = -3 if layout == "bhtc" else -2
    cos, sin = (t[..., one_copy].to(compute).unsqueeze(heads) for t in (cos, sin))

    def turn(x: Tensor) -> Tensor:
        a, b = rearrange(x[..., :R].to(compute), f"{features} -> pair ... c", pair=2)
        pairs = torch.stack((a * cos - b * sin, b * cos + a * sin))
        turned = rearrange(pairs, f"pair ... c -> {features}").to(x.dtype)
        return torch.cat((turned, x[..., R:]), -1)

    return turn(q), None if k is None else turn(k)


def _each_twice(cos: Tensor, R: int, interleaved: bool) -> bool:
    """Say whether each angle comes twice in a row."""
    return interleaved and cos.shape[-1] == R


@triton.jit
def _load_pairs(
    row_ptr, start, inside, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_PAIR: tl.constexpr
):
    """Load pairs of features, the first and the second ones apart."""
    if INTERLEAVED:
        col = 2 * start + tl.arange(0, 2 * BLOCK_PAIR)
        mask = inside[:, None] & (col < 2 * HALF)[None, :]
        x = tl.load(row_ptr[:, None] + col[None, :], mask=mask, other=0.0)
        a, b = tl.split(tl.reshape(x, (x.shape[0], BLOCK_PAIR, 2)))
    else:
        pair = start + tl.arange(0, BLOCK_PAIR)
        mask = inside[:, None] & (pair < HALF)[None, :]
        a = tl.load(row_ptr[:, None] + pair[None, :], mask=mask, other=0.0)
        b = tl.load(row_ptr[:, None] + HALF + pair[None, :], mask=mask, other=0.0)
    return a, b


@triton.jit
def _store_pairs(
    row_ptr, a, b, start, inside,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_PAIR: tl.constexpr,
):  # fmt: skip
    if INTERLEAVED:
        col = 2 * start + tl.arange(0, 2 * BLOCK_PAIR)
        mask = inside[:, None] & (col < 2 * HALF)[None, :]
        x = tl.interleave(a, b).to(row_ptr.dtype.element_ty)
        tl.store(row_ptr[:, None] + col[None, :], x, mask=mask)
    else:
        pair = start + tl.arange(0, BLOCK_PAIR)
        mask = inside[:, None] & (pair < HALF)[None, :]
        tl.store(row_ptr[:, None] + pair[None, :], a, mask=mask)
        tl.store(row_ptr[:, None] + HALF + pair[None, :], b, mask=mask)


@triton.jit
def _load_angles(
    row_ptr, start, inside, HALF: tl.constexpr, EACH_TWICE: tl.constexpr, BLOCK_PAIR: tl.constexpr
):
    """Load cos or sin, one for each pair; where each comes twice in a row, whole lines are read."""
    if EACH_TWICE:
        angle, _ = _load_pairs(row_ptr, start, inside, HALF, True, BLOCK_PAIR)
    else:
        pair = start + tl.arange(0, BLOCK_PAIR)
        mask = inside[:, None] & (pair < HALF)[None, :]
        angle = tl.load(row_ptr[:, None] + pair[None, :], mask=mask, other=0.0)
    return angle


@triton.jit
def _turn_tile(
    x_ptr, out_ptr, cos_ptr, sin_ptr,
    x_stride_b, x_stride_h, x_stride_t, cos_stride_t, sin_stride_t, H, T, batch, tile,
    C: tl.constexpr, HALF: tl.constexpr, EACH_TWICE: tl.constexpr,
    HEADS_FIRST: tl.constexpr, INTERLEAVED: tl.constexpr, BACK: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_PAIR: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    # The rows of a sample are fewer than 2^31, the elements perhaps not.
    inside = row < T * H
    t, h = (row // H).to(tl.int64), (row % H).to(tl.int64)
    x_row = x_ptr + batch * x_stride_b + h * x_stride_h + t * x_stride_t
    if HEADS_FIRST:
        out_row = out_ptr + ((batch * H + h) * T + t) * C
    else:
        out_row = out_ptr + ((batch * T + t) * H + h) * C
    cos_row, sin_row = cos_ptr + t * cos_stride_t, sin_ptr + t * sin_stride_t

    for start in range(0, HALF, BLOCK_PAIR):
        a, b = _load_pairs(x_row, start, inside, HALF, INTERLEAVED, BLOCK_PAIR)
        cos = _load_angles(cos_row, start, inside, HALF, EACH_TWICE, BLOCK_PAIR).to(COMPUTE)
        sin = _load_angles(sin_row, start, inside, HALF, EACH_TWICE, BLOCK_PAIR).to(COMPUTE)

        a, b = a.to(COMPUTE), b.to(COMPUTE)
        if BACK:
            sin = -sin
        turned_a, turned_b = a * cos - b * sin, b * cos + a * sin

        _store_pairs(out_row, turned_a, turned_b, start, inside, HALF, INTERLEAVED, BLOCK_PAIR)

    for start in range(2 * HALF, C, BLOCK_TAIL):
        col = start + tl.arange(0, BLOCK_TAIL)
        mask = inside[:, None] & (col < C)[None, :]
        tail = tl.load(x_row[:, None] + col[None, :], mask=mask, other=0.0)
        tl.store(out_row[:, None] + col[None, :], tail, mask=mask)


@triton.jit(do_not_specialize=["H", "K", "T", "q_tiles", "k_tiles"])
def _rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t,
    cos_stride_b, cos_stride_t, sin_stride_b, sin_stride_t, H, K, T, q_tiles, k_tiles,
    C: tl.constexpr, HALF: tl.constexpr, EACH_TWICE: tl.constexpr, HAS_K: tl.constexpr,
    Q_HEADS_FIRST: tl.constexpr, K_HEADS_FIRST: tl.constexpr,
    INTERLEAVED: tl.constexpr, BACK: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_PAIR: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    batch = (program // (q_tiles + k_tiles)).to(tl.int64)
    tile = program % (q_tiles + k_tiles)
    cos_ptr += batch * cos_stride_b
    sin_ptr += batch * sin_stride_b

    if tile < q_tiles:
        _turn_tile(
            q_ptr, q_out_ptr, cos_ptr, sin_ptr,
            q_stride_b, q_stride_h, q_stride_t, cos_stride_t, sin_stride_t,
            H, T, batch, tile, C, HALF, EACH_TWICE, Q_HEADS_FIRST, INTERLEAVED, BACK,
            COMPUTE, BLOCK_M, BLOCK_PAIR, BLOCK_TAIL,
        )  # fmt: skip
    elif HAS_K:
        _turn_tile(
            k_ptr, k_out_ptr, cos_ptr, sin_ptr,
            k_stride_b, k_stride_h, k_stride_t, cos_stride_t, sin_stride_t,
            K, T, batch, tile - q_tiles, C, HALF, EACH_TWICE, K_HEADS_FIRST, INTERLEAVED, BACK,
            COMPUTE, BLOCK_M, BLOCK_PAIR, BLOCK_TAIL,
        )  # fmt: skip


def _rope_config(C: int, half: int) -> dict:
    """About 2048 elements for four warps: two 16-byte loads a thread of q, two of its angles.

    A row is one head of one token, so that any number of heads fills the tiles.
    """
    block_pair = min(512, next_power_of_2(half))
    block_tail = min(1024, next_power_of_2(C - 2 * half))
    block_m = max(1, 2048 // max(2 * block_pair, block_tail))
    return {"BLOCK_M": block_m, "BLOCK_PAIR": block_pair, "BLOCK_TAIL": block_tail, "num_warps": 4}


@functools.lru_cache(MOST)
def _rope_with(
    C: int,
    half: int,
    each_twice: bool,
    has_k: bool,
    q_heads_first: bool,
    k_heads_first: bool,
    interleaved: bool,
    back: bool,
    dtype: torch.dtype,
) -> Bound:
    return Bound(
        _rope_kernel,
        C=C, HALF=half, EACH_TWICE=each_twice, HAS_K=has_k,
        Q_HEADS_FIRST=q_heads_first, K_HEADS_FIRST=k_heads_first,
        INTERLEAVED=interleaved, BACK=back,
        COMPUTE=triton_dtype(accumulator(dtype)), **_rope_config(C, half),
    )  # fmt: skip


def _with_dims(dims: int, x: Tensor) -> Tensor:
    """View x with its first dimensions as one, `dims` in all, and unit stride along the last.

    It is copied only if no view can do that.
    """
    x = x if x.dim() == dims else x.reshape(-1, *x.shape[1 - dims :])
    return x if x.stride(-1) == 1 else x.contiguous()


def _in_order_of(x: Tensor) -> Tensor:
    """Allocate the shape and dtype of x in dense memory, the dimensions in the order of x's.

    Where q is a transposed view of a projection, its gradient is then a view of the projection's,
    and goes on without a copy.
    """
    if x.dim() == 4:
        (B, H, T, C), strides = x.shape, x.stride()
        # Is the second dimension inside the third?
        if H > 1 and T > 1 and strides[2] > strides[1]:
            return x.new_empty_strided((B, H, T, C), (T * H * C, C, H * C, 1))
    return dense_like(x)


def _turn(
    q: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    interleaved: bool,
    layout: str,
    back: bool,
) -> tuple[Tensor | None, Tensor | None]:
    q_out = None if q is None else _in_order_of(q)
    k_out = None if k is None else _in_order_of(k)
    given = [(x, out) for x, out in ((q, q_out), (k, k_out)) if x is not None and has_work(out)]
    if given:
        # A lone tensor takes the place of q.
        (x, x_out), (y, y_out) = given[0], given[-1]
        x_out, y_out = _with_dims(4, x_out), _with_dims(4, y_out)
        x, y = _with_dims(4, x), _with_dims(4, y) if len(given) == 2 else None
        cos, sin = _with_dims(3, cos), _with_dims(3, sin)
        _launch(x, y, cos, sin, x_out, y_out, rotary_dim, interleaved, layout == "bhtc", back)
    return q_out, k_out


def _launch(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    rotary_dim: int,
    interleaved: bool,
    heads_first: bool,
    back: bool,
) -> None:
    head, token = (1, 2) if heads_first else (2, 1)
    shape, q_strides = q.shape, q.stride()
    k_shape, k_strides = (shape, q_strides) if k is None else (k.shape, k.stride())
    B, H, T, C = shape[0], shape[head], shape[token], shape[3]
    K = 0 if k is None else k_shape[head]
    cos_strides, sin_strides = cos.stride(), sin.stride()

    twice = _each_twice(cos, rotary_dim, interleaved)
    turn = _rope_with(
        C, rotary_dim // 2, twice, k is not None, _heads_first(q_out, head, token),
        _heads_first(k_out, head, token), interleaved, back, q.dtype,
    )  # fmt: skip
    block_m = turn.constants["BLOCK_M"]
    q_tiles, k_tiles = cdiv(T * H, block_m), cdiv(T * K, block_m)
    turn(
        (B * (q_tiles + k_tiles),),
        q, k, cos, sin, q_out, k_out,
        q_strides[0], q_strides[head], q_strides[token],
        k_strides[0], k_strides[head], k_strides[token],
        cos_strides[0], cos_strides[1], sin_strides[0], sin_strides[1], H, K, T, q_tiles, k_tiles,
    )  # fmt: skip


def _heads_first(out: Tensor, head: int, token: int) -> bool:
    """Say whether the heads of a dense tensor are outside its tokens in memory."""
    strides = out.stride()
    return strides[head] >= strides[token]


def rope_fwd(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    interleaved: bool,
    layout: str,
) -> tuple[Tensor, Tensor | None]:
    return _turn(q, k, cos, sin, rotary_dim, interleaved, layout, back=False)


def rope_bwd(
    cos: Tensor,
    sin: Tensor,
    dq_out: Tensor | None,
    dk_out: Tensor | None,
    rotary_dim: int,
    interleaved: bool,
    layout: str,
    need_dq: bool,
    need_dk: bool,
) -> tuple[Tensor | None, Tensor | None]:
    dq_out, dk_out = dq_out if need_dq else None, dk_out if need_dk else None
    return _turn(dq_out, dk_out, cos, sin, rotary_dim, interleaved, layout, back=True)


_rope = custom_vjp(
    "rope",
    reference=_reference,
    fwd=rope_fwd,
    bwd=rope_bwd,
    results="q_out k_out",
    grads="q k",
    linear="q k",
    rows="q k cos sin q_out k_out",
    core_dims=3,
)


@overload
def rope(
    q: Tensor,
    k: None,
    cos: Tensor,
    sin: Tensor,
    *,
    rotary_dim: int | None = ...,
    interleaved: bool = ...,
    layout: str = ...,
) -> Tensor: ...


@overload
def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    rotary_dim: int | None = ...,
    interleaved: bool = ...,
    layout: str = ...,
) -> tuple[Tensor, Tensor]: ...


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    layout: str = "bhtc",
) -> Tensor | tuple[Tensor, Tensor]:
    """Rotate pairs of features of queries and keys by angles that grow with the position.

        a′ = a · cos θ − b · sin θ        b′ = b · cos θ + a · sin θ

    Args:
        q: (B, H, T, C), floating point, any strides: a transposed view of a projection is read in
            place.
        k: (B, K, T, C), K any number of heads, dtype of q; or None.
        cos, sin: (T, R), (1, T, R) or (B, T, R), floating point, may be of another dtype than q:
            cos θ and sin θ of each pair twice, as Hugging Face has them (the second copy is not
            used), or once: (..., R/2). Learned angles get their gradient from plain PyTorch.
        rotary_dim: R, how many features of a head are rotated, the others are copied; None: all C.
        interleaved: pairs are (2i, 2i + 1), as in GPT-J and Cohere; False: (i, i + R/2), as in
            Llama.
        layout: "bhtc", or "bthc" for q (B, T, H, C) and k (B, T, K, C).

    Returns:
        q′ and k′, with shapes and dtype of q and k, dense, heads and tokens in the memory order of
        q and k; without k only q′.

    Raises:
        TypeError: an argument is not a floating-point tensor, or q and k have different dtypes.
        ValueError: shapes do not fit together, tensors lie on different devices, rotary_dim is odd
            or not within 2 and C, or layout is unknown.

    Precision: computed in float32 (float64 for float64 q); every output is rounded once.
    Memory: cos and sin live until the backward pass; q and k do not, unless angles are learned.
    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    """
    _check_heads(q, k, layout)
    R = q.shape[-1] if rotary_dim is None else rotary_dim
    _check_tables(q, cos, sin, R, layout)
    learned = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    turn = _reference if learned else _rope
    q_out, k_out = turn(q, k, _per_sample(cos, q), _per_sample(sin, q), R, interleaved, layout)
    return q_out if k is None else (q_out, k_out)


def _per_sample(table: Tensor, q: Tensor) -> Tensor:
    """View cos or sin as (B, T, width): to the op, a sample and its angles are one row."""
    whole = table.dim() == 3 and table.shape[0] == q.shape[0]
    return table if whole else table.expand(q.shape[0], *table.shape[-2:])


def _check_heads(q: Tensor, k: Tensor | None, layout: str) -> None:
    check.one_of("rope", "layout", layout, ("bhtc", "bthc"))
    check.floating("rope", "q", q)
    if q.dim() != 4:
        contract = "have four dimensions, as `layout` says"
        check.fail("rope", "q", contract, f"shape {check.spell(q.shape)}")
    if k is None:
        return
    check.floating("rope", "k", k)
    check.dtype("rope", "k", k, q, "q")
    check.device("rope", "k", k, q, "q")
    heads, shape = layout.index("h"), list(q.shape)
    if k.dim() == 4:
        shape[heads] = k.shape[heads]
    check.shape("rope", "k", k, shape, "that of `q` but for the heads")


def _check_tables(q: Tensor, cos: Tensor, sin: Tensor, R: int, layout: str) -> None:
    B, T, C = q.shape[0], q.shape[layout.index("t")], q.shape[-1]
    if not (isinstance(R, (int, torch.SymInt)) and R % 2 == 0 and 2 <= R <= C):
        contract = f"be even, at least 2 and at most {C}, the head width"
        check.number("rope", "rotary_dim", R, contract, False)

    check.floating("rope", "cos", cos)
    check.device("rope", "cos", cos, q, "q")
    # Not `in`: Dynamo compares symbolic sizes only one by one.
    fits = cos.dim() == 2 or (cos.dim() == 3 and (cos.shape[0] == 1 or cos.shape[0] == B))
    fits = fits and cos.shape[-2] == T and (cos.shape[-1] == R or cos.shape[-1] == R // 2)
    if not fits:
        contract = f"have shape ({T}, R), (1, {T}, R) or ({B}, {T}, R) with R {R} or {R // 2}"
        check.fail("rope", "cos", contract, check.spell(cos.shape))
    check.floating("rope", "sin", sin)
    check.device("rope", "sin", sin, q, "q")
    check.shape("rope", "sin", sin, cos.shape, "the shape of `cos`")
