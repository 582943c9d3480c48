"""A mixture of experts: each token's gated MLPs of its K experts, weighted and added up.

    h_s  = gate_up[e_s] · x[t_s] + gate_up_bias[e_s]          a_s = unit(h_s)
    y_t  = Σ_k weights[t, k] · (down[e_s] · a_s + down_bias[e_s])            with s of (t, k)

The N = T · K pairs (t, k) of a token and one of its experts are sorted by expert, so that each
expert's rows lie together, and each product is one grouped product. `order` lists the pairs in that
order, `place` says where in it a pair is; `ends` says where the experts' rows end. Work grows with
N and not with the number of experts, and nobody waits for the device to learn the groups' sizes.

    r_s = down[e_s]ᵀ · dy[t_s]
    dweights[t, k] = r_s · a_s + dy[t_s] · down_bias[e_s]     da_s = weights[t, k] · r_s
    ddown[e]     = Σ_s dy[t_s] · (weights[t, k] · a_s)ᵀ       dh_s = unit′(h_s) · da_s
    dgate_up[e]  = Σ_s dh_s · x[t_s]ᵀ
    dx[t]        = Σ_k gate_up[e_s]ᵀ · dh_s

so that the experts' outputs are not needed again. Kept are `h`, 2·F numbers a pair, and the order.
All sums have a fixed order; those over a token's experts are in float32.

Grouped products are PyTorch's where its kernels neither wait nor want other strides: bfloat16 on
Hopper and Blackwell. Elsewhere they are the kernels below.
"""

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from liger_fn.functional.activation import gated_activation
from liger_fn.functional.activation.gated_activation import check_unit, unit_of
from liger_fn.functional.activation.glu import glu_bwd, glu_fwd
from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.direct import launch
from liger_fn.functional.core.launch import (
    accumulator,
    cdiv,
    has_work,
    next_power_of_2,
    tl,
    triton,
    triton_dtype,
    unit_stride,
)


def reference(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    alpha: float = 1.0,
    gate_scale: float = 1.0,
    scale: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    limit_activated: bool = False,
    interleaved: bool = False,
) -> Tensor:
    """Every expert of every token, so that no size depends on data."""
    compute = accumulator(x.dtype)
    # As rows: PyTorch 2.11 cannot trace the second derivative of F.linear in three dimensions.
    shape, N, K = x.shape, math.prod(x.shape[:-1]), indices.shape[-1]
    x, indices = x.reshape(N, shape[-1]), indices.reshape(N, K)
    weights = weights.reshape(N, K).to(compute)
    y = x.new_zeros(x.shape, dtype=compute)
    for e in range(gate_up.shape[0]):
        h = F.linear(x, gate_up[e], None if gate_up_bias is None else gate_up_bias[e])
        a = gated_activation.reference(
            h, None, activation=activation, alpha=alpha, gate_scale=gate_scale, scale=scale,
            up_offset=up_offset, limit=limit, limit_activated=limit_activated,
            interleaved=interleaved,
        )  # fmt: skip
        of_expert = F.linear(a, down[e], None if down_bias is None else down_bias[e])
        share = torch.where(indices == e, weights, 0.0).sum(-1, keepdim=True)
        y = y + share * of_expert.to(compute)
    return y.to(x.dtype).view(shape)


@triton.jit
def _group_of_tile(ends_ptr, tile, E, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """Give the expert whose rows a tile holds, E if there is none, its first row and their end."""
    e = tl.arange(0, BLOCK_E)
    end = tl.load(ends_ptr + e, mask=e < E, other=0)
    start = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = tl.where(e < E, tl.cdiv(end - start, BLOCK_N), 0)
    until = tl.cumsum(tiles, axis=0)
    expert = tl.sum(((until <= tile) & (e < E)).to(tl.int32), axis=0)
    mine = e == expert
    before = tl.sum(tl.where(mine, until - tiles, 0), axis=0)
    first = tl.sum(tl.where(mine, start, 0), axis=0) + (tile - before) * BLOCK_N
    return expert, first, tl.sum(tl.where(mine, end, 0), axis=0)


@triton.jit
def _dot(a, b, acc):
    """acc + a · b, with no fewer digits than the inputs have."""
    if a.dtype == tl.float64:
        # Of float64 not every chip has a product of tiles.
        acc += tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    elif a.dtype == tl.float32:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    else:
        # TF32 has all the bits of 2-byte numbers, and Triton interprets its products.
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32")
    return acc


@triton.jit
def _fused_moe_rows_kernel(
    rows_ptr, weight_ptr, bias_ptr, ends_ptr, out_ptr,
    weight_stride_e, weight_stride_d, weight_stride_f, E, D, F,
    HAS_BIAS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out_s = rows_s · weight[e_s] + bias[e_s], of widths D and F."""
    e, first, end = _group_of_tile(ends_ptr, tl.program_id(0), E, BLOCK_N, BLOCK_E)
    if e < E:
        row = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        col = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
        a_ptr = rows_ptr + row[:, None] * D
        w_ptr = weight_ptr + e.to(tl.int64) * weight_stride_e
        w_ptr += col[None, :].to(tl.int64) * weight_stride_f
        acc = tl.zeros((BLOCK_N, BLOCK_F), COMPUTE)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            a = tl.load(a_ptr + d[None, :], mask=(row < end)[:, None] & (d < D)[None, :], other=0.0)
            w = tl.load(
                w_ptr + d[:, None] * weight_stride_d,
                mask=(d < D)[:, None] & (col < F)[None, :], other=0.0,
            )  # fmt: skip
            acc = _dot(a, w, acc)
        if HAS_BIAS:
            b_ptr = bias_ptr + e.to(tl.int64) * F + col
            acc += tl.load(b_ptr, mask=col < F, other=0.0).to(COMPUTE)[None, :]
        inside = (row < end)[:, None] & (col < F)[None, :]
        tl.store(out_ptr + row[:, None] * F + col[None, :], acc, mask=inside)


@triton.jit
def _fused_moe_outer_kernel(
    left_ptr, right_ptr, ends_ptr, out_ptr, D, F,
    COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """out_e = Σ_s left_s · right_sᵀ over the rows of expert e, of widths D and F."""
    e = tl.program_id(0)
    begin = tl.load(ends_ptr + e - 1, mask=e > 0, other=0)
    end = tl.load(ends_ptr + e)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    f = tl.program_id(2) * BLOCK_F + tl.arange(0, BLOCK_F)
    acc = tl.zeros((BLOCK_D, BLOCK_F), COMPUTE)
    for start in range(begin, end, BLOCK_N):
        row = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        a = tl.load(
            left_ptr + row[None, :] * D + d[:, None],
            mask=(row < end)[None, :] & (d < D)[:, None], other=0.0,
        )  # fmt: skip
        b = tl.load(
            right_ptr + row[:, None] * F + f[None, :],
            mask=(row < end)[:, None] & (f < F)[None, :], other=0.0,
        )  # fmt: skip
        acc = _dot(a, b, acc)
    out_ptr += e.to(tl.int64) * D * F + d[:, None].to(tl.int64) * F + f[None, :]
    tl.store(out_ptr, acc, mask=(d < D)[:, None] & (f < F)[None, :])


@triton.jit
def _fused_moe_sums_kernel(
    rows_ptr, weights_ptr, order_ptr, ends_ptr, out_ptr, F,
    WEIGHTED: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """out_e = Σ_s rows_s over the rows of expert e, each times its weight if they are weighted."""
    e = tl.program_id(0)
    begin = tl.load(ends_ptr + e - 1, mask=e > 0, other=0)
    end = tl.load(ends_ptr + e)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    acc = tl.zeros((BLOCK_F,), COMPUTE)
    for start in range(begin, end, BLOCK_N):
        row = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = (row < end)[:, None] & (f < F)[None, :]
        r = tl.load(rows_ptr + row[:, None] * F + f[None, :], mask=inside, other=0.0).to(COMPUTE)
        if WEIGHTED:
            pair = tl.load(order_ptr + row, mask=row < end, other=0)
            r *= tl.load(weights_ptr + pair, mask=row < end, other=0.0).to(COMPUTE)[:, None]
        acc += tl.sum(r, axis=0)
    tl.store(out_ptr + e.to(tl.int64) * F + f, acc, mask=f < F)


@triton.jit
def _fused_moe_combine_kernel(
    rows_ptr, weights_ptr, bias_ptr, place_ptr, experts_ptr, out_ptr, E, D,
    K: tl.constexpr, WEIGHTED: tl.constexpr, HAS_BIAS: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out_t = Σ_k weights[t, k] · (rows_s + bias[e_s])."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), COMPUTE)
    for k in range(K):
        s = tl.load(place_ptr + t * K + k)
        e = tl.load(experts_ptr + s)
        # What stands in the row of a pair without an expert was never written.
        inside = d < tl.where(e < E, D, 0)
        r = tl.load(rows_ptr + s * D + d, mask=inside, other=0.0).to(COMPUTE)
        if HAS_BIAS:
            r += tl.load(bias_ptr + e * D + d, mask=inside, other=0.0).to(COMPUTE)
        if WEIGHTED:
            r *= tl.load(weights_ptr + t * K + k, mask=e < E, other=0.0).to(COMPUTE)
        acc += r
    tl.store(out_ptr + t * D + d, acc, mask=d < D)


@triton.jit
def _fused_moe_weigh_kernel(
    r_ptr, a_ptr, dy_ptr, bias_ptr, weights_ptr, order_ptr, experts_ptr,
    da_ptr, weighted_ptr, dweights_ptr, E, D, F,
    HAS_BIAS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a row: dweights = r · a + dy · bias; then da = weight · r, and weight · a."""
    s = tl.program_id(0).to(tl.int64)
    pair = tl.load(order_ptr + s)
    e = tl.load(experts_ptr + s)
    live = e < E
    readable_f, readable_d = tl.where(live, F, 0), tl.where(live, D, 0)
    weight = tl.load(weights_ptr + pair, mask=live, other=0.0).to(COMPUTE)
    products = tl.zeros((BLOCK,), COMPUTE)
    for start in range(0, F, BLOCK):
        f = start + tl.arange(0, BLOCK)
        r = tl.load(r_ptr + s * F + f, mask=f < readable_f, other=0.0).to(COMPUTE)
        a = tl.load(a_ptr + s * F + f, mask=f < readable_f, other=0.0).to(COMPUTE)
        products += r * a
        tl.store(da_ptr + s * F + f, weight * r, mask=f < F)
        tl.store(weighted_ptr + s * F + f, weight * a, mask=f < F)
    if HAS_BIAS:
        for start in range(0, D, BLOCK):
            d = start + tl.arange(0, BLOCK)
            dy = tl.load(dy_ptr + s * D + d, mask=d < readable_d, other=0.0).to(COMPUTE)
            bias = tl.load(bias_ptr + e * D + d, mask=d < readable_d, other=0.0).to(COMPUTE)
            products += dy * bias
    tl.store(dweights_ptr + pair, tl.sum(products, axis=0))


@triton.jit
def _fused_moe_finish_kernel(
    rows_ptr, bias_ptr, experts_ptr, E, F,
    HAS_BIAS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """rows_s += bias[e_s], and 0 in the rows of pairs without an expert, which nothing wrote."""
    s = tl.program_id(0).to(tl.int64)
    e = tl.load(experts_ptr + s)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    rows_ptr += s * F
    if HAS_BIAS:
        inside = f < tl.where(e < E, F, 0)
        r = tl.load(rows_ptr + f, mask=inside, other=0.0).to(COMPUTE)
        b = tl.load(bias_ptr + e * F + f, mask=inside, other=0.0).to(COMPUTE)
        tl.store(rows_ptr + f, r + b, mask=f < F)
    else:
        zeros = tl.zeros((BLOCK_F,), COMPUTE)
        tl.store(rows_ptr + f, zeros, mask=f < tl.where(e < E, 0, F))


def _product_config(dtype: torch.dtype) -> dict:
    """Tiles of 64 for 2-byte inputs; narrower ones for wider inputs, which take more registers."""
    if dtype is torch.float64:
        return {"BLOCK_N": 16, "BLOCK_F": 16, "BLOCK_D": 16, "num_warps": 4}
    small = dtype is torch.float32
    return {"BLOCK_N": 64, "BLOCK_F": 32 if small else 64, "BLOCK_D": 32, "num_warps": 4}


def _row_config(width: int) -> dict:
    """8 elements a thread: 16 bytes of 2-byte rows."""
    block = min(1024, next_power_of_2(max(width, 1)))
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


@functools.cache
def _has_grouped_products(index: int) -> bool:
    return torch.cuda.get_device_capability(index)[0] in (9, 10)


def _torch_can(*ts: Tensor) -> bool:
    """Say whether PyTorch's grouped product takes these, and without waiting for the device."""
    return all(
        t.is_cuda and t.dtype is torch.bfloat16 and t.shape[-1] % 8 == 0 and _is_aligned(t)
        for t in ts
    ) and _has_grouped_products(ts[0].device.index or 0)


def _is_aligned(t: Tensor) -> bool:
    """Say whether one of the last two dimensions is dense and all others start on 16 bytes."""
    strides = list(t.stride())
    if 1 not in strides[-2:]:
        return False
    strides.remove(1)
    whole = all(stride * t.itemsize % 16 == 0 for stride in strides)
    return whole and t.data_ptr() % 16 == 0


def _rows_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows_s · weight[e_s] of (N, D) and (E, D, F); rows without an expert stay unwritten."""
    if _torch_can(rows, weight):
        return F.grouped_mm(rows, weight, offs=ends)
    return _launch_rows(rows, weight, ends)


def _launch_rows(rows: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows_s · weight[e_s] + bias[e_s] by the kernel, which rounds once."""
    (N, D), (E, _, width) = rows.shape, weight.shape
    out = rows.new_empty((N, width))
    config = _product_config(rows.dtype)
    if out.numel():
        launch(
            _fused_moe_rows_kernel,
            (cdiv(N, config["BLOCK_N"]) + E, cdiv(width, config["BLOCK_F"])),
            rows, weight, bias, ends, out, *weight.stride(), E, D, width,
            HAS_BIAS=bias is not None, COMPUTE=triton_dtype(accumulator(rows.dtype)),
            BLOCK_E=next_power_of_2(E), **config,
        )  # fmt: skip
    return out


def _hidden(
    rows: Tensor, gate_up: Tensor, bias: Tensor | None, ends: Tensor, experts: Tensor
) -> Tensor:
    """gate_up[e_s] · rows_s + bias[e_s], and 0 without an expert."""
    weight, bias, E = gate_up.transpose(1, 2), unit_stride(bias), len(gate_up)
    if bias is None or _torch_can(rows, weight):
        h = _rows_product(rows, weight, ends)
        _finish(h, bias, experts, E)
    else:
        h = _launch_rows(rows, weight, ends, bias)
        _finish(h, None, experts, E)
    return h


def _outer_product(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Σ_s left_s · right_sᵀ by expert: (N, D), (N, F) to (E, D, F)."""
    D, width, E = left.shape[1], right.shape[1], len(ends)
    if _torch_can(left, right):
        return F.grouped_mm(left.t(), right, offs=ends)
    out = left.new_empty((E, D, width))
    config = _product_config(left.dtype)
    if out.numel():
        launch(
            _fused_moe_outer_kernel,
            (E, cdiv(D, config["BLOCK_D"]), cdiv(width, config["BLOCK_F"])),
            left, right, ends, out, D, width,
            COMPUTE=triton_dtype(accumulator(left.dtype)), **config,
        )  # fmt: skip
    return out


def _sums(rows: Tensor, ends: Tensor, order: Tensor, weights: Tensor | None = None) -> Tensor:
    """Σ_s rows_s by expert, each times its weight if there are weights."""
    width = rows.shape[1]
    out = rows.new_empty((len(ends), width))
    block = min(64, next_power_of_2(max(width, 1)))
    if out.numel():
        launch(
            _fused_moe_sums_kernel, (len(ends), cdiv(width, block)),
            rows, weights, order, ends, out, width,
            WEIGHTED=weights is not None, COMPUTE=triton_dtype(accumulator(rows.dtype)),
            BLOCK_N=32, BLOCK_F=block, num_warps=4,
        )  # fmt: skip
    return out


def _combine(
    rows: Tensor, place: Tensor, experts: Tensor, E: int, out: Tensor,
    weights: Tensor | None = None, bias: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the sum over each token's experts, weighted if there are weights."""
    (T, K), D = place.shape, rows.shape[1]
    config = _row_config(D)
    if not D:
        return
    launch(
        _fused_moe_combine_kernel, (T, cdiv(D, config["BLOCK"])),
        rows, weights, bias, place, experts, out, E, D,
        K=K, WEIGHTED=weights is not None, HAS_BIAS=bias is not None,
        COMPUTE=triton_dtype(accumulator(rows.dtype)),
        BLOCK_D=config["BLOCK"], num_warps=config["num_warps"],
    )  # fmt: skip


def _finish(rows: Tensor, bias: Tensor | None, experts: Tensor, E: int) -> None:
    """Add the biases, and write what no product has written."""
    (N, width), config = rows.shape, _row_config(rows.shape[1])
    launch(
        _fused_moe_finish_kernel, (N, cdiv(width, config["BLOCK"])),
        rows, bias, experts, E, width,
        HAS_BIAS=bias is not None, COMPUTE=triton_dtype(accumulator(rows.dtype)),
        BLOCK_F=config["BLOCK"], num_warps=config["num_warps"],
    )  # fmt: skip


def _route(
    indices: Tensor, E: int, order: Tensor, place: Tensor, experts: Tensor, ends: Tensor
) -> None:
    """Write the order of the pairs by expert; those with none, the expert E, come last."""
    flat = indices.reshape(-1).long()
    flat = torch.where((flat >= 0) & (flat < E), flat, E)
    torch.sort(flat, stable=True, out=(experts, order))
    ranks = torch.arange(len(flat), device=flat.device)
    place.view(-1).scatter_(0, order, ranks)
    ends.copy_(torch.searchsorted(experts, torch.arange(E, device=flat.device), right=True))


def fused_moe_fwd(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    alpha: float,
    gate_scale: float,
    scale: float,
    up_offset: float,
    limit: float | None,
    limit_activated: bool,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (E, width, D), K, N = gate_up.shape, indices.shape[-1], indices.numel()
    y = x.new_empty(x.shape)
    order, experts = (indices.new_empty((N,), dtype=torch.int64) for _ in range(2))
    place = indices.new_empty(indices.shape, dtype=torch.int64)
    ends = indices.new_empty((E,), dtype=torch.int32)
    if not has_work(indices):
        return y, x.new_empty((N, width)), order, place, experts, ends

    _route(indices, E, order, place, experts, ends)
    rows = x.reshape(N // K, D).index_select(0, order // K)
    h = _hidden(rows, gate_up, gate_up_bias, ends, experts)
    unit = unit_of(
        activation, alpha, gate_scale, scale, up_offset, limit, limit_activated, interleaved
    )
    (a,) = glu_fwd(h, None, unit)
    outputs = _rows_product(a, down.transpose(1, 2), ends)
    flat_weights = unit_stride(weights.reshape(-1))
    _combine(outputs, place.view(-1, K), experts, E, y, flat_weights, unit_stride(down_bias))
    return y, h, order, place, experts, ends


def fused_moe_bwd(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    h: Tensor,
    order: Tensor,
    place: Tensor,
    experts: Tensor,
    ends: Tensor,
    dy: Tensor,
    activation: str,
    alpha: float,
    gate_scale: float,
    scale: float,
    up_offset: float,
    limit: float | None,
    limit_activated: bool,
    interleaved: bool,
    need_dx: bool,
    need_dweights: bool,
    need_dgate_up: bool,
    need_ddown: bool,
    need_dgate_up_bias: bool,
    need_ddown_bias: bool,
) -> tuple[Tensor | None, ...]:
    needs = {
        "x": (x, need_dx), "weights": (weights, need_dweights), "gate_up": (gate_up, need_dgate_up),
        "down": (down, need_ddown), "gate_up_bias": (gate_up_bias, need_dgate_up_bias),
        "down_bias": (down_bias, need_ddown_bias),
    }  # fmt: skip
    if not has_work(dy):
        # Shapes alone, or nothing that an output depends on.
        return tuple(t.new_zeros(t.shape) if need else None for t, need in needs.values())

    E, K, N = gate_up.shape[0], indices.shape[-1], indices.numel()
    unit = unit_of(
        activation, alpha, gate_scale, scale, up_offset, limit, limit_activated, interleaved
    )
    h, (width, D) = unit_stride(h), gate_up.shape[1:]
    order, place, experts, ends = (unit_stride(t) for t in (order, place, experts, ends))
    tokens, flat_weights = order // K, unit_stride(weights.reshape(-1))
    gradients: dict[str, Tensor] = {}

    dy_rows = dy.reshape(N // K, D).index_select(0, tokens)
    r = _rows_product(dy_rows, down, ends)
    (a,) = glu_fwd(h, None, unit)
    da, weighted = torch.empty_like(a), torch.empty_like(a)
    dweights = weights.new_empty(weights.shape)
    bias = unit_stride(down_bias)
    config = _row_config(width // 2)
    launch(
        _fused_moe_weigh_kernel, (N,),
        r, a, dy_rows, bias, flat_weights, order, experts, da, weighted, dweights, E, D, width // 2,
        HAS_BIAS=bias is not None, COMPUTE=triton_dtype(accumulator(a.dtype)), **config,
    )  # fmt: skip
    gradients["weights"] = dweights
    if need_ddown:
        gradients["down"] = _outer_product(dy_rows, weighted, ends)
    if need_ddown_bias:
        gradients["down_bias"] = _sums(dy_rows, ends, order, flat_weights)

    if need_dx or need_dgate_up or need_dgate_up_bias:
        dh, _ = glu_bwd(h, None, da, unit, True, False)
        if need_dgate_up:
            rows = x.reshape(N // K, D).index_select(0, tokens)
            gradients["gate_up"] = _outer_product(dh, rows, ends)
        if need_dgate_up_bias:
            gradients["gate_up_bias"] = _sums(dh, ends, order)
        if need_dx:
            gradients["x"] = x.new_empty(x.shape)
            drows = _rows_product(dh, gate_up, ends)
            _combine(drows, place.view(-1, K), experts, E, gradients["x"])
    return tuple(gradients[name] if need else None for name, (_, need) in needs.items())


_fused_moe = custom_vjp(
    "fused_moe",
    reference=reference,
    fwd=fused_moe_fwd,
    bwd=fused_moe_bwd,
    results="y",
    residuals="h order place experts ends",
    grads="x weights gate_up down gate_up_bias down_bias",
    autocast="x gate_up down gate_up_bias down_bias",
)


def fused_moe(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    alpha: float = 1.0,
    gate_scale: float = 1.0,
    scale: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    limit_activated: bool = False,
    interleaved: bool = False,
) -> Tensor:
    """Compute the gated MLPs of each token's experts, weighted and added up.

        y_t = Σ_k weights[t, k] · (down[e] · unit(gate_up[e] · x_t + gate_up_bias[e])
                                   + down_bias[e]),    e = indices[t, k]

    Args:
        x: (..., D), floating point: the tokens.
        indices: (..., K), any integer dtype: each token's experts. One outside [0, E), as expert
            parallelism marks those of others, adds nothing.
        weights: (..., K), any floating point: what the router gives them. They get a gradient.
        gate_up: (E, 2F, D), the dtype of x (under autocast cast as F.linear's), any strides: of
            GPT-OSS, which has (E, D, 2F), give `gate_up.transpose(1, 2)`.
        down: (E, D, F), the dtype of x, any strides.
        gate_up_bias, down_bias: (E, 2F) and (E, D), the dtype of x; None: no bias.
        activation, alpha, gate_scale, scale, up_offset, limit, limit_activated, interleaved: the
            unit, and how gate and up lie in h, as in `gated_activation`.

    Returns:
        (..., D), dtype of x.

    Raises:
        TypeError: a tensor is not of the dtype that it must be of, an option is no number.
        ValueError: a shape or device does not fit, there are no experts, an option is out of its
            range.

    Precision: products are rounded to the dtype of x, their sums are float32 (float64 for float64);
        the sum over a token's experts is rounded once.
    Memory: x, the parameters, 2·F numbers and 32 bytes a pair of token and expert live until the
        backward pass. While a pass runs, a few tensors of N · (D + F) numbers, for N pairs. The
        reference, which is what runs on a CPU, runs every expert on every token.
    Source: Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated
        Mixture-of-Experts Layer", 2017; Gale et al., "MegaBlocks: Efficient Sparse Training with
        Mixture-of-Experts", 2023 (grouped products).
    """
    op = "fused_moe"
    check.floating(op, "x", x)
    check.at_least_1d(op, "x", x)
    D, tokens = x.shape[-1], x.shape[:-1]
    check.integer(op, "indices", indices)
    check.at_least_1d(op, "indices", indices)
    K = indices.shape[-1]
    if K == 0:
        check.fail(op, "indices", "name at least one expert a token", "a last size of 0")
    check.shape(op, "indices", indices, (*tokens, K), "that of `x` but for its last size")
    check.floating(op, "weights", weights)
    check.shape(op, "weights", weights, indices.shape, "the shape of `indices`")
    parameters = {
        "gate_up": gate_up, "down": down, "gate_up_bias": gate_up_bias, "down_bias": down_bias
    }  # fmt: skip
    for name, p in parameters.items():
        if p is not None:
            check.floating(op, name, p)
            check.dtype_inside(op, name, p, x, "x")
    for name, t in {"indices": indices, "weights": weights, **parameters}.items():
        if t is not None:
            check.device(op, name, t, x, "x")
    if gate_up.dim() != 3 or 0 in gate_up.shape[:2] or gate_up.shape[1] % 2:
        contract = "have shape (E, 2F, D) with experts that have a width"
        check.fail(op, "gate_up", contract, check.spell(gate_up.shape))
    E, width = gate_up.shape[:2]
    check.shape(op, "gate_up", gate_up, (E, width, D), "(E, 2F, D) with the last size of `x`")
    check.shape(op, "down", down, (E, D, width // 2), "(E, D, F) with the sizes of `gate_up`")
    if gate_up_bias is not None:
        check.shape(op, "gate_up_bias", gate_up_bias, (E, width), "(E, 2F)")
    if down_bias is not None:
        check.shape(op, "down_bias", down_bias, (E, D), "(E, D)")
    check_unit(op, activation, alpha, gate_scale, scale, up_offset, limit)
    return _fused_moe(
        x, indices, weights, gate_up, down, gate_up_bias, down_bias, activation, float(alpha),
        float(gate_scale), float(scale), float(up_offset), limit, bool(limit_activated),
        bool(interleaved),
    )  # fmt: skip
