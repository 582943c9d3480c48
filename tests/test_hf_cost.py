"""What the adapter costs by itself: the time of `apply`, and Python in every forward."""

from __future__ import annotations

import sys
import time

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from liger_fn import functional
from liger_fn.hf import apply, patched
from liger_fn.testing.tiny_models import tiny_inputs, tiny_model

LAYERS = 8


def test_apply_on_eight_billion_parameters_takes_less_than_a_second():
    """The processor's time, the shortest of three: other processes do not count."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) > 8e9
    times = []
    for _ in range(3):
        start = time.process_time()
        report = apply(model)
        times.append(time.process_time() - start)
        assert report.replaced()["rms_norm"] == 65
        report.undo()
    assert min(times) < 1.0


# One call of PyTorch in the place of each op: what is measured is the way there.


def rms_norm(x, weight, *, eps, cast_before_weight):
    return x * weight


def swiglu(gate, up):
    return gate * up


def gated_linear(gate, up, weight, bias):
    return F.linear(gate * up, weight, bias)


def rope(q, k, cos, sin, *, rotary_dim, interleaved, layout):
    return q * 2.0, k * 2.0


def fused_linear_cross_entropy(weight, x, y, chunk_size, *, bias, **options):
    return F.cross_entropy(F.linear(x, weight, bias), y)


@pytest.fixture
def models(monkeypatch):
    """Run a model, untouched (0) or patched (1), with the ops above."""
    untouched = modeling_llama.apply_rotary_pos_emb
    models = [tiny_model("llama", num_hidden_layers=LAYERS).train() for _ in range(2)]
    inputs = tiny_inputs(models[0])
    with patched(models[1]) as report, monkeypatch.context() as patch:
        assert len(report.replaced()) == 5
        for op in (rms_norm, swiglu, gated_linear, rope, fused_linear_cross_entropy):
            patch.setattr(functional, op.__name__, op)
        # The rotary function is global: each model gets its own for as long as it runs.
        rotary_functions = untouched, modeling_llama.apply_rotary_pos_emb

        def forward(i):
            patch.setattr(modeling_llama, "apply_rotary_pos_emb", rotary_functions[i])
            return models[i](**inputs)

        # The way of a model on a GPU, wherever this one is.
        with functional.using("kernels"):
            yield forward


def test_a_patched_forward_costs_no_more_time(models):
    """In turns, the shortest of many each: what disturbs a run makes it longer, never shorter.

    Where an op costs what one call of PyTorch does, the calls that it saves pay for the way there:
    about four fifths are left.
    """
    times = [[], []]
    for _ in range(40):
        for i in range(2):
            start = time.process_time_ns()
            models(i)
            times[i].append(time.process_time_ns() - start)
    plain, ours = map(min, times)
    assert ours <= 0.95 * plain


def test_a_patched_layer_interprets_few_more_bytecodes(models):
    """Counted, hence the same at every run: an untouched layer has about 3,500."""
    plain, ours = (bytecodes(models, i) for i in range(2))
    # About 105 more in each layer, most of them in the guard of rope; the rest is the loss, once.
    assert ours - plain < 115 * LAYERS + 1700
    assert plain > 3000 * LAYERS


def bytecodes(function, *args) -> int:
    """Count twice: Python 3.12 counts nothing and 3.13 too little while code is traced first."""
    count_bytecodes(function, *args)
    return count_bytecodes(function, *args)


def count_bytecodes(function, *args) -> int:
    count = 0

    def trace(frame, event, _):
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*args)
    finally:
        sys.settrace(before)
    return count
