"""Patched models in the hands of PEFT, accelerate, Trainer, TRL, and something like ZeRO-3."""

from __future__ import annotations

import copy
import importlib.util
from types import MethodType

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from liger_fn import functional
from liger_fn.hf import apply, kernel_mapping, patched, undo
from liger_fn.hf.install import installed
from liger_fn.hf.output_head import DeferringHead
from liger_fn.testing.tiny_models import assert_same, loss_and_gradients, tiny_model

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed"
)
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed"
)
needs_trl = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("trl", "datasets"))), reason="trl is not installed"
)


pytestmark = pytest.mark.usefixtures("reference_path")


@pytest.fixture
def fused(monkeypatch):
    """Count the calls of the fused loss."""
    calls = []
    op = functional.fused_linear_cross_entropy

    def call(*args, **kwargs):
        calls.append(kwargs)
        return op(*args, **kwargs)

    monkeypatch.setattr(functional, "fused_linear_cross_entropy", call)
    return calls


# PEFT


def with_lora(model, **options):
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model.train()


LORA = {
    "elsewhere": {"target_modules": ["q_proj", "gate_proj", "down_proj"]},
    "on the head": {"target_modules": ["q_proj", "lm_head"]},
    "head trained": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "dora on the head": {"target_modules": ["lm_head"], "use_dora": True},
    "dropout on the head": {"target_modules": ["lm_head"], "lora_dropout": 0.3},
}
# What cannot be written as one matrix gets real logits.
REAL_LOGITS = ("dora on the head", "dropout on the head")


@needs_peft
@pytest.mark.parametrize("order", ["lora first", "apply first"])
@pytest.mark.parametrize("case", LORA)
def test_lora(model, inputs, fused, case, order):
    plain = copy.deepcopy(model)
    expected = loss_and_gradients(with_lora(plain, **LORA[case]), inputs)
    if order == "apply first":
        report = apply(model)
    tuned = with_lora(model, **LORA[case])
    if order == "lora first":
        report = apply(tuned)
    assert report.replaced() == {
        "rms_norm": 5, "swiglu": 2, "rope": 1, "fused_linear_cross_entropy": 1,
    }  # fmt: skip
    assert_same(loss_and_gradients(tuned, inputs), expected)
    assert len(fused) == (case not in REAL_LOGITS)
    report.undo()
    assert not any(isinstance(module, DeferringHead) for module in tuned.modules())
    assert_same(loss_and_gradients(tuned, inputs), expected)


@needs_peft
def test_a_wrapper_that_names_no_task(model, inputs, fused):
    import peft

    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).train()
    report = apply(tuned)
    assert report.model == "LlamaForCausalLM"
    tuned(**inputs).loss.backward()
    assert len(fused) == 1
    undo(tuned)
    assert not installed(model)


@needs_peft
def test_lora_switched_off_and_merged(model, inputs, fused):
    tuned = with_lora(model, **LORA["on the head"])
    report = apply(tuned)
    with tuned.disable_adapter():
        off = tuned(**inputs).loss
    tuned.merge_adapter()
    merged = tuned(**inputs).loss
    assert len(fused) == 2
    report.undo()
    torch.testing.assert_close(merged, tuned(**inputs).loss)
    tuned.unmerge_adapter()
    with tuned.disable_adapter():
        torch.testing.assert_close(off, tuned(**inputs).loss)


# accelerate


@needs_accelerate
@pytest.mark.parametrize("order", ["hooks first", "apply first"])
def test_offloading_hooks(model, inputs, fused, order):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    expected = loss_and_gradients(model, inputs)
    parts = [model, model.lm_head, model.model.norm, model.model.layers[0].mlp]
    if order == "apply first":
        report = apply(model)
    for part in parts:
        add_hook_to_module(part, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    if order == "hooks first":
        report = apply(model)
    assert sum(report.replaced().values()) == 9
    assert_same(loss_and_gradients(model, inputs), expected)
    assert len(fused) == 1
    report.undo()
    assert_same(loss_and_gradients(model, inputs), expected)
    assert len(fused) == 1
    for part in parts:
        remove_hook_from_module(part)
    assert not installed(model)
    assert_same(loss_and_gradients(model, inputs), expected)
    # remove_hook leaves bound forwards on the instances; they do not stand in the way.
    with patched(model) as again:
        assert sum(again.replaced().values()) == 9
        assert_same(loss_and_gradients(model, inputs), expected)
    assert len(fused) == 2


@needs_accelerate
def test_a_model_whose_forward_accelerate_has_wrapped_keeps_its_loss(model):
    model.forward = MethodType(lambda self, *a, **k: type(self).forward(self, *a, **k), model)
    report = apply(model)
    assert "fused_linear_cross_entropy" not in report.replaced()
    assert "forward of another library" in str(report)


class Sentences(torch.utils.data.Dataset):
    def __init__(self, count):
        g = torch.Generator().manual_seed(0)
        self.rows = torch.randint(4, 100, (count, 12), generator=g)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def train(model, tmp_path, **options):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=3, logging_steps=1,
        gradient_accumulation_steps=2, report_to=[], use_cpu=True, save_strategy="no",
        learning_rate=1e-2, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Sentences(16), eval_dataset=Sentences(4),
        compute_metrics=lambda output: {"mean": float(output.predictions.mean())},
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.evaluate()


@needs_accelerate
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_trainer(tmp_path, fused, model_type):
    losses, metrics = train(tiny_model(model_type), tmp_path)
    model = tiny_model(model_type)
    apply(model)
    our_losses, our_metrics = train(model, tmp_path)
    assert our_losses == pytest.approx(losses, rel=1e-4)
    assert our_metrics["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-4)
    assert our_metrics["eval_mean"] == pytest.approx(metrics["eval_mean"], abs=1e-4)
    assert len(fused) == 6


@needs_accelerate
def test_trainer_in_bfloat16(tmp_path, fused):
    losses, _ = train(tiny_model("llama"), tmp_path, bf16=True)
    model = tiny_model("llama")
    apply(model)
    our_losses, _ = train(model, tmp_path, bf16=True)
    # Three steps in bfloat16, which keeps 8 bits.
    assert our_losses == pytest.approx(losses, rel=1e-2)
    assert len(fused) == 6


@needs_trl
def test_trl_s_trainer(tmp_path):
    """TRL computes the loss from the head's weight itself: ours is idle, the other ops are not."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    def losses(model):
        arguments = SFTConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=2, logging_steps=1,
            report_to=[], use_cpu=True, save_strategy="no", learning_rate=1e-2, disable_tqdm=True,
            bf16=False, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        rows = [{"input_ids": row["input_ids"].tolist()} for row in Sentences(8)]
        trainer = SFTTrainer(
            model, args=arguments, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
        )  # fmt: skip
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    expected = losses(tiny_model("llama"))
    model = tiny_model("llama")
    apply(model)
    assert losses(model) == pytest.approx(expected, rel=1e-4)


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(128)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        pad_token="w0", eos_token="w1", bos_token="w2", unk_token="w0",
    )  # fmt: skip


# kernels


@pytest.mark.parametrize("model_type", ["llama", "olmo2", "olmo"])
def test_the_layer_for_kernels_finds_each_class_s_convention(model_type):
    model = tiny_model(model_type, dtype=torch.bfloat16)
    norm = next(m for m in model.modules() if type(m).__name__.lower().endswith("norm"))
    layer = kernel_mapping(("cpu",))["RMSNorm"]["cpu"].load()
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    expected = norm(x)
    norm.forward = MethodType(layer.forward, norm)
    assert torch.equal(norm(x), expected)


@pytest.mark.skipif(importlib.util.find_spec("kernels") is None, reason="kernels is not installed")
def test_kernelize_takes_our_norm(monkeypatch):
    from kernels import Mode, kernelize, use_kernel_forward_from_hub, use_kernel_mapping
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    @use_kernel_forward_from_hub("RMSNorm")
    class Marked(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states)

    norm, x = Marked(64), torch.randn(3, 64)
    expected = norm(x)
    calls = []
    op = functional.rms_norm
    monkeypatch.setattr(functional, "rms_norm", lambda *a, **k: calls.append(k) or op(*a, **k))
    with use_kernel_mapping(kernel_mapping(("cpu",)), inherit_mapping=False):
        norm = kernelize(nn.Sequential(norm), mode=Mode.TRAINING, device="cpu")[0]
    calls.clear()
    torch.testing.assert_close(norm(x), expected)
    # The first call proves it.
    assert calls[-1]["eps"] == norm.variance_epsilon


# ZeRO-3: the weights are there only inside the call of the module that owns them.


def gather_only_inside(module):
    whole = {name: p.data for name, p in module._parameters.items() if p is not None}

    def gather(*_):
        for name, data in whole.items():
            module._parameters[name].data = data

    def release(*_):
        for name in whole:
            module._parameters[name].data = torch.empty(0)

    module.register_forward_pre_hook(gather)
    module.register_forward_hook(release)
    release()
    return gather


def test_weights_that_are_gathered_for_each_module(model, inputs, fused):
    expected = model(**inputs).loss
    gathers = [gather_only_inside(m) for m in model.modules() if m._parameters]
    apply(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).loss, expected)
    assert len(fused) == 1
    for gather in gathers:
        gather()
