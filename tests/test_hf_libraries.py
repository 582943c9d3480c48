"""Patched models in the hands of PEFT, accelerate, Trainer, TRL, and something like ZeRO-3."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from types import MethodType

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from liger_fn import functional
from liger_fn.hf import apply, kernel_mapping, patched, undo
from liger_fn.hf.install import installed
from liger_fn.hf.output_head import DeferringHead
from liger_fn.testing.tiny_models import assert_same, loss_and_gradients, tiny_inputs, tiny_model

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
        "rms_norm": 5, "swiglu": 2, "rope": 1, "causal_mask": 1, "fused_linear_cross_entropy": 1,
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
@pytest.mark.parametrize("order", ["lora first", "apply first"])
def test_lora_on_experts(order):
    """PEFT computes the weights of experts at every call, behind their names."""
    model = tiny_model("mixtral").train()
    inputs = tiny_inputs(model)
    options = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    plain = copy.deepcopy(model)
    expected = loss_and_gradients(with_lora(plain, **options), inputs)
    if order == "apply first":
        report = apply(model, ops=["fused_moe"])
    tuned = with_lora(model, **options)
    if order == "lora first":
        report = apply(tuned, ops=["fused_moe"])
    assert report.replaced() == {"fused_moe": 2}
    assert_same(loss_and_gradients(tuned, inputs), expected)
    report.undo()
    assert not installed(tuned.get_base_model())
    assert_same(loss_and_gradients(tuned, inputs), expected)


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
    assert sum(report.replaced().values()) == 10
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
        assert sum(again.replaced().values()) == 10
        assert_same(loss_and_gradients(model, inputs), expected)
    assert len(fused) == 2


@needs_accelerate
def test_weights_on_disk(model, inputs, fused, tmp_path):
    """The model is empty but for what is being computed."""
    from accelerate import disk_offload

    model.eval()
    with torch.no_grad():
        expected = model(**inputs)
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
        assert model.lm_head.weight.is_meta
        report = apply(model)
        assert sum(report.replaced().values()) == 10
        torch.testing.assert_close(model(**inputs).logits, expected.logits)
        assert not fused
        found = model(**inputs, skip_logits=True)
        torch.testing.assert_close(found.loss, expected.loss)
        assert len(fused) == 1
        report.undo()
        torch.testing.assert_close(model(**inputs).logits, expected.logits)


@needs_accelerate
def test_a_model_that_is_loaded_by_a_device_map(model, inputs, fused, tmp_path):
    model.save_pretrained(tmp_path)
    expected = model.eval()(**inputs).loss
    loaded = type(model).from_pretrained(tmp_path, device_map={"": "cpu"})
    assert sum(apply(loaded).replaced().values()) == 10
    torch.testing.assert_close(loaded(**inputs, skip_logits=True).loss, expected)
    assert len(fused) == 1


# quantised layers


class Int8Linear(nn.Linear):
    """As quantisers make it: a linear layer by name and sizes, with another weight."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, False, device="meta")
        scale = linear.weight.detach().abs().max() / 127
        quantised = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(quantised, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def test_quantised_layers_keep_their_forward(model, inputs, fused):
    """Around them the ops go in; a quantised head is left alone, and said so."""
    for layer in model.model.layers:
        for owner, name in ((layer.self_attn, "q_proj"), (layer.mlp, "gate_proj")):
            setattr(owner, name, Int8Linear(getattr(owner, name)))
    model.lm_head = Int8Linear(model.lm_head)
    expected = loss_and_gradients(model, inputs)
    report = apply(model)
    assert report.replaced() == {"rms_norm": 5, "swiglu": 2, "rope": 1, "causal_mask": 1}
    assert "its output head (Int8Linear) is not a plain linear layer" in str(report)
    assert type(model.lm_head) is type(model.model.layers[0].mlp.gate_proj) is Int8Linear
    assert_same(loss_and_gradients(model, inputs), expected)
    assert not fused


@needs_accelerate
def test_a_model_whose_forward_does_not_say_what_it_wraps_keeps_its_loss(model):
    model.forward = MethodType(lambda self, *a, **k: type(self).forward(self, *a, **k), model)
    report = apply(model)
    assert "fused_linear_cross_entropy" not in report.replaced()
    assert "forward of another library" in str(report)


@pytest.fixture
def accelerator():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(True)


@needs_accelerate
@pytest.mark.parametrize("order", ["prepare first", "apply first"])
def test_mixed_precision_of_accelerate(model, inputs, fused, accelerator, order):
    expected = accelerator.prepare(copy.deepcopy(model))(**inputs)
    if order == "apply first":
        report = apply(model)
    prepared = accelerator.prepare(model)
    if order == "prepare first":
        report = apply(prepared)
    assert apply(prepared).replaced()["fused_linear_cross_entropy"] == 1
    output = prepared(**inputs)
    # The same bfloat16 products; the op does not round the logits to it.
    torch.testing.assert_close(output.loss, expected.loss, rtol=3e-3, atol=0)
    assert output.logits.dtype == expected.logits.dtype == torch.float32
    assert len(fused) == 1
    output.loss.backward()
    report.undo()
    torch.testing.assert_close(prepared(**inputs).loss, expected.loss)
    assert len(fused) == 1
    assert not installed(model)


@needs_accelerate
def test_undoing_restores_what_accelerate_has_put_on_the_model(model, inputs, accelerator):
    prepared = accelerator.prepare(model)
    before = prepared.__dict__["forward"]
    apply(prepared).undo()
    assert prepared.__dict__["forward"] is before


class Sentences(torch.utils.data.Dataset):
    def __init__(self, count):
        g = torch.Generator().manual_seed(0)
        self.rows = torch.randint(4, 100, (count, 12), generator=g)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


HAS_GPU = torch.cuda.is_available()
# On a GPU the kernels sum in another order; Adam magnifies that where a gradient is nearly nothing.
AS_BEFORE = 1e-3 if HAS_GPU else 1e-4


def on_one_device(arguments):
    """Keep Trainer from making nn.DataParallel of all GPUs that it sees."""
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def train(model, tmp_path, **options):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=3, logging_steps=1,
        gradient_accumulation_steps=2, report_to=[], use_cpu=not HAS_GPU, save_strategy="no",
        learning_rate=1e-2, disable_tqdm=True, **options,
    )  # fmt: skip
    on_one_device(arguments)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Sentences(16), eval_dataset=Sentences(4),
        compute_metrics=lambda output: {"mean": float(output.predictions.mean())},
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.evaluate()


@needs_accelerate
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_trainer(on_device, tmp_path, fused, model_type):
    losses, metrics = train(tiny_model(model_type), tmp_path)
    model = tiny_model(model_type)
    apply(model)
    our_losses, our_metrics = train(model, tmp_path)
    assert our_losses == pytest.approx(losses, rel=AS_BEFORE)
    assert our_metrics["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=AS_BEFORE)
    assert our_metrics["eval_mean"] == pytest.approx(metrics["eval_mean"], abs=AS_BEFORE)
    # The mean over both steps of an accumulation is the op's: the backward pass multiplies nothing.
    assert [call["reduction"] for call in fused] == ["mean"] * 6
    assert all(call["num_items"] is not None for call in fused)


@needs_accelerate
def test_trainer_that_evaluates_the_loss_alone(on_device, tmp_path, fused):
    """With prediction_loss_only Trainer drops the logits: `skip_logits` keeps them from being."""

    class WithoutLogits(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, {**inputs, "skip_logits": True}, *args, **kwargs)

    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=not HAS_GPU,
        prediction_loss_only=True, disable_tqdm=True,
    )  # fmt: skip
    model = tiny_model("llama")
    options = {"args": on_one_device(arguments), "eval_dataset": Sentences(4)}
    expected = Trainer(model, **options).evaluate()["eval_loss"]
    apply(model)
    found = WithoutLogits(model, **options).evaluate()["eval_loss"]
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(fused) == 2


@needs_accelerate
def test_trainer_in_bfloat16(on_device, tmp_path, fused):
    losses, _ = train(tiny_model("llama"), tmp_path, bf16=True)
    model = tiny_model("llama")
    apply(model)
    our_losses, _ = train(model, tmp_path, bf16=True)
    # Three steps in bfloat16, which keeps 8 bits.
    assert our_losses == pytest.approx(losses, rel=1e-2)
    assert len(fused) == 6


def train_with_trl(trainer_class, model, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig

    arguments = SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=2, logging_steps=1,
        report_to=[], use_cpu=not HAS_GPU, save_strategy="no", learning_rate=1e-2,
        disable_tqdm=True, bf16=False, gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    rows = [{"input_ids": row["input_ids"].tolist()} for row in Sentences(8)]
    trainer = trainer_class(
        model, args=on_one_device(arguments), train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@needs_trl
def test_trl_s_trainer(on_device, tmp_path, fused):
    """TRL computes the loss from the head's weight itself: ours is idle, the other ops are not."""
    from trl import SFTTrainer

    class WithTheModelsLoss(SFTTrainer):
        compute_loss = Trainer.compute_loss

    expected = train_with_trl(SFTTrainer, tiny_model("llama"), tmp_path)
    model = tiny_model("llama")
    assert "idle in TRL's own trainers" in str(apply(model))
    assert train_with_trl(SFTTrainer, model, tmp_path) == pytest.approx(expected, rel=AS_BEFORE)
    assert not fused
    model = tiny_model("llama")
    apply(model)
    assert train_with_trl(WithTheModelsLoss, model, tmp_path) == pytest.approx(
        expected, rel=AS_BEFORE
    )
    assert len(fused) == 2


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


def llama_s_rotation(q, k, cos, sin, unsqueeze_dim=1):
    """What the modelling file has where `kernels` is not installed."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return tuple(x * cos + modeling_llama.rotate_half(x) * sin for x in (q, k))


def as_kernels_makes_it(function):
    """What `kernels` puts in the place of a function that is marked: a module."""

    class Func(nn.Module):
        kernel_layer_name = "rotary_pos_emb"

        def forward(self, *args, **kwargs):
            return function(*args, **kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.signature(function)
    Func.forward.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])
    return Func()


def rotary_arguments():
    angle = torch.rand(1, 5, 8).repeat(1, 1, 2)
    return torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16), angle.cos(), angle.sin()


@pytest.fixture
def ropes(monkeypatch):
    calls, op = [], functional.rope
    monkeypatch.setattr(functional, "rope", lambda *a, **k: calls.append(k) or op(*a, **k))
    return calls


def test_the_rotary_layer_for_kernels_finds_each_function_s_convention(ropes):
    layer = kernel_mapping(("cpu",))["rotary_pos_emb"]["cpu"].load()
    for function, is_rope in (
        (llama_s_rotation, True),
        (lambda q, k, cos, sin, unsqueeze_dim=1: q, False),
    ):
        module = as_kernels_makes_it(function)
        expected = module(*rotary_arguments())
        module.forward = MethodType(layer.forward, module)
        module(*rotary_arguments())
        ropes.clear()
        arguments = rotary_arguments()
        torch.testing.assert_close(module(*arguments), function(*arguments))
        assert type(module(*arguments)) is type(expected)
        assert bool(ropes) == is_rope


def test_a_rotary_function_that_kernels_has_made_a_module_is_replaced(model, inputs, monkeypatch):
    expected = loss_and_gradients(model, inputs)
    original = as_kernels_makes_it(llama_s_rotation)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", original)
    with patched(model) as report:
        assert report.replaced()["rope"] == 1
        assert_same(loss_and_gradients(model, inputs), expected)
    assert modeling_llama.apply_rotary_pos_emb is original


@pytest.mark.skipif(importlib.util.find_spec("kernels") is None, reason="kernels is not installed")
def test_kernelize_takes_our_norm_and_our_rope(monkeypatch, ropes):
    from kernels import (
        Mode,
        kernelize,
        use_kernel_forward_from_hub,
        use_kernel_mapping,
        use_kernelized_func,
    )

    rotate = use_kernel_forward_from_hub("rotary_pos_emb")(llama_s_rotation)

    @use_kernel_forward_from_hub("RMSNorm")
    class Marked(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states)

    @use_kernelized_func(rotate)
    class Layer(nn.Sequential):
        pass

    model, x, arguments = Layer(Marked(64)), torch.randn(3, 64), rotary_arguments()
    expected, rotated = model(x), rotate(*arguments)
    calls, op = [], functional.rms_norm
    monkeypatch.setattr(functional, "rms_norm", lambda *a, **k: calls.append(k) or op(*a, **k))
    with use_kernel_mapping(kernel_mapping(("cpu",)), inherit_mapping=False):
        model = kernelize(model, mode=Mode.TRAINING, device="cpu")
    # The first calls prove them.
    model(x), rotate(*arguments)
    calls.clear(), ropes.clear()
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(rotate(*arguments), rotated)
    assert (len(calls), len(ropes)) == (1, 1)


# Threads that share a model, as servers have it.


@pytest.mark.parametrize("other", ["generates", "computes a loss"])
def test_two_threads_with_one_model(model, inputs, fused, other):
    model.eval()
    expected = model(**inputs)
    apply(model)
    halfway, may_go_on = threading.Event(), threading.Event()

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            halfway.set()
            assert may_go_on.wait(60)

    model.model.norm.register_forward_hook(wait)
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        first = pool.submit(torch.no_grad()(model), **inputs, skip_logits=True)
        assert halfway.wait(60)
        if other == "generates":
            assert torch.equal(model(input_ids=inputs["input_ids"]).logits, expected.logits)
        else:
            torch.testing.assert_close(model(**inputs, skip_logits=True).loss, expected.loss)
        may_go_on.set()
        torch.testing.assert_close(first.result().loss, expected.loss)
    assert len(fused) == 1
    assert type(model(input_ids=inputs["input_ids"]).logits) is torch.Tensor


# ZeRO-3: the weights are there only inside the call of the module that owns them.


def gather_only_inside(module):
    whole = {name: p.data for name, p in module._parameters.items() if p is not None}

    def gather(*_):
        for name, data in whole.items():
            module._parameters[name].data = data

    def release(*_):
        for name in whole:
            module._parameters[name].data = torch.empty(0)

    release.__module__ = "deepspeed.runtime.zero.parameter_offload"
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
