"""Patched models at work, with the kernels on a GPU and with the references on the CPU."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers.utils import is_flash_attn_2_available

from liger_fn.functional import using
from liger_fn.hf import apply
from liger_fn.testing.tiny_models import (
    VOCAB,
    assert_same,
    loss_and_gradients,
    tiny_inputs,
    tiny_model,
)

COMMON = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2"),
    *("cohere", "granite", "glm4", "gpt2", "gpt_neox", "nemotron", "mixtral", "deepseek_v3"),
    *("gpt_oss", "qwen3_next", "bamba"),
)

pytestmark = pytest.mark.usefixtures("on_device")


def moved(inputs, device):
    return {name: value.to(device) for name, value in inputs.items()}


# bfloat16


@pytest.mark.parametrize("model_type", COMMON)
def test_bfloat16_is_no_further_from_float32_than_before(model_type, device):
    """Both are rounded, at different places: the distances are those of two random roundings.

    The margins are a thousandth of the loss and a twentieth of the gradients' distance, at the
    middle of seven batches: close to a tie either may send a token to another expert.
    """
    model = tiny_model(model_type, dtype=torch.bfloat16).to(device)
    batches = [moved(tiny_inputs(model, seed=seed), device) for seed in range(7)]
    wide = copy.deepcopy(model).float()
    exact = [loss_and_gradients(wide, batch) for batch in batches]
    before = [distances(model, *pair) for pair in zip(batches, exact, strict=True)]
    assert len(apply(model).replaced()) >= 2
    after = [distances(model, *pair) for pair in zip(batches, exact, strict=True)]
    loss_before, gradients_before = torch.tensor(before).median(0).values
    loss_after, gradients_after = torch.tensor(after).median(0).values
    assert loss_after <= loss_before + 1e-3
    assert gradients_after <= 1.05 * gradients_before


def distances(model, batch, exact) -> tuple[float, float]:
    """How far the loss and all gradients together are from exact ones, relative to them."""
    loss, gradients = loss_and_gradients(model, batch)
    exact_loss, exact_gradients = exact
    assert gradients.keys() == exact_gradients.keys()
    errors = [gradients[name].float() - g for name, g in exact_gradients.items()]
    error = torch.stack([e.norm() for e in errors]).norm()
    size = torch.stack([g.norm() for g in exact_gradients.values()]).norm()
    return ((loss - exact_loss).abs() / exact_loss).item(), (error / size).item()


# gradient checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_neox", "qwen3_moe"])
def test_gradient_checkpointing(model_type, use_reentrant, device):
    model = tiny_model(model_type).train().to(device)
    inputs = moved(tiny_inputs(model), device)
    expected = loss_and_gradients(model, inputs)
    apply(model)
    options = {"use_reentrant": use_reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.enable_input_require_grads()
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", None) is not None]
    assert any(layer.gradient_checkpointing for layer in layers)
    assert_same(loss_and_gradients(model, inputs), expected, rtol=1e-3, atol=1e-5)


def test_a_checkpoint_repeats_no_product_for_nothing(device, monkeypatch):
    """It stops in a layer's last one, as soon as its input is kept."""
    products = []

    def counted(*args):
        out = linear(*args)
        products.append(out.shape)
        return out

    linear = torch.nn.functional.linear
    counts = []
    for ops in ((), ("swiglu",)):
        model = tiny_model("llama", num_hidden_layers=2).train().to(device)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        inputs = moved(tiny_inputs(model), device)
        with monkeypatch.context() as patch:
            if ops:
                assert apply(model, ops=ops).replaced() == {"swiglu": 2}
            patch.setattr(torch.nn.functional, "linear", counted)
            products.clear()
            with using("kernels"):
                model(**inputs).loss.backward()
        counts.append(len(products))
    assert counts[1] == counts[0] == 2 * (7 + 6) + 1


def test_without_a_checkpoint_the_activation_is_not_kept(device):
    model = tiny_model("llama", num_hidden_layers=2).train().to(device)
    apply(model, ops=("swiglu",))
    kept = []

    def keep(t):
        kept.append(tuple(t.shape))
        return t

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    with using("kernels"), hooks:
        model(**moved(tiny_inputs(model), device)).loss.backward()
    width = model.config.intermediate_size
    # Of each layer gate and up.
    assert sum(len(shape) > 2 and shape[-1] == width for shape in kept) == 2 * 2


# packed sequences


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_sequences_in_one_row(model_type, attention, device):
    """Told apart by position_ids alone, they give the loss and the gradients of a batch of them."""
    if attention == "flex_attention" and device.type == "cpu":
        pytest.skip("flex attention has no backward pass on the CPU")
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed, or there is no GPU")
    dtype = torch.bfloat16 if attention == "flash_attention_2" else torch.float32
    model = tiny_model(model_type, dtype=dtype).train().to(device)
    model.set_attn_implementation(attention)
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(4, VOCAB - 24, (4, 32), generator=g)
    labels = rows.clone()
    # A label is the token after: the first of a sequence follows nothing.
    labels[:, 0] = -100
    positions = torch.arange(32).repeat(4, 1)
    separate = moved({"input_ids": rows, "labels": labels}, device)
    packed = {"input_ids": rows, "labels": labels, "position_ids": positions}
    packed = moved({name: value.reshape(1, -1) for name, value in packed.items()}, device)
    # A cache would hide that nothing came before.
    packed["use_cache"] = False
    expected = loss_and_gradients(model, packed)
    if dtype == torch.bfloat16:
        # Attention in two bytes: the loss keeps three digits, and gradients are not compared.
        for batch in (separate, packed):
            apply(model)
            found, _ = loss_and_gradients(model, batch)
            torch.testing.assert_close(found, expected[0], rtol=1e-2, atol=0)
        return
    assert_same(loss_and_gradients(model, separate), expected, rtol=1e-2, atol=1e-4)
    apply(model)
    assert_same(loss_and_gradients(model, packed), expected, rtol=1e-3, atol=1e-5)


# generation


@pytest.mark.parametrize(
    ("model_type", "way"),
    [
        *itertools.product(("llama", "gemma2", "gpt2"), ("greedy", "beams", "static cache")),
        ("llama", "assisted"),
    ],
)
def test_generation(model_type, way, device):
    model = tiny_model(model_type).to(device)
    prompt = moved(tiny_inputs(model, tokens=6), device)["input_ids"][:1]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if way == "beams":
        options["num_beams"] = 3
    if way == "assisted":
        options["assistant_model"] = tiny_model(model_type, seed=1).to(device)
    if way == "static cache":
        # Compiled by default, which is slow here and not in question.
        options |= {"cache_implementation": "static", "disable_compile": True}
    expected = model.generate(prompt, **options)
    apply(model)
    if way == "assisted":
        apply(options["assistant_model"])
    assert torch.equal(model.generate(prompt, **options), expected)


# autocast


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gpt2", "nemotron", "mixtral"])
def test_autocast(model_type, device):
    model = tiny_model(model_type).train().to(device)
    inputs = moved(tiny_inputs(model), device)
    exact = loss_and_gradients(model, inputs)

    def step(**inputs):
        with torch.autocast(device.type, torch.bfloat16):
            return model(**inputs)

    expected = loss_and_gradients(model, inputs, step)
    apply(model)
    loss, gradients = loss_and_gradients(model, inputs, step)
    assert loss.dtype == expected[0].dtype == torch.float32
    # Both round the hidden states to bfloat16, at different places.
    torch.testing.assert_close(loss, expected[0], rtol=3e-3, atol=0)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        before = (expected[1][name] - exact[1][name]).norm()
        assert (gradient - exact[1][name]).norm() <= 1.5 * before + 1e-2 * exact[1][name].norm()


def test_a_head_in_another_dtype_than_the_model(device):
    """As a reward or a small head is kept in float32 beside a bfloat16 body."""
    model = tiny_model("llama", dtype=torch.bfloat16).train().to(device)
    model.lm_head = nn.Linear(64, VOCAB, bias=False, device=device)
    inputs = moved(tiny_inputs(model), device)
    apply(model)
    with pytest.raises((TypeError, RuntimeError, ValueError), match="dtype"):
        model(**inputs)
