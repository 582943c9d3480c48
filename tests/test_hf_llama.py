"""The adapter on a small Llama: what is replaced, that nothing else changes, that all is undone."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle

import pytest
import torch
from torch import nn
from torch._guards import CompileContext, compile_context
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from transformers.models.llama import modeling_llama

import liger_fn.hf
from liger_fn import functional
from liger_fn.functional import using
from liger_fn.hf import (
    AutoLigerKernelForCausalLM,
    AutoLigerKernelForImageTextToText,
    apply,
    apply_to_llama,
    patched,
    undo,
)
from liger_fn.hf.deferred import Deferred
from liger_fn.hf.install import installed
from liger_fn.testing.tiny_models import (
    assert_same,
    loss_and_gradients,
    tiny_config,
    tiny_inputs,
    tiny_model,
)

ALL = {"rms_norm": 5, "swiglu": 2, "rope": 1, "causal_mask": 1, "fused_linear_cross_entropy": 1}


pytestmark = pytest.mark.usefixtures("reference_path")


@pytest.fixture
def no_other_users():
    """Collect the models of earlier tests: while they live, Llama's rotary function is replaced."""
    gc.collect()


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of the ops of the two losses."""
    counts = {"fused_linear_cross_entropy": 0, "cross_entropy": 0}

    def counted(name, op):
        def call(*args, **kwargs):
            counts[name] += 1
            return op(*args, **kwargs)

        return call

    for name in counts:
        monkeypatch.setattr(functional, name, counted(name, getattr(functional, name)))
    return counts


def everything(model):
    """What undoing must bring back: classes, instance attributes, the module's function."""
    return (
        [(type(m), sorted(m.__dict__)) for m in model.modules()],
        modeling_llama.apply_rotary_pos_emb,
        dict(modeling_llama.LlamaPreTrainedModel.__dict__),
    )


# apply and undo


def test_apply_replaces_everything_and_changes_no_number(model, inputs):
    expected = loss_and_gradients(model, inputs)
    report = apply(model)
    assert report.replaced() == ALL
    assert_same(loss_and_gradients(model, inputs), expected)


def test_undo_restores_every_attribute(no_other_users, model):
    before = everything(model)
    report = apply(model)
    assert everything(model) != before
    report.undo()
    report.undo()
    assert everything(model) == before
    assert not installed(model)


def test_apply_twice_changes_nothing(model):
    first = apply(model)
    once = everything(model)
    second = apply(model)
    assert everything(model) == once
    assert second.replaced() == ALL
    second.undo()
    assert everything(model) == once
    first.undo()
    assert not installed(model)


def test_patched_is_apply_for_a_while(no_other_users, model):
    before = everything(model)
    with patched(model, ops=["rms_norm"]) as report:
        assert report.replaced() == {"rms_norm": 5}
    assert everything(model) == before


def test_the_report_is_a_table(model):
    text = str(apply(model, verify="full"))
    lines = text.splitlines()
    assert lines[1].split()[:2] == ["module", "count"]
    assert any(
        "LlamaRMSNorm" in line and "rms_norm(cast_before_weight=True)" in line for line in lines
    )
    before, after = lines[-1].removeprefix("loss before: ").split("; after: ")
    assert float(before) == pytest.approx(float(after), abs=2e-6)


def test_full_verification_leaves_modes_and_random_state_alone(model):
    model.model.eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    apply(model, verify="full")
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_a_module_that_is_not_equal_keeps_its_forward(model, inputs):
    class Doubled(modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    model.model.norm.__class__ = Doubled
    report = apply(model, ops=["rms_norm"])
    assert report.replaced() == {"rms_norm": 4}
    row = next(row for row in report.rows if row.name == "Doubled")
    assert "differ" in row.reason
    assert "forward" not in model.model.norm.__dict__


def test_rope_stays_until_its_last_user_goes(no_other_users, model):
    original = modeling_llama.apply_rotary_pos_emb
    first, second = apply(model), apply(other := tiny_model("llama"), ops=["rope"])
    first.undo()
    assert modeling_llama.apply_rotary_pos_emb is not original
    second.undo()
    assert modeling_llama.apply_rotary_pos_emb is original
    apply(other, ops=["rope"])
    del other, second
    gc.collect()
    assert modeling_llama.apply_rotary_pos_emb is original


def test_rope_stays_while_another_model_is_compiled(no_other_users):
    """A collection may come at any time, and Dynamo does not expect functions to change."""
    original = modeling_llama.apply_rotary_pos_emb
    model = tiny_model("llama")
    apply(model, ops=["rope"])
    replaced = modeling_llama.apply_rotary_pos_emb
    with compile_context(CompileContext(None)):
        del model
        gc.collect()
        assert modeling_llama.apply_rotary_pos_emb is replaced
    apply(tiny_model("llama"), ops=["rope"]).undo()
    assert modeling_llama.apply_rotary_pos_emb is original


def test_an_empty_model_is_recognised():
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_config("llama"))
    assert apply(model).replaced() == ALL


# apply_to_llama and the Auto classes


def test_apply_to_llama_has_the_usual_signature():
    usual = ["rope", "swiglu", "cross_entropy", "fused_linear_cross_entropy", "rms_norm"]
    parameters = inspect.signature(apply_to_llama).parameters
    assert list(parameters) == [*usual, "causal_mask", "model"]
    assert [p.default for p in parameters.values()] == [True, True, False, True, True, True, None]
    assert "apply_to_llama" in dir(liger_fn.hf)
    assert "geglu" in inspect.signature(liger_fn.hf.apply_to_gemma2).parameters


def test_a_name_that_is_no_model_type():
    with pytest.raises(AttributeError, match="apply_to_camel"):
        _ = liger_fn.hf.apply_to_camel


def test_on_the_class_every_new_model_is_patched_until_undo(no_other_users):
    old = tiny_model("llama")
    before = everything(old)
    handle = apply_to_llama()
    assert "LlamaPreTrainedModel" in str(handle)
    model = LlamaForCausalLM(tiny_config("llama"))
    assert apply(model).replaced() == ALL
    assert not [p for p in installed(old) if hasattr(p, "module")]
    classifier = LlamaForSequenceClassification(tiny_config("llama", pad_token_id=0))
    assert apply(classifier).replaced() == {
        n: ALL[n] for n in ALL if n != "fused_linear_cross_entropy"
    }
    handle.undo()
    assert everything(old) == before
    assert not installed(model)
    assert not installed(classifier)
    assert type(LlamaForCausalLM(tiny_config("llama"))) is LlamaForCausalLM


def test_on_the_class_the_last_choice_of_ops_counts():
    first = apply_to_llama()
    assert apply_to_llama()[0] is first[0]
    second = apply_to_llama(rope=False, swiglu=False)
    model = LlamaForCausalLM(tiny_config("llama"))
    assert {type(p).__name__ for p in installed(model)} == {"MethodPatch", "LossPatch"}
    assert len(installed(model)) == 7
    second.undo()
    assert not installed(model)
    assert "post_init" not in modeling_llama.LlamaPreTrainedModel.__dict__


def test_on_the_class_models_that_are_loaded_are_patched_too(tmp_path, inputs, calls):
    saved = tiny_model("llama", dtype=torch.bfloat16)
    saved.save_pretrained(tmp_path)
    handle = apply_to_llama()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto").train()
    assert loaded.dtype == torch.bfloat16
    assert apply(loaded).replaced() == ALL
    expected = saved.train()(**inputs).loss
    torch.testing.assert_close(loaded(**inputs).loss, expected, rtol=1e-2, atol=0)
    assert calls["fused_linear_cross_entropy"] == 1
    handle.undo()


def test_on_an_instance(model, inputs):
    expected = loss_and_gradients(model, inputs)
    report = apply_to_llama(rope=False, model=model)
    assert report.replaced() == {k: v for k, v in ALL.items() if k != "rope"}
    assert_same(loss_and_gradients(model, inputs), expected)


def test_cross_entropy_with_real_logits(model, inputs, calls):
    expected = loss_and_gradients(model, inputs)
    apply_to_llama(cross_entropy=True, fused_linear_cross_entropy=False, model=model)
    assert_same(loss_and_gradients(model, inputs), expected)
    assert calls == {"fused_linear_cross_entropy": 0, "cross_entropy": 1}
    assert type(model(**inputs).logits) is torch.Tensor
    model.eval()
    assert type(model(**inputs).logits) is torch.Tensor
    assert calls["cross_entropy"] == 3


def test_both_losses_are_refused(model):
    with pytest.raises(ValueError, match="`cross_entropy` must be False"):
        apply_to_llama(cross_entropy=True)
    with pytest.raises(ValueError, match="got both"):
        apply(model, ops=["cross_entropy", "fused_linear_cross_entropy"])
    apply(model)
    with pytest.raises(ValueError, match="undo the first report"):
        apply(model, ops=["cross_entropy"])


def test_auto_class_patches_the_one_model(tmp_path, inputs):
    tiny_model("llama").save_pretrained(tmp_path)
    model = AutoLigerKernelForCausalLM.from_pretrained(
        tmp_path, swiglu=False, dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert apply(model, ops=["rms_norm", "rope"]).replaced() == {"rms_norm": 5, "rope": 1}
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert not any("swiglu" in str(p) for p in installed(model))
    again = AutoLigerKernelForCausalLM.from_config(model.config)
    assert apply(again).replaced() == {n: ALL[n] for n in ALL if n != "causal_mask"}
    assert type(tiny_model("llama")) is LlamaForCausalLM


def test_auto_class_for_images():
    model = AutoLigerKernelForImageTextToText.from_config(tiny_config("qwen2_5_vl"))
    assert apply(model).replaced()["fused_linear_cross_entropy"] == 1


# the loss


def test_training_makes_no_logits_until_they_are_asked_for(model, inputs, calls):
    real = model(**inputs)
    apply(model)
    lazy = model(**inputs)
    assert calls == {"fused_linear_cross_entropy": 1, "cross_entropy": 0}
    assert type(lazy.logits) is Deferred
    assert lazy.logits.shape == real.logits.shape
    torch.testing.assert_close(lazy.logits.argmax(-1), real.logits.argmax(-1))
    torch.testing.assert_close(torch.softmax(lazy.logits, -1), torch.softmax(real.logits, -1))


def test_evaluation_makes_logits_unless_told_not_to(model, inputs, calls):
    model.eval()
    expected = model(**inputs)
    apply(model)
    assert_equal = torch.testing.assert_close
    assert_equal(model(**inputs).logits, expected.logits)
    assert calls["fused_linear_cross_entropy"] == 0
    skipped = model(**inputs, skip_logits=True)
    assert skipped.logits is None
    assert "logits" not in skipped
    assert_equal(skipped.loss, expected.loss)
    assert calls["fused_linear_cross_entropy"] == 1
    short = model(**inputs, skip_logits=True, return_dict=False)
    assert_equal(short[0], expected.loss)
    assert not any(isinstance(part, Deferred) for part in short)


def test_skip_logits_false_makes_them_in_training(model, inputs, calls):
    apply(model)
    assert type(model(**inputs, skip_logits=False).logits) is torch.Tensor
    assert calls["fused_linear_cross_entropy"] == 0


def test_skip_logits_needs_labels(model, inputs):
    apply(model)
    with pytest.raises(ValueError, match="`skip_logits` must come with `labels`"):
        model(input_ids=inputs["input_ids"], skip_logits=True)


@pytest.mark.parametrize(
    "extra",
    [
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(11)},
        {
            "shift_labels": torch.randint(
                0, 128, (2, 16), generator=torch.Generator().manual_seed(1)
            )
        },
        {"logits_to_keep": 0},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_the_model_s_own_loss_code_runs(model, inputs, calls, extra):
    expected = loss_and_gradients(model, {**inputs, **extra})
    apply(model)
    assert_same(loss_and_gradients(model, {**inputs, **extra}), expected)
    assert calls["fused_linear_cross_entropy"] == 1


def test_a_mean_over_more_than_the_batch_leaves_nothing_to_the_backward_pass(model, inputs):
    """What divides the sum is in the gradients that the forward pass makes."""
    apply(model)
    loss = model(**inputs, num_items_in_batch=torch.tensor(11)).loss
    assert "Div" not in type(loss.grad_fn).__name__


@pytest.mark.parametrize("return_dict", [True, False])
def test_a_loss_that_is_a_sum(model, inputs, calls, return_dict):
    def summed(logits, labels, vocab_size, **_):
        return nn.functional.cross_entropy(
            logits.float().view(-1, vocab_size), labels.view(-1), reduction="sum"
        )

    model.loss_function = summed
    inputs["return_dict"] = return_dict
    expected = loss_and_gradients(model, inputs)
    apply(model)
    assert type(model(**inputs)[0]) is torch.Tensor
    # Gradients of a sum over so many tokens, and their roundings, are as many times a mean's.
    tokens = inputs["labels"].numel()
    assert_same(loss_and_gradients(model, inputs), expected, atol=tokens * 1e-6)
    assert type(model(**inputs)[1]) is Deferred
    assert calls["fused_linear_cross_entropy"] == 3


def test_another_ignore_index(model, inputs, calls):
    inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] < 0, 5)
    expected = loss_and_gradients(model, {**inputs, "ignore_index": 5})
    apply(model)
    assert_same(loss_and_gradients(model, {**inputs, "ignore_index": 5}), expected)
    assert calls["fused_linear_cross_entropy"] == 1


def test_logits_to_keep_with_labels(model, inputs, calls):
    last = {**inputs, "logits_to_keep": 4, "labels": inputs["labels"][:, -4:]}
    expected = loss_and_gradients(model, last)
    apply(model)
    assert_same(loss_and_gradients(model, last), expected)
    assert model(**last).logits.shape == (2, 4, 128)
    assert calls["fused_linear_cross_entropy"] == 2


def test_positional_labels_are_seen(model, inputs, calls):
    position = list(inspect.signature(LlamaForCausalLM.forward).parameters).index("labels") - 1
    arguments = [inputs["input_ids"], *[None] * (position - 1), inputs["labels"]]
    expected = model(*arguments).loss
    apply(model)
    torch.testing.assert_close(model(*arguments).loss, expected)
    assert calls["fused_linear_cross_entropy"] == 1


def test_an_error_in_the_forward_leaves_no_trace(model, inputs):
    apply(model)
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 4), 1000), labels=torch.ones(1, 4, dtype=torch.long))
    assert type(model.lm_head(torch.zeros(1, 64))) is torch.Tensor


def test_generation_is_untouched(model, inputs):
    model.eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(inputs["input_ids"][:, :5], **options)
    apply(model)
    assert torch.equal(model.generate(inputs["input_ids"][:, :5], **options), expected)
    assert type(model(input_ids=inputs["input_ids"]).logits) is torch.Tensor


def test_a_frozen_head_gets_no_gradient(model, inputs):
    model.lm_head.requires_grad_(False)
    expected = loss_and_gradients(model, inputs)
    apply(model)
    got = loss_and_gradients(model, inputs)
    assert model.lm_head.weight.grad is None
    assert_same(got, expected)


# the rest of the world


def test_state_dict_and_files_are_unchanged(model, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    apply(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert all(torch.equal(v, before[n]) for n, v in loaded.state_dict().items())


def test_a_deepcopy_stays_patched_and_is_its_own(model, inputs, calls):
    report = apply(model)
    expected = loss_and_gradients(model, inputs)
    twin = copy.deepcopy(model)
    report.undo()
    assert not installed(model)
    assert_same(loss_and_gradients(twin, inputs), expected)
    assert calls["fused_linear_cross_entropy"] == 2
    undo(twin)
    assert type(twin) is LlamaForCausalLM
    assert_same(loss_and_gradients(twin, inputs), expected)


@pytest.mark.parametrize("through", ["pickle", "torch.save"])
def test_a_pickle_holds_the_original_model(model, inputs, through):
    if any("_kernel_funcs" in module.__dict__ for module in model.modules()):
        pytest.skip("the kernels library puts objects on models that cannot be pickled")
    expected = loss_and_gradients(model, inputs)
    apply(model)
    if through == "pickle":
        data = pickle.dumps(model)
        assert b"liger" not in data
        loaded = pickle.loads(data)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    assert type(loaded) is LlamaForCausalLM
    assert type(loaded.lm_head) is nn.Linear
    assert_same(loss_and_gradients(loaded, inputs), expected)
    assert apply(loaded).replaced() == ALL


def test_tied_embeddings(inputs):
    model = tiny_model("llama", tie_word_embeddings=True).train()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = loss_and_gradients(model, inputs)
    apply(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same(loss_and_gradients(model, inputs), expected)


def test_resized_embeddings(model, inputs, calls):
    report = apply(model)
    model.resize_token_embeddings(140)
    got = loss_and_gradients(model, inputs)
    assert calls["fused_linear_cross_entropy"] == 1
    report.undo()
    assert type(model.lm_head) is nn.Linear
    assert_same(got, loss_and_gradients(model, inputs))


def test_a_bias_in_the_head(model, inputs):
    model.lm_head.bias = nn.Parameter(torch.randn(128))
    expected = loss_and_gradients(model, inputs)
    apply(model)
    assert_same(loss_and_gradients(model, inputs), expected)


def test_a_norm_with_wider_weights_still_promotes(model):
    norm = model.model.norm
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    expected = norm(x)
    apply(model)
    assert expected.dtype == norm(x).dtype == torch.float32
    assert torch.equal(norm(x), expected)


def test_epsilon_is_read_at_the_call(model):
    apply(model)
    norm, x = model.model.norm, torch.randn(1, 64)
    norm.variance_epsilon = 0.5
    torch.testing.assert_close(norm(x), type(norm).forward(norm, x))


# arguments


def test_bad_arguments(model):
    with pytest.raises(TypeError, match="`model` must be a PreTrainedModel; got Linear"):
        apply(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"`ops` must be among .*; got 'layernorm'"):
        apply(model, ops=["layernorm"])
    with pytest.raises(ValueError, match="`verify` must be True or 'full'; got False"):
        apply(model, verify=False)
    for ops in (3, {"rope": False}):
        with pytest.raises(TypeError, match="`ops` must be a collection of names; got"):
            apply(model, ops=ops)
    assert not installed(model)


@pytest.mark.parametrize("name", ["model", "module", "_orig_mod"])
def test_what_has_a_model_is_not_one(model, name):
    class Wrapper(nn.Module):
        pass

    wrapper = Wrapper()
    setattr(wrapper, name, model)
    with pytest.raises(TypeError, match=rf"got Wrapper \(pass its `.{name}`\)"):
        apply(wrapper)


def test_bad_flags(model):
    known = "rope, swiglu, cross_entropy, fused_linear_cross_entropy, rms_norm, causal_mask, model"
    with pytest.raises(TypeError, match=f"a flag must be one of {known}; got 'geglu'"):
        apply_to_llama(geglu=True, model=model)
    with pytest.raises(TypeError, match="`rope` must be True or False; got LlamaForCausalLM"):
        apply_to_llama(model)
    assert not installed(model)
    assert "post_init" not in modeling_llama.LlamaPreTrainedModel.__dict__


def test_autocast_and_the_default_dtype_do_not_hide_anything(model):
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert apply(model).replaced() == ALL


def test_a_head_that_another_library_has_changed_is_left_alone(model, inputs):
    model.lm_head.forward = lambda x: nn.functional.linear(x, model.lm_head.weight)
    report = apply(model)
    assert "fused_linear_cross_entropy" not in report.replaced()
    assert any("forward of another library" in row.reason for row in report.rows)
    assert type(model(**inputs).logits) is torch.Tensor


def test_a_head_that_is_wrapped_later_gets_real_logits(model, inputs, calls):
    """As transformers' tensor parallelism does: it works on the head's output."""
    apply(model)
    expected = model(**inputs).loss
    forward = model.lm_head.forward
    model.lm_head.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)
    doubled = model(**inputs)
    assert calls["fused_linear_cross_entropy"] == 1
    assert type(doubled.logits) is torch.Tensor
    assert (doubled.loss - expected).abs() > 1e-3


def test_a_hook_that_changes_the_logits(model, inputs, calls):
    model.lm_head.register_forward_hook(lambda module, arguments, logits: 2 * logits)
    expected = loss_and_gradients(model, inputs)
    apply(model)
    assert_same(loss_and_gradients(model, inputs), expected)
    assert type(model(**inputs).logits) is torch.Tensor
    assert calls["fused_linear_cross_entropy"] == 0


def test_a_head_that_is_empty_in_its_own_forward(model, inputs):
    apply(model)
    model.lm_head.weight.data = torch.empty(0)
    with pytest.raises(
        RuntimeError, match=r"must be whole in the head's forward; got shape \(0,\)"
    ):
        model(**inputs)


# with the kernels themselves


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "cohere", "gpt_neox", "qwen3_moe"])
def test_with_kernels(model_type, device):
    """On a GPU, or interpreted: float32, where kernel and original differ by rounding alone."""
    model = tiny_model(model_type).to(device)
    inputs = {name: value.to(device) for name, value in tiny_inputs(model, tokens=8).items()}
    model.train()
    expected = loss_and_gradients(model, inputs)
    with using("kernels"), patched(model, verify="full") as report:
        assert len(report.replaced()) >= 3
        got = loss_and_gradients(model, inputs)
    assert_same(got, expected, rtol=1e-3, atol=1e-5)
