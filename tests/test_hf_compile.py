"""`torch.compile(fullgraph=True)` of patched models: no graph break, and the same numbers."""

from __future__ import annotations

import pytest
import torch

from liger_fn.functional import using
from liger_fn.hf import apply
from liger_fn.testing.tiny_models import assert_same, loss_and_gradients, tiny_inputs, tiny_model


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with using("reference"):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite", "qwen3"])
def test_compiled_training_step(model_type):
    model = tiny_model(model_type).train()
    inputs = tiny_inputs(model)
    expected = loss_and_gradients(model, inputs)
    assert apply(model).replaced()["fused_linear_cross_entropy"] == 1
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # The compiled backward may sum in another order.
    assert_same(loss_and_gradients(model, inputs, compiled), expected, rtol=1e-3, atol=1e-5)


def test_compiled_without_labels_after_training_with_them():
    model = tiny_model("llama", num_hidden_layers=1).train()
    inputs = tiny_inputs(model)
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


def test_undoing_is_noticed_by_a_compiled_model():
    model = tiny_model("llama", num_hidden_layers=1).train()
    inputs = tiny_inputs(model)
    report = apply(model)
    compiled = torch.compile(model, backend="aot_eager")
    loss = compiled(**inputs).loss
    report.undo()
    output = compiled(**inputs)
    torch.testing.assert_close(output.loss, loss)
    assert type(output.logits) is torch.Tensor
