"""Modules: the keys, shapes and values of the classes whose place they take."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GemmaConfig, LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

import liger_fn.functional as LF
import liger_fn.nn as lnn

SMALL = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "head_dim": 12}


# Sums of up to 40 products of size 10 in float32, in another order: a few 1e-5.
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-4)


def with_exact_gelu(mlp: GemmaMLP) -> GemmaMLP:
    """Gemma's config maps "gelu" to the tanh form, which is what its checkpoints mean."""
    mlp.act_fn = nn.GELU()
    return mlp


def redraw(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module


def assert_same(ours: nn.Module, theirs: nn.Module, *inputs: torch.Tensor) -> None:
    """One loads the other's state_dict; then results and every gradient agree in float32."""
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(redraw(theirs).state_dict())
    got, want = ours(*inputs), theirs(*inputs)
    assert_close(got, want)
    if not list(theirs.parameters()):
        return
    cotangent = torch.randn_like(want)
    assert_close(
        torch.autograd.grad(got, list(ours.parameters()), cotangent),
        torch.autograd.grad(want, list(theirs.parameters()), cotangent),
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lnn.RMSNorm(24, eps=1e-5), nn.RMSNorm(24, eps=1e-5)),
        (lnn.RMSNorm(24, eps=None), nn.RMSNorm(24)),
        (lnn.RMSNorm(24, elementwise_affine=False), nn.RMSNorm(24, 1e-6, elementwise_affine=False)),
        (lnn.RMSNorm(24, cast_before_weight=True), LlamaRMSNorm(24)),
        (lnn.RMSNorm(24, offset=1.0), GemmaRMSNorm(24)),
        (lnn.LayerNorm(24), nn.LayerNorm(24)),
        (lnn.LayerNorm((24,), eps=0.1, bias=False), nn.LayerNorm(24, 0.1, bias=False)),
        (
            lnn.LayerNorm(24, elementwise_affine=False),
            nn.LayerNorm(24, elementwise_affine=False),
        ),
        (lnn.ReLUSquared(), ACT2FN["relu2"]),
        (lnn.SwiGLUMLP(24, 40), LlamaMLP(LlamaConfig(**SMALL))),
        (lnn.SwiGLUMLP(24, 40, bias=True), LlamaMLP(LlamaConfig(**SMALL, mlp_bias=True))),
        (lnn.GeGLUMLP(24, 40), GemmaMLP(GemmaConfig(**SMALL, hidden_act="gelu_pytorch_tanh"))),
        (
            lnn.GeGLUMLP(24, 40, approximate="none"),
            with_exact_gelu(GemmaMLP(GemmaConfig(**SMALL))),
        ),
    ],
    ids=lambda m: type(m).__name__,
)
def test_takes_the_place_of(ours, theirs):
    assert_same(copy.deepcopy(ours), theirs, torch.randn(2, 5, 24))


def test_a_norm_starts_as_the_bare_norm():
    x = torch.randn(3, 24)
    for norm in (lnn.RMSNorm(24), lnn.RMSNorm(24, offset=1.0)):
        torch.testing.assert_close(norm(x), F.rms_norm(x, (24,), eps=1e-6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_without_eps_a_norm_takes_torchs(dtype):
    x = torch.randn(3, 24, dtype=dtype) * 1e-3
    # One rounding of bfloat16; another epsilon would change the values tenfold.
    torch.testing.assert_close(
        lnn.RMSNorm(24, eps=None, dtype=dtype)(x), F.rms_norm(x, (24,)), rtol=1e-2, atol=0.0
    )


def test_a_layer_norm_starts_as_the_bare_norm():
    x = torch.randn(3, 24)
    torch.testing.assert_close(lnn.LayerNorm(24)(x), F.layer_norm(x, (24,)))


@pytest.mark.parametrize("options", [{"eps": None}, {"offset": 1.0}, {"cast_before_weight": True}])
def test_the_fused_addition_is_the_sum_and_the_norm_of_it(options):
    norm, fused = lnn.RMSNorm(24, **options), lnn.FusedAddRMSNorm(24, **options)
    fused.load_state_dict(redraw(norm).state_dict())
    x, residual = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    y, s = fused(x, residual)
    assert torch.equal(s, x + residual)
    assert_close(y, norm(s))


@pytest.mark.parametrize("norm", [lnn.RMSNorm, lnn.FusedAddRMSNorm, lnn.LayerNorm])
def test_a_norm_refuses_several_dimensions(norm):
    sentence = rf"^{norm.__name__}: .* must have one dimension; got \(2, 3\)"
    with pytest.raises(NotImplementedError, match=sentence):
        norm((2, 3))


@pytest.mark.parametrize("layout", ["bhtc", "bthc"])
@pytest.mark.parametrize("batched", [False, True])
def test_rotary_embedding_is_llamas(layout, batched):
    config = LlamaConfig(**SMALL, num_key_value_heads=1, rope_theta=500.0)
    theirs = LlamaRotaryEmbedding(config)
    base = theirs.config.rope_parameters["rope_theta"]
    ours = lnn.RotaryEmbedding(12, base=base, layout=layout)
    assert not ours.state_dict()
    q, k = torch.randn(2, 2, 5, 12), torch.randn(2, 1, 5, 12)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 0, 1, 2]]) if batched else torch.arange(5)
    cos, sin = theirs(q, positions.expand(2, 5))
    want = apply_rotary_pos_emb(q, k, cos, sin)
    if layout == "bthc":
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        want = tuple(t.transpose(1, 2) for t in want)
    torch.testing.assert_close(ours(q, k, positions), want)
    if not batched:
        torch.testing.assert_close(ours(q, k), want)


def test_a_rotary_embedding_turns_far_tokens_the_same_after_a_cast():
    far = torch.tensor([4095])
    exact = lnn.RotaryEmbedding(12)
    cast = copy.deepcopy(exact).to(torch.bfloat16)
    assert torch.equal(cast.cos_sin(far)[0], exact.cos_sin(far)[0])
    assert cast.to("meta").inv_freq.is_meta


LOSS_OPTIONS = [
    {},
    {"reduction": "sum", "ignore_index": 3},
    {"reduction": "none", "label_smoothing": 0.1},
    {"weight": torch.linspace(0.5, 1.5, 11), "label_smoothing": 0.2},
]


@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=lambda o: ",".join(o) or "default")
def test_cross_entropy_loss_is_torchs(options):
    logits, target = torch.randn(7, 11, requires_grad=True), torch.randint(11, (7,))
    ours, theirs = lnn.CrossEntropyLoss(**options), nn.CrossEntropyLoss(**options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    got, want = ours(logits, target), theirs(logits, target)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), logits), torch.autograd.grad(want.sum(), logits)
    )


@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=lambda o: ",".join(o) or "default")
@pytest.mark.parametrize("bias", [False, True])
def test_fused_linear_cross_entropy_loss_is_linear_then_cross_entropy(options, bias):
    head = redraw(nn.Linear(6, 11, bias=bias))
    hidden, target = torch.randn(7, 6, requires_grad=True), torch.randint(11, (7,))
    ours = lnn.FusedLinearCrossEntropyLoss(**options, chunk_size=3)
    got = ours(head.weight, hidden, target, *([head.bias] if bias else []))
    want = nn.CrossEntropyLoss(**options)(head(hidden), target)
    torch.testing.assert_close(got, want)
    wrt = [hidden, *head.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), wrt), torch.autograd.grad(want.sum(), wrt)
    )


def test_embedding_is_torchs():
    ours, theirs = lnn.Embedding(7, 5, padding_idx=2), nn.Embedding(7, 5, padding_idx=2)
    assert_same(ours, theirs, torch.randint(7, (2, 9)))
    with pytest.raises(NotImplementedError, match="`sparse` must be False; got True"):
        lnn.Embedding(7, 5, sparse=True)


def test_sparsemax_is_its_function():
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(lnn.Sparsemax(dim=1)(x), LF.sparsemax(x, dim=1))
    assert "dim=1" in repr(lnn.Sparsemax(dim=1))


def test_gated_norms_are_hugging_faces():
    x, gate = torch.randn(2, 3, 5, 24).unbind()
    assert_same(lnn.GatedRMSNorm(24, cast_before_weight=True), Qwen3NextRMSNormGated(24), x, gate)
    ours = lnn.GatedRMSNorm(24, gate_first=True, groups=3, cast_before_weight=True)
    assert_same(ours, Zamba2RMSNormGated(24, group_size=8), x, gate)
    assert "groups=3" in repr(ours)


def test_group_norm_is_torchs():
    assert_same(lnn.GroupNorm(3, 6), nn.GroupNorm(3, 6), torch.randn(2, 6, 4, 5))


def test_poly_norm_starts_as_the_mean_of_three_norms():
    x = torch.randn(3, 24)
    expected = sum(F.rms_norm(x**k, (24,), eps=1e-6) for k in (1, 2, 3)) / 3
    torch.testing.assert_close(lnn.PolyNorm()(x), expected)
    assert list(lnn.PolyNorm().state_dict()) == ["weight", "bias"]


def test_dyt_starts_as_a_tanh():
    x = torch.randn(3, 24)
    torch.testing.assert_close(lnn.DyT(24)(x), torch.tanh(0.5 * x))
    assert list(lnn.DyT(24).state_dict()) == ["alpha", "weight", "bias"]


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", ["none", "batchmean", "sum", "mean"])
def test_kl_div_loss_is_torchs(reduction, log_target):
    x, y = torch.randn(2, 3, 7).log_softmax(-1).unbind()
    y = y if log_target else y.exp()
    torch.testing.assert_close(
        lnn.KLDivLoss(reduction=reduction, log_target=log_target)(x, y),
        nn.KLDivLoss(reduction=reduction, log_target=log_target)(x, y),
    )


def test_losses_of_two_distributions_are_their_functions():
    x, y = torch.randn(2, 3, 7).log_softmax(-1).unbind()
    labels = torch.tensor([0, 9, 2])
    options = {"ignore_index": 9, "reduction": "sum"}
    torch.testing.assert_close(
        lnn.JSDLoss(beta=0.3, **options)(x, y, labels), LF.jsd(x, y, labels, beta=0.3, **options)
    )
    torch.testing.assert_close(
        lnn.TVDLoss(**options)(x.exp(), y.exp(), labels),
        LF.tvd(x.exp(), y.exp(), labels, **options),
    )
    torch.testing.assert_close(
        lnn.SoftTargetCrossEntropyLoss(label_smoothing=0.1)(x, y.exp()),
        nn.CrossEntropyLoss(label_smoothing=0.1)(x, y.exp()),
    )


@pytest.mark.parametrize(
    ("module", "function", "own"),
    [
        (lnn.FusedLinearJSDLoss, LF.fused_linear_jsd, {"beta": 0.3, "temperature": 2.0}),
        (lnn.FusedLinearKLDivLoss, LF.fused_linear_kl_div, {"reverse": True, "temperature": 2.0}),
        (lnn.FusedLinearTVDLoss, LF.fused_linear_tvd, {"temperature": 2.0}),
        (lnn.FusedLinearCosineLoss, LF.fused_linear_cosine, {}),
    ],
)
def test_losses_of_two_heads_are_their_functions(module, function, own):
    heads = torch.randn(7, 4), torch.randn(3, 4), torch.randn(7, 5), torch.randn(3, 5)
    labels, biases = torch.tensor([0, 9, 2]), torch.randn(2, 7).unbind()
    options = own | {"hard_weight": 0.5, "ignore_index": 9, "chunk_size": 2}
    torch.testing.assert_close(
        module(**options)(*heads, labels, *biases),
        function(*heads, labels, bias=biases[0], teacher_bias=biases[1], **options),
    )


def test_options_show_in_the_repr():
    assert "beta=0.3, temperature=2.0" in repr(lnn.FusedLinearJSDLoss(beta=0.3, temperature=2.0))
    assert "beta=0.3" in repr(lnn.JSDLoss(beta=0.3))
    assert "log_target=True" in repr(lnn.KLDivLoss(log_target=True))
    assert "softcap=30.0" in repr(lnn.CrossEntropyLoss(softcap=30.0))
    assert "cast_before_weight=True" in repr(lnn.RMSNorm(8, cast_before_weight=True))
    assert "offset=1.0" in repr(lnn.FusedAddRMSNorm(8, offset=1.0))
    assert "bias=False" in repr(lnn.LayerNorm(8, bias=False))
    assert "approximate='none'" in repr(lnn.GeGLUMLP(8, 8, approximate="none"))
    assert "base=500.0" in repr(lnn.RotaryEmbedding(8, base=500.0))
