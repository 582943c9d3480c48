"""`torch.compile` of patched models: no graph break that the untouched lacks, the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from liger_fn.hf import apply
from liger_fn.hf.output_head import FUSED
from liger_fn.testing.tiny_models import (
    TOKENS,
    assert_same,
    loss_and_gradients,
    tiny_inputs,
    tiny_model,
)

# Common families: a training step is one graph.
WHOLE = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "granite"),
    *("mixtral", "qwen3_moe", "gpt_oss"),
)
# A loss by the module CrossEntropyLoss, F.tanh around the logits, layer norms, breaks.
# Of Bart the loss alone: where some versions break by themselves, Dynamo runs torch's layer norm
# between two breaks as it is, and makes a graph of ours.
OTHERS = {"bart": [FUSED], **dict.fromkeys(("recurrent_gemma", "gpt_neox", "gpt2"))}


@pytest.fixture(autouse=True)
def fresh(on_device):
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_and_inputs(model_type, device, **options):
    model = tiny_model(model_type, **options).train().to(device)
    inputs = {name: value.to(device) for name, value in tiny_inputs(model).items()}
    return model, inputs


@pytest.mark.parametrize("model_type", WHOLE)
def test_compiled_training_step(model_type, device):
    model, inputs = model_and_inputs(model_type, device)
    expected = loss_and_gradients(model, inputs)
    assert apply(model).replaced()["fused_linear_cross_entropy"] == 1
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # The compiled backward may sum in another order.
    assert_same(loss_and_gradients(model, inputs, compiled), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("items", [7, torch.tensor(7)], ids=["number", "tensor"])
def test_compiled_with_a_mean_over_more_than_the_batch(items, device):
    model, inputs = model_and_inputs("llama", device)
    inputs["num_items_in_batch"] = items.to(device) if torch.is_tensor(items) else items
    expected = loss_and_gradients(model, inputs)
    apply(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(loss_and_gradients(model, inputs, compiled), expected, rtol=1e-3, atol=1e-5)


def test_compiled_by_inductor(device):
    if device.type == "cpu":
        pytest.skip("on the CPU aot_eager stands for inductor, which would compile C++")
    model, inputs = model_and_inputs("llama", device)
    expected = loss_and_gradients(model, inputs)
    apply(model)
    compiled = torch.compile(model, fullgraph=True)
    assert_same(loss_and_gradients(model, inputs, compiled), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model_type", OTHERS)
def test_a_patched_model_is_in_no_more_graphs(model_type, device):
    model, inputs = model_and_inputs(model_type, device)
    expected, before = loss_and_graphs(model, inputs)
    assert apply(model, ops=OTHERS[model_type]).replaced()[FUSED] == 1
    loss, after = loss_and_graphs(model, inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert after <= before


def loss_and_graphs(model, inputs):
    """What breaks a graph makes two of it; a break in a frame without ops makes none."""
    torch._dynamo.reset()
    counter = CompileCounter()
    return torch.compile(model, backend=counter)(**inputs)[0], counter.frame_count


def test_compiled_without_labels_after_training_with_them(device):
    model, inputs = model_and_inputs("llama", device, num_hidden_layers=1)
    apply(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(**inputs).loss.backward()
    labels = inputs.pop("labels")
    expected = model(**inputs).logits
    torch.testing.assert_close(compiled(**inputs).logits, expected)
    model.eval()
    torch.testing.assert_close(compiled(**inputs, labels=labels).logits, model(**inputs).logits)
    skipped = compiled(**inputs, labels=labels, skip_logits=True)
    assert skipped.logits is None


def test_undoing_is_noticed_by_a_compiled_model(device):
    model, inputs = model_and_inputs("llama", device, num_hidden_layers=1)
    report = apply(model)
    compiled = torch.compile(model, backend="aot_eager")
    loss = compiled(**inputs).loss
    report.undo()
    output = compiled(**inputs)
    torch.testing.assert_close(output.loss, loss)
    assert type(output.logits) is torch.Tensor


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_compiled_attention_is_causal_without_a_mask(model_type, device):
    """As it is uncompiled; a sequence of several, and padding, still have their mask."""
    model, inputs = model_and_inputs(model_type, device)
    inputs["use_cache"] = False  # with a cache transformers takes all for one sequence
    row = inputs.pop("attention_mask") * 0 + torch.arange(TOKENS, device=device)
    padded = (row >= 3).long()
    expected = [model(**inputs, **more).loss for more in ({}, {"position_ids": row % 5})]
    masked = model(**inputs, attention_mask=padded).loss

    apply(model)
    plain = torch.compile(model, fullgraph=True, backend=(seen := Attention()))
    torch.testing.assert_close(plain(**inputs).loss, expected[0])
    assert True in seen.causal
    seen.causal.clear()
    torch.testing.assert_close(plain(**inputs, position_ids=row % 5).loss, expected[1])
    torch.testing.assert_close(plain(**inputs, attention_mask=padded).loss, masked)
    assert seen.causal
    assert True not in seen.causal


def test_exported_attention_has_its_mask(device):
    """A mask that is left out would be wrong for the one token of a step of generation."""
    model, inputs = model_and_inputs("llama", device)
    apply(model, ops=["causal_mask"])
    ids = {"input_ids": inputs["input_ids"], "use_cache": False}
    program = torch.export.export(model.model, (), kwargs=ids)
    attention = torch.ops.aten.scaled_dot_product_attention.default
    nodes = [node for node in program.graph.nodes if node.target is attention]
    assert nodes
    assert all(len(node.args) > 3 for node in nodes)


class Attention:
    """A compiler that compiles nothing, and notes what attention is told."""

    def __init__(self) -> None:
        self.causal: list[bool] = []

    def __call__(self, graph, example_inputs):
        for node in graph.graph.nodes:
            if node.target is torch.nn.functional.scaled_dot_product_attention:
                self.causal.append(node.kwargs["is_causal"])
        return graph
