"""Every op as Hugging Face's models write it: what a model runs when nobody patches it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    cast_before_weight: bool = False,
) -> Tensor:
    """LlamaRMSNorm; with an offset, GemmaRMSNorm, which multiplies before it rounds."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (h * (offset + weight.float())).type_as(x)
    return weight * h.to(x.dtype)


def fused_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, **options
) -> tuple[Tensor, Tensor]:
    """The addition at the end of a block, and the norm at the start of the next."""
    s = residual + x
    return rms_norm(s, weight, **options), s


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5) -> Tensor:
    """`nn.LayerNorm`, which models use as it is."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    gate, up = halves(gate, up)
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor | None = None, *, approximate: str = "tanh") -> Tensor:
    gate, up = halves(gate, up)
    return F.gelu(gate, approximate=approximate) * up


def softmax(x: Tensor, *, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """As `eager_attention_forward` takes it of its scores, in float32."""
    z = x if scale == 1.0 else x * scale
    if mask is not None:
        z = z.masked_fill(~mask, torch.finfo(z.dtype).min)
    return F.softmax(z, dim=-1, dtype=torch.float32).to(x.dtype)


def gated_activation(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    interleaved: bool = False,
) -> Tensor:
    """GptOssExperts' `_apply_gate`."""
    gate, up = (gate[..., ::2], gate[..., 1::2]) if interleaved else halves(gate, up)
    gate = gate.clamp(min=None, max=limit)
    up = up.clamp(min=-limit, max=limit)
    return (up + up_offset) * (gate * torch.sigmoid(gate * alpha))


def relu_squared(x: Tensor) -> Tensor:
    return torch.square(F.relu(x))


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Llama's `apply_rotary_pos_emb`."""
    cos, sin = (t[..., None, :, :] for t in (cos, sin))
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`ForCausalLMLoss`, which makes a float32 copy of the logits first."""
    return F.cross_entropy(
        logits.float(),
        target,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def fused_linear_cross_entropy(
    weight: Tensor, x: Tensor, y: Tensor, *, bias: Tensor | None = None, **options
) -> Tensor:
    return cross_entropy(F.linear(x, weight, bias), y, **options)


def logprobs(
    logits: Tensor, target: Tensor, *, entropy: bool = False, top1: bool = False
) -> Tensor | tuple[Tensor, ...]:
    """TRL's `selective_log_softmax` and `entropy_from_logits`, of a float32 copy, all at once."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    logp = log_p.gather(-1, target[..., None]).squeeze(-1)
    if not (entropy or top1):
        return logp
    entropies = -(log_p.exp() * log_p).sum(-1)
    return logp, entropies, logits.argmax(-1)


def fused_linear_logprobs(
    weight: Tensor, x: Tensor, y: Tensor, *, entropy: bool = False, top1: bool = False
) -> Tensor | tuple[Tensor, ...]:
    return logprobs(F.linear(x, weight), y, entropy=entropy, top1=top1)


def fused_linear_jsd(
    weight: Tensor,
    x: Tensor,
    teacher_weight: Tensor,
    teacher_x: Tensor,
    labels: Tensor | None = None,
    *,
    beta: float = 0.5,
) -> Tensor:
    """TRL's `generalized_jsd_loss`, of logits and a mask."""
    return _of_both(jsd, weight, x, teacher_weight, teacher_x, labels, beta=beta)


def fused_linear_kl_div(
    weight: Tensor,
    x: Tensor,
    teacher_weight: Tensor,
    teacher_x: Tensor,
    labels: Tensor | None = None,
    *,
    reverse: bool = False,
) -> Tensor:
    """The same at an end of β."""

    def terms(log_q, log_p):
        first, second = (log_p, log_q) if reverse else (log_q, log_p)
        return F.kl_div(first, second, reduction="sum", log_target=True) / log_q.shape[0]

    return _of_both(terms, weight, x, teacher_weight, teacher_x, labels)


def fused_linear_tvd(
    weight: Tensor,
    x: Tensor,
    teacher_weight: Tensor,
    teacher_x: Tensor,
    labels: Tensor | None = None,
) -> Tensor:
    def terms(log_q, log_p):
        return tvd(log_q.exp(), log_p.exp())

    return _of_both(terms, weight, x, teacher_weight, teacher_x, labels)


def fused_linear_cosine(
    weight: Tensor,
    x: Tensor,
    teacher_weight: Tensor,
    teacher_x: Tensor,
    labels: Tensor | None = None,
) -> Tensor:
    z = F.linear(x, weight).float()
    with torch.no_grad():
        y = F.linear(teacher_x, teacher_weight).float()
    if labels is not None:
        z, y = z[labels != -100], y[labels != -100]
    return (1 - F.cosine_similarity(z, y, dim=-1)).mean()


def _of_both(loss, weight, x, teacher_weight, teacher_x, labels, **options) -> Tensor:
    """A loss of the log probabilities of the rows that count; their mask waits for the device."""
    log_q = F.linear(x, weight).float().log_softmax(-1)
    with torch.no_grad():
        log_p = F.linear(teacher_x, teacher_weight).float().log_softmax(-1)
    if labels is not None:
        mask = labels != -100
        log_q, log_p = log_q[mask], log_p[mask]
    return loss(log_q, log_p, **options)


def fused_linear_selected_logprobs(weight: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    return F.linear(x, weight).float().log_softmax(-1).gather(-1, indices)


def kl_div(
    input: Tensor, target: Tensor, *, reduction: str = "mean", log_target: bool = False
) -> Tensor:
    return F.kl_div(input.float(), target.float(), reduction=reduction, log_target=log_target)


def jsd(input: Tensor, target: Tensor, *, beta: float = 0.5) -> Tensor:
    """TRL's `generalized_jsd_loss`, after its log_softmax."""
    input, target = input.float(), target.float()
    weights = torch.log(torch.tensor([1 - beta, beta], device=input.device))
    mixture = torch.logsumexp(torch.stack([input + weights[0], target + weights[1]]), dim=0)
    to_target = F.kl_div(mixture, target, reduction="none", log_target=True)
    to_input = F.kl_div(mixture, input, reduction="none", log_target=True)
    return (beta * to_target + (1 - beta) * to_input).sum() / input.shape[0]


def tvd(input: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (input.float() - target.float()).abs().sum(-1).mean()


def soft_target_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), target.float())


def sparsemax(x: Tensor, dim: int = -1) -> Tensor:
    """The paper's algorithm, as entmax writes it: sort, sum, compare."""
    x = x.float()
    highest = x.sort(dim, descending=True).values
    rank = torch.arange(1, x.shape[dim] + 1, device=x.device)
    sums = highest.cumsum(dim) - 1
    size = (rank * highest > sums).sum(dim, keepdim=True)
    return (x - sums.gather(dim, size - 1) / size).clamp(min=0)


def embedding(input: Tensor, weight: Tensor, *, padding_idx: int | None = None) -> Tensor:
    return F.embedding(input, weight, padding_idx)


def dyt(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The paper's module."""
    return torch.tanh(alpha * x) * weight + bias


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Qwen3NextRMSNormGated."""
    return (rms_norm(x, weight, eps=eps) * F.silu(gate.float())).to(x.dtype)


def group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, num_groups, weight, bias)


def poly_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """PolyCom's module."""
    cube, square, first = (
        u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + eps) for u in (x**3, x**2, x)
    )
    return weight[0] * cube + weight[1] * square + weight[2] * first + bias


def modulated_layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """DiT's `modulate` of its norm without parameters."""
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def modulated_rms_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    h = x.float()
    normed = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def fused_moe(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    **unit,
) -> Tensor:
    """Qwen3MoeExperts and GptOssExperts: a loop over the experts that some token wants."""
    y = torch.zeros_like(x)
    for e in indices.unique().tolist():
        token, k = torch.where(indices == e)
        h = F.linear(x[token], gate_up[e], None if gate_up_bias is None else gate_up_bias[e])
        a = gated_activation(h, **unit) if unit else swiglu(h)
        out = F.linear(a, down[e], None if down_bias is None else down_bias[e])
        y.index_add_(0, token, (out * weights[token, k, None]).to(y.dtype))
    return y


def fused_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Phi3MLP."""
    return F.linear(swiglu(F.linear(x, gate_up)), down)


def gated_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """The second half of LlamaMLP."""
    return F.linear(swiglu(gate, up), weight)


def attention_residual(values: Tensor, query: Tensor, weight: Tensor) -> Tensor:
    """The paper's `block_attn_res`, of outputs that are stacked already."""
    keys = rms_norm(values, weight)
    alpha = torch.einsum("d, n b t d -> n b t", query, keys).softmax(0)
    return torch.einsum("n b t, n b t d -> b t d", alpha, values)


def mhc_pre(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """DeepseekV4HyperConnection."""
    H, eps = x.shape[-2], 1e-6
    flat = x.flatten(2).float()
    mix = F.linear(flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps), weight.float())
    (pre, post, res), biases = (t.split([H, H, H * H], -1) for t in (mix, bias))
    pre = torch.sigmoid(pre * scale[0] + biases[0])
    post = 2 * torch.sigmoid(post * scale[1] + biases[1])
    res = torch.softmax((res * scale[2] + biases[2]).unflatten(-1, (H, H)), -1) + eps
    res = res / (res.sum(-2, keepdim=True) + eps)
    for _ in range(19):
        res = res / (res.sum(-1, keepdim=True) + eps)
        res = res / (res.sum(-2, keepdim=True) + eps)
    return (pre.unsqueeze(-1) * x).sum(2).to(x.dtype), post, res


def mhc_post(x: Tensor, y: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """DeepseekV4DecoderLayer's, after its attention and after its experts."""
    return post.to(x.dtype).unsqueeze(-1) * y.unsqueeze(-2) + torch.matmul(res.to(x.dtype), x)


def multi_token_attention(
    scores: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: int | str = 0,
    groups: int = 1,
    sparse: bool = False,
) -> Tensor:
    """The paper's formula; of causal padding with zeros before the first query, not after."""
    T, (Q, K) = scores.shape[-1], weight.shape[-2:]
    future = torch.ones(T, T, dtype=torch.bool, device=scores.device).triu(1)
    z = scores.masked_fill(future, -torch.inf)
    p = sparsemax(z).to(scores.dtype) if sparse else F.softmax(z, dim=-1)
    if padding == "causal":
        p, padding = F.pad(p, (K // 2, K // 2, Q - 1, 0)), 0
    y = F.conv2d(p, weight, bias, padding=padding, groups=groups)
    return y.masked_fill(future, 0.0)


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | tuple[int, int],
    *,
    dilation: int = 1,
    window: str = "shifted",
) -> Tensor:
    """The attention of models, with a mask of all pairs of tokens."""
    sizes = kernel_size if isinstance(kernel_size, tuple) else (kernel_size,)
    lengths = q.shape[-1 - len(sizes) : -1]
    sees = torch.ones(1, 1, dtype=torch.bool, device=q.device)
    for T, size in zip(lengths, sizes, strict=True):
        sees = torch.kron(sees, windows(T, size, dilation, window, q.device))
    q, k, v = (t.flatten(-1 - len(sizes), -2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, sees).unflatten(-2, lengths)


def windows(T: int, size: int, dilation: int, window: str, device: torch.device) -> Tensor:
    """Which of T tokens see which."""
    query, key = torch.arange(T, device=device)[:, None], torch.arange(T, device=device)
    return in_window(query, key, T, size, dilation, window)


def in_window(query: Tensor, key: Tensor, T: int, size: int, dilation: int, window: str) -> Tensor:
    """Whether a query of T tokens sees a key."""
    place = query // dilation
    first = place - (size - 1 if window == "causal" else size // 2)
    if window == "shifted":
        length = (T - query % dilation + dilation - 1) // dilation
        first = first.clamp(min=0).minimum(length - size)
    seen = (key // dilation >= first) & (key // dilation < first + size)
    return seen & (key % dilation == query % dilation)


def halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gate and up, also where both lie in one tensor."""
    return tuple(gate.chunk(2, -1)) if up is None else (gate, up)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)
