"""A compiled decoder layer: our ops are in it, without copies, and can be left to the compiler.

`python -m benchmarks --mode layer` times the same layer.
"""

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from benchmarks import layer
from benchmarks.inputs import DeviceDraw
from liger_fn.functional import using
from liger_fn.testing.properties.compiler import copying_kernels


@pytest.fixture
def call(device):
    """Compile both passes of the layer with some of our ops; give their calls, and the code."""
    draw = DeviceDraw(device, torch.float32)
    weights = layer.weights(layer.TINY, draw)
    x = draw.normal(1, layer.TINY.T, layer.TINY.D).requires_grad_()
    cos, sin = (draw.normal(1, layer.TINY.T, layer.TINY.C) for _ in range(2))
    leaves = [x, *weights.values()]

    def code(ours: tuple[str, ...]) -> tuple[list[str], str]:
        torch._dynamo.reset()
        compiled = torch.compile(layer.with_ours(layer.TINY, ours), fullgraph=True)

        def passes():
            y = compiled(x, cos, sin, weights)
            return torch.autograd.grad(y, leaves, torch.ones_like(y))

        # A cache would give back code of another time.
        with torch._inductor.config.patch(force_disable_caches=True):
            _, codes = run_and_get_code(passes)
        text = "\n".join(codes)
        return sorted(re.findall(r"= torch\.ops\.liger_fn\.(\w+)\.default\(", text)), text

    return code


def test_each_op_is_called_once_a_pass_and_nothing_is_copied_for_it(call):
    ops, code = call(layer.OPS)
    once = ["rms_norm", "rms_norm_bwd", "rope", "rope_bwd", "swiglu", "swiglu_bwd"]
    assert ops == sorted([*once, "rms_norm", "rms_norm_bwd"])
    none, without = call(())
    assert none == []
    assert len(copying_kernels([code])) <= len(copying_kernels([without]))


def test_under_the_reference_the_compiler_gets_plain_pytorch(call):
    with using("reference"):
        assert call(layer.OPS)[0] == []
