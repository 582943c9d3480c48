"""What looks like one of our ops and is not: each of these was, or could be, taken for it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v4 import modeling_deepseek_v4
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.llama4 import modeling_llama4
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron import modeling_nemotron

from liger_fn import functional
from liger_fn.functional import using
from liger_fn.hf import apply
from liger_fn.hf.families import (
    ACTIVATION,
    EXPERTS,
    FAMILIES,
    GATED_MLP,
    GATED_NORM,
    NORM,
    Family,
)
from liger_fn.hf.probe import Rejected
from liger_fn.hf.rotary import guarded, prove_rotary
from liger_fn.testing.tiny_models import model_types, tiny_config, tiny_model

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
    gates = [ours for (ours, *_) in found.values() if "limit=" in ours]
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


# experts


def experts_of(model):
    """The first experts of a model."""
    return next(m for m in model.modules() if EXPERTS.suggests(m))


def routed(experts, dtype=torch.float32):
    """Tokens, two experts for each, and their weights."""
    width = experts.down_proj.shape[2 if experts.is_transposed else 1]
    routes = torch.rand(7, experts.num_experts).topk(2)
    return torch.randn(7, width, dtype=dtype), routes.indices, routes.values


@pytest.mark.parametrize(
    ("model_type", "task", "how"),
    [
        ("mixtral", "causal-lm", ""),
        ("qwen3_moe", "causal-lm", ""),
        ("deepseek_v4", "causal-lm", "limit=limit"),
        ("hy_v4", "causal-lm", "limit=swiglu_limit"),
        (
            "gpt_oss", "causal-lm",
            "up_offset=1.0, interleaved=True, limit=limit, alpha=alpha, transposed",
        ),
        (
            "minimax_m3_vl", "image-text-to-text",
            "up_offset=1.0, limit=swiglu_limit, alpha=swiglu_alpha",
        ),
    ],
)  # fmt: skip
def test_experts_in_their_forms(model_type, task, how):
    if model_type not in model_types(task):
        pytest.skip(f"this version of transformers has no {model_type}")
    found = outcomes(tiny_model(model_type, task))
    ours = {op for name, ops in found.items() for op in ops if "Experts" in name}
    kept = {op for op in ours if not op.startswith("fused_moe")}
    assert kept <= {"swiglu()"}
    options = {
        frozenset(filter(None, op.removeprefix("fused_moe(").rstrip(")").split(", ")))
        for op in ours - kept
    }
    assert options == {frozenset(filter(None, how.split(", ")))}


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh", "gelu"])
def test_the_activation_of_experts(act):
    proof = prove(EXPERTS, experts_of(tiny_model("mixtral", hidden_act=act)))
    options = "" if act == "silu" else f"activation={act}"
    assert proof.candidate.how == f"fused_moe({options})"


class ExpertsWithDropout(MixtralExperts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return F.dropout(super().forward(hidden_states, top_k_index, top_k_weights), 0.01)


class ExpertsOfFloat32(MixtralExperts):
    """They return the dtype of the router's weights."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        y = super().forward(hidden_states, top_k_index, top_k_weights)
        return y.to(top_k_weights.dtype)


class ExpertsThatClamp(MixtralExperts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return super().forward(hidden_states.clamp(-100, 100), top_k_index, top_k_weights)


class ExpertsWithoutWeights(MixtralExperts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return super().forward(hidden_states, top_k_index, torch.ones_like(top_k_weights))


class ExpertsThatAreShared(MixtralExperts):
    """Expert 0 takes every token, too."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        y = super().forward(hidden_states, top_k_index, top_k_weights)
        return y + 0.01 * F.linear(hidden_states, self.down_proj[0] @ self.gate_up_proj[0, ::2])


@pytest.mark.parametrize(
    "cls",
    [
        ExpertsWithDropout,
        ExpertsOfFloat32,
        ExpertsThatClamp,
        ExpertsWithoutWeights,
        ExpertsThatAreShared,
    ],
)
def test_what_looks_like_experts(cls):
    experts = experts_of(tiny_model("mixtral"))
    # What the subclasses call dispatches by the configuration: to the loop, here.
    experts.config._experts_implementation = "eager"
    assert prove(EXPERTS, experts).candidate.op == "fused_moe"
    experts.__class__ = cls
    with pytest.raises(Rejected):
        prove(EXPERTS, experts)


@pytest.mark.parametrize(
    ("model_type", "task", "reason"),
    [
        ("nemotron_h", "causal-lm", "has not both gate_up_proj and down_proj"),
        ("llama4", "causal-lm", "takes other inputs than tokens"),
        ("longcat_flash", "causal-lm", "does not say how many experts"),
        ("muse_spark", "image-text-to-text", "has parameters that fused_moe does not take"),
        ("inkling2_text", "causal-lm", "is not fused_moe: the results differ"),
    ],
)
def test_experts_that_are_left_alone_and_said_so(model_type, task, reason):
    if model_type not in model_types(task):
        pytest.skip(f"this version of transformers has no {model_type}")
    found = outcomes(tiny_model(model_type, task))
    assert any(reason in ours for name, ops in found.items() if "Experts" in name for ours in ops)


def test_experts_without_the_op_get_its_gate():
    model = tiny_model("mixtral")
    assert apply(model, ops=["swiglu"]).replaced() == {"swiglu": 2}
    experts = experts_of(model)
    assert set(experts.__dict__) & {"forward", "_apply_gate"} == {"_apply_gate"}


def test_an_implementation_of_experts_that_somebody_chose(calls):
    """A kernel of another library stays, whether it was chosen before or after."""
    seen = []

    def theirs(self, hidden_states, top_k_index, top_k_weights):
        seen.append(self)
        return torch.zeros_like(hidden_states)

    ALL_EXPERTS_FUNCTIONS.register("theirs", theirs)
    try:
        model = tiny_model("mixtral")
        model.set_experts_implementation("theirs")
        assert outcomes(model)["MixtralExperts"] == ["runs the implementation 'theirs'"]
        model = tiny_model("mixtral")
        apply(model)
        experts = experts_of(model)
        calls.clear()
        experts(*routed(experts))
        assert calls.count("fused_moe") == 1
        model.set_experts_implementation("theirs")
        assert not experts(*routed(experts)).any()
        assert (calls.count("fused_moe"), len(seen)) == (1, 1)
    finally:
        del ALL_EXPERTS_FUNCTIONS._global_mapping["theirs"]


def test_experts_leave_what_was_not_proved_to_the_original(calls):
    experts = experts_of(tiny_model("mixtral"))
    forward = prove(EXPERTS, experts).candidate.run
    x, indices, weights = routed(experts)
    by_name = {"top_k_index": indices, "top_k_weights": weights}
    calls.clear()
    expected = type(experts).forward(experts, x, indices, weights)
    assert torch.equal(forward(experts, x, **by_name), expected)
    with using("auto"):
        # There the reference would run each token through every expert.
        assert torch.equal(forward(experts, x, indices, weights), expected)
    other = forward(experts, x.bfloat16(), indices, weights)
    assert torch.equal(other, type(experts).forward(experts, x.bfloat16(), indices, weights))
    assert not calls
    torch.testing.assert_close(forward(experts, x, indices, weights), expected)
    assert calls == ["fused_moe"]


def test_experts_under_autocast_return_the_dtype_of_the_tokens(calls):
    experts = experts_of(tiny_model("mixtral"))
    experts.config._experts_implementation = "eager"
    forward = prove(EXPERTS, experts).candidate.run
    calls.clear()
    for dtype in (torch.float32, torch.bfloat16):
        arguments = routed(experts, dtype)
        with torch.autocast("cpu", torch.bfloat16):
            got, expected = forward(experts, *arguments), experts(*arguments)
        assert got.dtype == expected.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    assert calls == ["fused_moe"] * 2


def test_experts_of_other_processes_add_nothing():
    """Expert parallelism marks them by an index past the last."""
    experts = experts_of(tiny_model("mixtral"))
    forward = prove(EXPERTS, experts).candidate.run
    x, indices, weights = routed(experts)
    weights[:, 1] = 0.0
    expected = type(experts).forward(experts, x, indices, weights)
    indices[:, 1] = experts.num_experts
    torch.testing.assert_close(forward(experts, x, indices, weights), expected)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_last_layer_that_is_kept_in_float32(dtype):
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval().to(dtype)
    for block in (*model.encoder.block, *model.decoder.block):
        block.layer[-1].DenseReluDense.wo.float()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=ids).logits
        assert apply(model).replaced()["geglu"] > 0
        found = model(input_ids=ids, decoder_input_ids=ids).logits
    # The op rounds once where T5 rounds at each step.
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


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
