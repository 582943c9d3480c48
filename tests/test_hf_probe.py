"""What looks like one of our ops and is not: each of these was, or could be, taken for it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v4 import modeling_deepseek_v4
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.llama4 import modeling_llama4
from transformers.models.nemotron import modeling_nemotron

from liger_fn import functional
from liger_fn.hf import apply
from liger_fn.hf.families import (
    ACTIVATION,
    FAMILIES,
    GATED_MLP,
    GATED_NORM,
    NORM,
    Family,
)
from liger_fn.hf.probe import Rejected
from liger_fn.hf.rotary import guarded, prove_rotary
from liger_fn.testing.tiny_models import tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("reference_path")


def outcomes(model):
    """The report's answers by class name: the op, or why not."""
    found: dict[str, list[str]] = {}
    for row in apply(model).rows:
        found.setdefault(row.name, []).append(row.how or row.reason)
    return found


@pytest.fixture
def calls(monkeypatch):
    """Record the calls of ops, by their names."""
    calls = []

    def recorded(name, op):
        return lambda *args, **kwargs: calls.append(name) or op(*args, **kwargs)

    for name in {family.op for family in FAMILIES} | {"rope"}:
        monkeypatch.setattr(functional, name, recorded(name, getattr(functional, name)))
    return calls


def prove(place, module):
    return place.prove(module, [family for family in FAMILIES if family.place is place])


# architectures


def test_a_gated_norm_whose_gate_is_optional(calls):
    """Without its gate it looks like a plain norm."""
    model = tiny_model("bamba")
    found = outcomes(model)
    options = "gate_first=True, activation=silu, cast_before_weight=True"
    assert found["BambaRMSNormGated"] == [f"gated_rms_norm({options})"]
    assert found["BambaRMSNorm"] == ["rms_norm(cast_before_weight=True)"]
    norm = next(m for m in model.modules() if type(m).__name__ == "BambaRMSNormGated")
    x, gate = torch.randn(2, 3, *norm.weight.shape), torch.randn(2, 3, *norm.weight.shape)
    for arguments, is_ours in (((x,), False), ((x, gate), True), ((x, gate.double()), False)):
        calls.clear()
        got, expected = norm(*arguments), type(norm).forward(norm, *arguments)
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected)
        assert bool(calls) == is_ours


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("qwen3_next", "gate_first=False, activation=silu, cast_before_weight=True"),
        ("kimi_linear", "gate_first=False, activation=sigmoid, cast_before_weight=False"),
        ("nemotron_h", "gate_first=True, activation=silu, cast_before_weight=True"),
    ],
)
def test_gated_norms_in_their_forms(model_type, options):
    found = outcomes(tiny_model(model_type))
    gated = [how for name, (how, *_) in found.items() if name.endswith("RMSNormGated")]
    assert gated == [f"gated_rms_norm({options})"]


class GatedOtherwise(LlamaRMSNorm):
    def forward(self, hidden_states, gate):
        return super().forward(hidden_states) * torch.tanh(gate)


class GatedAndClamped(LlamaRMSNorm):
    def forward(self, hidden_states, gate):
        return super().forward(hidden_states) * F.silu(gate.clamp(max=100.0))


@pytest.mark.parametrize("cls", [GatedOtherwise, GatedAndClamped])
def test_what_looks_like_a_gated_norm(cls):
    with pytest.raises(Rejected, match="the results differ"):
        prove(GATED_NORM, cls(32))


def test_relu_squared():
    assert outcomes(tiny_model("nemotron"))["ReLUSquaredActivation"] == ["relu_squared()"]

    class LeakyReLUSquared(nn.Module):
        def forward(self, x):
            return F.leaky_relu(x).square()

    with pytest.raises(Rejected, match="is not relu_squared"):
        prove(ACTIVATION, LeakyReLUSquared())


@pytest.mark.parametrize(
    ("model_type", "task", "how"),
    [
        ("deepseek_v4", "causal-lm", "limit=limit"),
        ("glm5_next", "image-text-to-text", "limit=swiglu_limit"),
        ("gpt_oss", "causal-lm", "up_offset=1.0, interleaved=True, limit=limit, alpha=alpha"),
    ],
)
def test_a_clamp_that_ordinary_inputs_do_not_reach(model_type, task, how):
    """It is no swiglu; the op that clamps reads the bound from the module."""
    found = outcomes(tiny_model(model_type, task))
    gates = [ours for name, (ours, *_) in found.items() if ours.startswith("gated_activation")]
    assert gates
    assert all(how in ours for ours in gates)
    assert not any(ours.startswith("swiglu") for (ours, *_) in found.values())


def test_a_bound_is_read_at_the_call():
    model = tiny_model("deepseek_v4")
    apply(model)
    mlp = next(m for m in model.modules() if type(m).__name__ == "DeepseekV4MLP")
    x = 100 * torch.randn(3, 64)
    for mlp.limit in (10.0, 0.5):
        torch.testing.assert_close(mlp(x), type(mlp).forward(mlp, x))


class ClampedByNobody(LlamaMLP):
    """Its attribute says one bound, its forward another."""

    limit = 7.0

    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=8.0), self.up_proj(x).clamp(-8.0, 8.0)
        return self.down_proj(self.act_fn(gate) * up)


def test_a_clamp_at_another_bound():
    with pytest.raises(Rejected, match="the results differ"):
        prove(GATED_MLP, ClampedByNobody(tiny_config("llama")))


@pytest.mark.parametrize("width", [16, 48, 80])
def test_a_norm_that_insists_on_its_width(width):
    assert prove(NORM, nn.RMSNorm(width, eps=1e-6)).candidate.op == "rms_norm"


def test_a_norm_that_keeps_its_width_under_another_name():
    """CPM-Ant asks for its number of features, which only the weight tells."""
    found = outcomes(tiny_model("cpmant"))
    assert found["CpmAntLayerNorm"] == ["rms_norm(cast_before_weight=True)"]


def test_autocast_s_own_rule_for_torch_s_norms(calls):
    """Autocast makes float32 of what `F.rms_norm` gets; a model's own formula it leaves alone."""
    torch_s, model_s = nn.RMSNorm(32, eps=1e-6), LlamaRMSNorm(32)
    forwards = {norm: prove(NORM, norm).candidate.run for norm in (torch_s, model_s)}
    with torch.autocast("cpu", torch.bfloat16):
        for norm, dtype, is_ours in (
            (torch_s, torch.bfloat16, False),
            (torch_s, torch.float32, True),
            (model_s, torch.float32, True),
        ):
            calls.clear()
            x = torch.randn(2, 32, dtype=dtype)
            got, expected = forwards[norm](norm, x), norm(x)
            assert got.dtype == expected.dtype
            torch.testing.assert_close(got, expected)
            assert bool(calls) == is_ours


def test_an_epsilon_that_is_written_in_the_forward():
    class Written(LlamaRMSNorm):
        def __init__(self, eps):
            super().__init__(32)
            del self.variance_epsilon
            self.holder = [eps]

        def forward(self, hidden_states):
            size = hidden_states.float().pow(2).mean(-1, keepdim=True)
            normalised = hidden_states.float() * torch.rsqrt(size + self.holder[0])
            return self.weight * normalised.to(hidden_states.dtype)

    assert "eps=1e-06" in prove(NORM, Written(1e-6)).candidate.how
    assert "eps=1e-05" in prove(NORM, Written(1e-5)).candidate.how
    with pytest.raises(Rejected, match="the results differ"):
        prove(NORM, Written(3e-6))


def test_the_report_has_no_line_about_attention():
    assert not any("Attention" in row.name for row in apply(tiny_model("bert")).rows)


def test_dropout_that_evaluation_does_not_show():
    dropping = tiny_model("seed_oss", residual_dropout=0.1).eval()
    assert "dropout" in outcomes(dropping)["SeedOssMLP"][0]
    assert outcomes(tiny_model("seed_oss"))["SeedOssMLP"] == ["swiglu()"]


def test_a_multiplier_on_one_instance_only():
    model = tiny_model("falcon_h1")
    model.model.layers[0].feed_forward.gate_multiplier = 0.5
    report = apply(model, ops=["swiglu"])
    assert report.replaced() == {"swiglu": 1}
    assert "forward" not in model.model.layers[0].feed_forward.__dict__


def test_rounding_before_or_after_the_weight():
    """The two conventions agree in float32 and differ in bfloat16."""
    for model_type, before in (("llama", True), ("olmo2", False), ("gpt_oss", False)):
        model = tiny_model(model_type)
        norm = next(name for name in outcomes(model) if "RMSNorm" in name)
        row = next(row for row in apply(model).rows if row.name == norm)
        assert row.how == f"rms_norm(cast_before_weight={before})"
        assert row.error16 == 0


def test_a_rotary_function_with_other_arguments():
    """Llama 4's images: the function is not even tried."""
    with pytest.raises(Rejected, match=r"takes \(query, key, freqs_ci\), not \(q, k, cos, sin\)"):
        prove_rotary(modeling_llama4.vision_apply_rotary_emb)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("modeling", [modeling_llama4, modeling_deepseek_v2])
def test_complex_angles(modeling, dtype, calls):
    original = modeling.apply_rotary_emb
    rotate = guarded(original, prove_rotary(original))
    angle = torch.rand(1, 5, 8)
    angles = torch.polar(torch.ones_like(angle), angle)
    shapes = [(2, 5, 4, 16), (2, 5, 2, 16)]
    if modeling is modeling_deepseek_v2:
        shapes = [(2, 4, 5, 16), (2, 2, 5, 16)]
    q, k = (torch.randn(shape).to(dtype) for shape in shapes)
    calls.clear()
    torch.testing.assert_close(rotate(q, k, angles), original(q, k, angles))
    assert len(calls) == 1
    # What is not complex was not proved.
    for got, expected in zip(rotate(q, k, angle), original(q, k, angle), strict=True):
        assert torch.equal(got, expected)
    assert len(calls) == 1


def test_the_sine_before_the_cosine(calls):
    original = modeling_gptj.apply_rotary_pos_emb
    rotate = guarded(original, prove_rotary(original))
    angle, x = torch.rand(2, 5, 8), torch.randn(2, 5, 4, 16)
    calls.clear()
    rotated = rotate(x, angle.sin(), angle.cos())
    torch.testing.assert_close(rotated, original(x, angle.sin(), angle.cos()))
    assert len(calls) == 1
    part = x[..., :8]
    with pytest.raises(RuntimeError, match="size"):
        rotate(part, angle.sin(), angle.cos())
    assert len(calls) == 1


def test_the_last_features_of_a_head_are_rotated():
    """DeepSeek-V4 rotates the last features; only whole heads are proved, the rest is its own."""
    original = modeling_deepseek_v4.apply_rotary_pos_emb
    domain = prove_rotary(original)
    assert domain.calls
    assert not any(partial for _, partial, _ in domain.calls)
    angle = torch.rand(2, 5, 4)
    x = torch.randn(2, 3, 5, 16)
    torch.testing.assert_close(
        guarded(original, domain)(x, angle.cos(), angle.sin()),
        original(x, angle.cos(), angle.sin()),
    )


def test_a_rotary_call_without_keys():
    model = tiny_model("qwen4_exp")
    row = next(row for row in apply(model).rows if row.name == "apply_rotary_pos_emb()")
    rotate = type(model.model.layers[0]).__init__.__globals__["apply_rotary_pos_emb"]
    angle = torch.rand(1, 5, 8).repeat(1, 1, 2)
    q = torch.randn(2, 5, 3, 16)
    got = rotate(q, cos=angle.cos(), sin=angle.sin(), unsqueeze_dim=2)
    expected = rotate.__wrapped__(q, cos=angle.cos(), sin=angle.sin(), unsqueeze_dim=2)
    assert row.op == "rope"
    torch.testing.assert_close(got, expected)


# layer norms


@pytest.mark.parametrize(
    ("model_type", "name", "how"),
    [
        ("gpt2", "LayerNorm", "layer_norm()"),
        ("cohere", "CohereLayerNorm", "layer_norm()"),
        ("modernbert-decoder", "LayerNorm", "layer_norm()"),
        ("olmo", "OlmoLayerNorm", "layer_norm(no weight, eps=1e-05)"),
        ("nemotron", "NemotronLayerNorm1P", "layer_norm(weight + 1.0)"),
    ],
)
def test_layer_norms_in_their_forms(model_type, name, how):
    assert outcomes(tiny_model(model_type))[name] == [how]


class OfTwoDimensions(nn.LayerNorm):
    def __init__(self):
        super().__init__((4, 32), elementwise_affine=False)


class NotCentred(nn.LayerNorm):
    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps) + self.bias


class OtherVariance(nn.LayerNorm):
    """Of the sample, as torch.var has it by default."""

    def forward(self, x):
        x32 = x.float()
        variance = x32.var(-1, keepdim=True)
        normalised = (x32 - x32.mean(-1, keepdim=True)) * torch.rsqrt(variance + self.eps)
        return (normalised * self.weight + self.bias).to(x.dtype)


class ScaledAfterwards(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) * 1.001


@pytest.mark.parametrize(
    "norm",
    [OfTwoDimensions(), NotCentred(32), OtherVariance(32), ScaledAfterwards(32), nn.BatchNorm1d(4)],
    ids=lambda norm: type(norm).__name__,
)
def test_what_looks_like_a_layer_norm(norm):
    for p in norm.parameters():
        nn.init.normal_(p)
    with pytest.raises(Rejected):
        prove(NORM, norm)


def test_a_layer_norm_with_weights_for_each_head():
    """Chameleon's: the statistics are of the last dimension, the weights of the last two."""
    reasons = outcomes(tiny_model("chameleon", "image-text-to-text"))["ChameleonLayerNorm"]
    assert reasons == ["has parameters that are not one-dimensional"]


def test_layer_norms_under_autocast(calls):
    """torch's on the CPU keeps bfloat16, on a GPU it does not; Nemotron's makes it of float32."""
    nemotron = modeling_nemotron.NemotronLayerNorm1P(32)
    for norm, dtype, is_ours in (
        (nn.LayerNorm(32), torch.float32, True),
        (nn.LayerNorm(32), torch.bfloat16, False),
        (nemotron, torch.float32, False),
    ):
        forward = prove(NORM, norm).candidate.run
        x = torch.randn(2, 32, dtype=dtype)
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16):
            got, expected = forward(norm, x), norm(x)
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected)
        assert ("layer_norm" in calls) == is_ours


# the guard of rope


@pytest.fixture
def rotate():
    original = modeling_llama.apply_rotary_pos_emb
    original = getattr(original, "__wrapped__", original)
    return original, guarded(original, prove_rotary(original))


def test_rope_serves_the_calls_that_were_proved(rotate, calls):
    original, ours = rotate
    angle = torch.rand(1, 5, 8).repeat(1, 1, 2)
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)
    cos, sin = angle.cos(), angle.sin()
    torch.testing.assert_close(ours(q, k, cos, sin), original(q, k, cos, sin))
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    served = ours(q, k, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(served, original(q, k, cos, sin, unsqueeze_dim=2))
    q, k = q.bfloat16(), k.bfloat16()
    served = ours(q, k, cos, sin, unsqueeze_dim=2)
    # cos and sin in float32 promote the result, as under autocast.
    assert served[0].dtype == torch.float32
    torch.testing.assert_close(served, original(q, k, cos, sin, unsqueeze_dim=2))
    assert len(calls) == 3


def test_rope_leaves_the_other_calls_to_the_original(rotate, monkeypatch):
    original, ours = rotate
    monkeypatch.delattr(functional, "rope")
    angle = torch.rand(1, 5, 8).repeat(1, 1, 2)
    q, k, cos, sin = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16), angle.cos(), angle.sin()
    others = {
        "an argument by position": ((q, k, cos, sin, 1), {}),
        "other heads": ((q.squeeze(0)[0], k[0], cos[0, None], sin[0, None]), {}),
        "mixed dtypes": ((q, k.double(), cos, sin), {}),
        "learned angles": ((q, k, cos.requires_grad_(), sin), {}),
        "one table for each head": ((q, q, cos[:, None], sin[:, None]), {"unsqueeze_dim": 0}),
    }
    for name, (args, kwargs) in others.items():
        try:
            expected = original(*args, **kwargs)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                ours(*args, **kwargs)
            continue
        for got, want in zip(ours(*args, **kwargs), expected, strict=True):
            assert torch.equal(got, want), name


def test_llama_s_rotary_function_is_proved_for_whole_heads_only():
    original = modeling_llama.apply_rotary_pos_emb
    domain = prove_rotary(getattr(original, "__wrapped__", original))
    assert set(domain.calls) == {(axis, False, mixed) for axis in (1, 2) for mixed in (False, True)}


# made for this


class Norm(LlamaRMSNorm):
    def __init__(self, change=lambda y: y, eps=1e-6):
        super().__init__(32, eps)
        self.change = change

    def forward(self, hidden_states):
        return self.change(super().forward(hidden_states))


class MLP(LlamaMLP):
    def __init__(self, before=lambda x: x, after=lambda x: x):
        super().__init__(tiny_config("llama"))
        self.before, self.after = before, after

    def forward(self, x):
        return self.after(super().forward(self.before(x)))


class WrongEps(LlamaRMSNorm):
    def forward(self, hidden_states):
        size = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(size + 3 * self.variance_epsilon))


class Multiplied(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 1.001)


class InFloat32(LlamaMLP):
    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj((self.act_fn(gate.float()) * up.float()).to(gate.dtype))


def test_a_product_in_float32():
    """Beam computes SwiGLU in float32, as the op does: the same bits in bfloat16."""
    proof = prove(GATED_MLP, InFloat32(tiny_config("llama")))
    assert (proof.candidate.op, proof.error16) == ("swiglu", 0)
    assert prove(GATED_MLP, LlamaMLP(tiny_config("llama"))).error16 > 0


def test_what_is_unchanged_is_proved():
    assert prove(NORM, Norm()).candidate.op == "rms_norm"
    assert prove(GATED_MLP, MLP()).candidate.op == "swiglu"


@pytest.mark.parametrize(
    ("place", "module"),
    [
        (NORM, WrongEps(32)),
        (NORM, Norm(lambda y: y.clamp(-3, 3))),
        (NORM, Norm(lambda y: y.float())),
        (NORM, Norm(F.dropout)),
        (GATED_MLP, MLP(lambda x: x.clamp(-100, 100))),
        (GATED_MLP, MLP(after=lambda y: F.dropout(y, 0.01))),
        (GATED_MLP, MLP(after=lambda y: y.float())),
        (GATED_MLP, Multiplied(tiny_config("llama"))),
        (GATED_MLP, LlamaMLP(tiny_config("llama", hidden_act="relu"))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_changed_is_not(place, module):
    with pytest.raises(Rejected):
        prove(place, module)


def test_a_trial_leaves_no_trace():
    module, state = MLP().eval(), torch.get_rng_state()
    before = {name: p.clone() for name, p in module.named_parameters()}
    prove(GATED_MLP, module)
    with pytest.raises(Rejected):
        prove(NORM, Norm(F.dropout))
    assert torch.is_grad_enabled()
    assert torch.empty(1).device.type == "cpu"
    assert torch.equal(torch.get_rng_state(), state)
    assert not module.training
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_a_trial_runs_no_hooks():
    module = MLP()
    module.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    prove(GATED_MLP, module)


def test_all_gated_mlps_in_their_forms():
    for act, op in (("silu", "swiglu"), ("gelu_pytorch_tanh", "geglu"), ("gelu", "geglu")):
        assert prove(GATED_MLP, LlamaMLP(tiny_config("llama", hidden_act=act))).candidate.op == op
    found = outcomes(tiny_model("phi3"))
    assert found["Phi3MLP"] == ["swiglu(packed)"]
    assert outcomes(tiny_model("gemma"))["GemmaMLP"] == ["geglu(approximate=tanh)"]


def test_an_op_is_added_by_one_row(monkeypatch):
    def centred_norm(x, weight=None, bias=None, *, eps):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    model = tiny_model("gpt2")
    monkeypatch.setattr(functional, "centred_norm", centred_norm, raising=False)
    row = Family("centred_norm", NORM, ({},), parameters=("weight", "bias"))
    monkeypatch.setattr("liger_fn.hf.install.FAMILIES", [*FAMILIES, row])
    assert apply(model, ops=["centred_norm"]).replaced() == {"centred_norm": 5}
    x = torch.randn(2, 64)
    norm = model.transformer.ln_f
    assert isinstance(norm, nn.LayerNorm)
    assert torch.equal(norm(x), nn.LayerNorm.forward(norm, x))
