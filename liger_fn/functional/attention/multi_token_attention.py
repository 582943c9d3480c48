"""Multi-token attention: causal weights of attention, then a convolution over queries and keys.

    p = softmax(s_ij over j ≤ i), or sparsemax            c = weight ∗ p + bias
    y = c where j ≤ i, and 0 elsewhere

    dc = dy where j ≤ i, and 0 elsewhere
    dweight, dbias, dp = the convolution's own, of dc, p and weight
    ds = p · (dp − Σ_j dp · p), or sparsemax's own

Kept are the scores and the weight alone: p is computed again, which costs less memory traffic than
the convolution beside it, and takes B · H · T² numbers out of memory. No mask is read, and none has
a pass of its own over the scores: the kernels know the diagonal, read nothing past it, and write
zeros there.

The convolution has kernels of its own, in causal_convolution.py, where it has stride 1 and each
head is mixed from and into at most MOST_MIXED others, by windows of at most WIDEST keys; others are
PyTorch's.

Memory traffic in bytes per element of 2-byte scores, with these kernels: 6 forward (read half the
scores, write p, read half of p, write y), 11 backward (the same for p, read half of dy and write
half of dp, read half of p and of dy for dweight, read half of the scores and of dp, write ds).
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_fn.functional.activation import softmax, sparsemax
from liger_fn.functional.attention.causal_convolution import causal_conv_bwd, causal_conv_fwd
from liger_fn.functional.core import check
from liger_fn.functional.core.custom_vjp import custom_vjp
from liger_fn.functional.core.launch import unit_stride

Pair = int | tuple[int, int]
# Of more heads a matrix product is the better convolution; a row of more taps does not fit into
# registers.
MOST_MIXED = 4
WIDEST = 16


def reference(
    scores: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair | Literal["causal"] = 0,
    dilation: Pair = 1,
    groups: int = 1,
    sparse: bool = False,
) -> Tensor:
    sizes = _pair(stride) + _padding(padding, weight, _pair(dilation)) + _pair(dilation)
    return _reference(scores, weight, bias, *sizes, groups, sparse)


def _reference(
    scores: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride_q: int,
    stride_k: int,
    padding_q: int,
    padding_k: int,
    dilation_q: int,
    dilation_k: int,
    groups: int,
    sparse: bool,
) -> Tensor:
    past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if sparse:
        p = sparsemax.reference(scores.masked_fill(~past, -torch.inf))
    else:
        p = softmax.reference(scores, mask=past)
    sizes = (stride_q, stride_k), (padding_q, padding_k), (dilation_q, dilation_k)
    c = F.conv2d(p.reshape(-1, *p.shape[-3:]), weight, bias, *sizes, groups)
    y = c[..., : c.shape[-1], :].tril()
    return y.reshape(*p.shape[:-3], *y.shape[-3:])


_cudnn_is_ours = threading.Lock()


@contextlib.contextmanager
def _fixed_order() -> Iterator[None]:
    """Let cuDNN choose its algorithm by sizes, not by measuring, and none whose sums vary."""
    cudnn = torch.backends.cudnn
    # These are the process's, and autograd's threads may be here at once.
    with _cudnn_is_ours:
        before = cudnn.deterministic, cudnn.benchmark
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = before


def _probabilities(scores: Tensor, sparse: bool, keep: bool) -> tuple[Tensor, Tensor | None]:
    """The weights of attention (B, H, T, T), and what the softmax is to keep of its rows."""
    scores = scores.reshape(-1, *scores.shape[-3:])
    if sparse:
        return *sparsemax.causal_sparsemax_fwd(scores), None
    return softmax.causal_softmax_fwd(scores, keep)


def multi_token_attention_fwd(
    scores: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride_q: int,
    stride_k: int,
    padding_q: int,
    padding_k: int,
    dilation_q: int,
    dilation_k: int,
    groups: int,
    sparse: bool,
) -> tuple[Tensor]:
    p, _ = _probabilities(scores, sparse, keep=False)
    padding, dilation = (padding_q, padding_k), (dilation_q, dilation_k)
    if _mixes_few(weight, stride_q, stride_k, groups):
        y = causal_conv_fwd(p, weight, bias, padding, dilation, groups)
    else:
        y = _conv_fwd(p, weight, bias, (stride_q, stride_k), padding, dilation, groups)
    return (y.view(*scores.shape[:-3], *y.shape[-3:]),)


def _mixes_few(weight: Tensor, stride_q: int, stride_k: int, groups: int) -> bool:
    """Say whether our own convolution is the one to take: each map is a sum over few others."""
    mixed = max(weight.shape[1], weight.shape[0] // groups)
    return stride_q == stride_k == 1 and mixed <= MOST_MIXED and weight.shape[-1] <= WIDEST


def _conv_fwd(
    p: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    with _fixed_order():
        c = F.conv2d(p, weight.contiguous(), unit_stride(bias), stride, padding, dilation, groups)
    # What is padded above gives rows past the last query, too.
    square = c.shape[-2] == c.shape[-1] and c.is_contiguous()
    return c.tril_() if square else c[..., : c.shape[-1], :].tril()


def multi_token_attention_bwd(
    scores: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dy: Tensor,
    stride_q: int,
    stride_k: int,
    padding_q: int,
    padding_k: int,
    dilation_q: int,
    dilation_k: int,
    groups: int,
    sparse: bool,
    need_dscores: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    p, top_total = _probabilities(scores, sparse, keep=True)
    dy = dy.reshape(-1, *dy.shape[-3:])
    padding, dilation = (padding_q, padding_k), (dilation_q, dilation_k)
    wanted = need_dscores, need_dweight, need_dbias
    if _mixes_few(weight, stride_q, stride_k, groups):
        dp, dweight, dbias = causal_conv_bwd(
            p, weight, bias, dy, padding, dilation, groups, *wanted
        )
    else:
        dp, dweight, dbias = _conv_bwd(
            p, weight, bias, dy, (stride_q, stride_k), padding, dilation, groups, wanted
        )

    dscores = None
    if dp is not None:
        if sparse:
            (dscores,) = sparsemax.sparsemax_bwd(p, p, dp)
        else:
            flat = scores.reshape(p.shape)
            (dscores,) = softmax.causal_softmax_bwd(flat, top_total, dp)
        dscores = dscores.view(scores.shape)
    return dscores, dweight, dbias


def _conv_bwd(
    p: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dy: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dc = dy.tril()
    rows = _results(p.shape[-2], weight.shape[-2], stride[0], padding[0], dilation[0])
    if rows != dc.shape[-2]:
        dc = F.pad(dc, (0, 0, 0, rows - dc.shape[-2]))
    with _fixed_order():
        return torch.ops.aten.convolution_backward(
            dc, p, weight.contiguous(), None if bias is None else list(bias.shape),
            list(stride), list(padding), list(dilation), False, [0, 0], groups, list(wanted),
        )  # fmt: skip


_multi_token_attention = custom_vjp(
    "multi_token_attention",
    reference=_reference,
    fwd=multi_token_attention_fwd,
    bwd=multi_token_attention_bwd,
    results="y",
    grads="scores weight bias",
    rows="scores y",
    core_dims=3,
    autocast="scores weight bias",
)


def multi_token_attention(
    scores: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair | Literal["causal"] = 0,
    dilation: Pair = 1,
    groups: int = 1,
    sparse: bool = False,
) -> Tensor:
    """Turn causal scores into weights, and mix these over neighbouring queries, keys and heads.

        y = mask₀(conv2d(softmax(mask₋∞(scores)), weight, bias)),  the masks leave key j ≤ query i

    Args:
        scores: (..., H, T, T), floating point, any strides: of T queries (rows) and T keys. Those
            of keys after the query are not read.
        weight: (O, H / groups, Q, K), the dtype of scores (under autocast cast as F.conv2d casts
            it): mixes Q queries and K keys of H / groups heads into each of O heads.
        bias: (O,), the dtype of scores; None: no bias.
        stride, padding, dilation, groups: as in F.conv2d, an integer or one for queries and one for
            keys; there must come out as many queries as keys. With the same padding above and below
            a query sees later ones, and through their scores later tokens. Padding "causal", for an
            odd K, does not let it: of the Q queries it is the last, of the K keys its key is the
            middle one, and there come out T of both, or one of every `stride`.
        sparse: take sparsemax instead of softmax.

    Returns:
        (..., O, T′, T′), dtype of scores, contiguous: 0 where the key's index is above the query's.

    Raises:
        TypeError: a tensor is not of the dtype that it must be of.
        ValueError: a shape or device does not fit, or other numbers of queries and keys, or none,
            come out.

    Precision: weights of attention are computed in float32 (float64 for float64) and rounded once,
        and so are the sums of the convolution. With a stride, with more than 4 heads in a group,
        before or after the mixing, or with K above 32 these are PyTorch's, of TF32 products of
        float32 where `torch.backends.cudnn.allow_tf32`. A query all of whose scores are −∞ has
        weights 0, as in softmax under a mask; of sparsemax, NaN.
    Memory: scores and weight live until the backward pass; (..., H, T, T) weights of attention only
        while a pass runs.
    Source: Golovneva et al., "Multi-Token Attention", 2025; Martins and Astudillo, "From Softmax to
        Sparsemax", 2016.
    """
    _check(scores, weight, bias, groups)
    strides, dilations = _checked_pair("stride", stride, 1), _checked_pair("dilation", dilation, 1)
    if padding != "causal":
        _checked_pair("padding", padding, 0)
    elif weight.shape[-1] % 2 == 0:
        contract = 'have an odd last size where `padding` is "causal"'
        check.fail("multi_token_attention", "weight", contract, weight.shape[-1])
    paddings = _padding(padding, weight, dilations)
    _check_square(scores, weight, strides, paddings, dilations, padding == "causal")
    return _multi_token_attention(
        scores, weight, bias, *strides, *paddings, *dilations, groups, bool(sparse)
    )


def _pair(value: Pair) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _padding(
    padding: Pair | Literal["causal"], weight: Tensor, dilation: tuple[int, int]
) -> tuple[int, int]:
    """What is padded on both sides; the rows past the last query are cut off again."""
    if padding != "causal":
        return _pair(padding)
    Q, K = weight.shape[-2:]
    return (Q - 1) * dilation[0], (K - 1) * dilation[1] // 2


def _results(T: int, size: int, stride: int, padding: int, dilation: int) -> int:
    """How many results a convolution has along one dimension."""
    return (T + 2 * padding - dilation * (size - 1) - 1) // stride + 1


def _check(scores: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    op = "multi_token_attention"
    check.floating(op, "scores", scores)
    if scores.dim() < 3 or scores.shape[-1] != scores.shape[-2]:
        check.fail(op, "scores", "have shape (..., H, T, T)", check.spell(scores.shape))
    positive = isinstance(groups, int) and groups > 0
    check.number(op, "groups", groups, "be a positive integer", positive)
    H = scores.shape[-3]
    if H == 0 or H % groups:
        check.fail(op, "groups", f"divide {H}, the heads of `scores`", groups)
    for name, t in {"weight": weight, "bias": bias}.items():
        if t is not None:
            check.floating(op, name, t)
            check.dtype_inside(op, name, t, scores, "scores")
            check.device(op, name, t, scores, "scores")
    fits = weight.dim() == 4 and 0 not in weight.shape and weight.shape[1] == H // groups
    if not fits or weight.shape[0] % groups:
        contract = f"have shape (O, {H // groups}, Q, K), O a multiple of {groups}"
        check.fail(op, "weight", contract, check.spell(weight.shape))
    if bias is not None:
        check.shape(op, "bias", bias, (weight.shape[0],), "the first size of `weight`")


def _checked_pair(name: str, value: Pair, least: int) -> tuple[int, int]:
    pair = _pair(value)
    if len(pair) != 2 or not all(type(n) is int and n >= least for n in pair):
        contract = f"be an integer of at least {least}, or two"
        check.fail("multi_token_attention", name, contract, repr(value))
    return pair


def _check_square(
    scores: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    causal: bool,
) -> None:
    T, (Q, K) = scores.shape[-1], weight.shape[-2:]
    queries, keys = (
        _results(T, *sizes) for sizes in zip((Q, K), stride, padding, dilation, strict=True)
    )
    if causal:
        queries = _results(T, 1, stride[0], 0, 1)
    if queries != keys or keys < 1:
        contract = "leave as many queries as keys, with `weight`, `stride` and `dilation`"
        got = f"{max(queries, 0)} and {max(keys, 0)}"
        check.fail("multi_token_attention", "padding", contract, got)
