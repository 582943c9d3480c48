"""Facts about gated_activation that can be checked by hand or against transformers."""

import importlib

import pytest
import torch
from transformers.activations import ACT2FN

from liger_fn.functional import gated_activation, swiglu
from liger_fn.functional.activation import gated_activation as room
from liger_fn.functional.activation import glu


@pytest.mark.parametrize("name", room._KERNELS)
def test_activations_are_transformers(name, device):
    gate, up = torch.randn(2, 5, 7, dtype=torch.float64, device=device).unbind()
    # Two spellings of one formula in float64; quick_gelu's and the tanh form's constants are
    # written to ten digits.
    torch.testing.assert_close(
        gated_activation(gate, up, activation=name), ACT2FN[name](gate) * up, rtol=1e-9, atol=1e-9
    )


def _apply_gate(module: str, owner: str, gate_up: torch.Tensor, **attributes) -> torch.Tensor:
    """The method of a model's class, on an object that has only these attributes."""

    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    stand_in = type("StandIn", (), attributes)()
    return getattr(modeling, owner)._apply_gate(stand_in, gate_up)


def _same(ours, theirs, gate_up) -> None:
    got, want = ours(gate_up), theirs(gate_up)
    torch.testing.assert_close(got, want)
    pulled = (torch.autograd.grad(y.sin().sum(), gate_up)[0] for y in (got, want))
    torch.testing.assert_close(*pulled)


def test_gpt_oss(device):
    gate_up = 5 * torch.randn(6, 16, dtype=torch.float64, device=device)
    _same(
        lambda x: gated_activation(x, alpha=1.702, limit=7.0, up_offset=1.0, interleaved=True),
        lambda x: _apply_gate("gpt_oss", "GptOssExperts", x, alpha=1.702, limit=7.0),
        gate_up.requires_grad_(),
    )


def test_deepseek_v4(device):
    pytest.importorskip(
        "transformers.models.deepseek_v4", reason="this transformers has no DeepSeek-V4"
    )
    gate_up = 5 * torch.randn(6, 16, dtype=torch.float64, device=device)
    attributes = {"limit": 4.0, "act_fn": torch.nn.SiLU()}
    _same(
        lambda x: gated_activation(x, limit=4.0),
        lambda x: _apply_gate("deepseek_v4", "DeepseekV4Experts", x, **attributes),
        gate_up.requires_grad_(),
    )


def test_step_3_7_bounds_the_activated_gate(device):
    pytest.importorskip("transformers.models.step3p7", reason="this transformers has no Step-3.7")
    gate_up = 5 * torch.randn(6, 16, dtype=torch.float64, device=device)
    attributes = {"limit": 3.0, "act_fn": torch.nn.SiLU()}
    _same(
        lambda x: gated_activation(x, limit=3.0, limit_activated=True),
        lambda x: _apply_gate("step3p7", "Step3p7Experts", x, **attributes),
        gate_up.requires_grad_(),
    )


def test_by_hand(device):
    gate, up = (torch.tensor([v], device=device, requires_grad=True) for v in (3.0, -9.0))
    # 2 · relu(min(0.5 · 3, 4)) · (max(−9, −4) + 1)
    y = gated_activation(
        gate, up, activation="relu", gate_scale=0.5, scale=2.0, limit=4.0, up_offset=1.0
    )
    assert y.item() == -9.0
    dgate, dup = torch.autograd.grad(y.sum(), (gate, up))
    assert dgate.item() == -3.0
    assert dup.item() == 0.0


def test_at_the_bound_the_gradient_passes_as_in_torch(device):
    gate_up = torch.tensor([2.0, 2.0], dtype=torch.float64, device=device, requires_grad=True)
    y = gated_activation(gate_up, activation="linear", limit=2.0)
    assert torch.autograd.grad(y.sum(), gate_up)[0].tolist() == [2.0, 2.0]


def test_nan_stays_nan(device):
    nan = torch.tensor([float("nan")], device=device)
    for name in room._KERNELS:
        y = gated_activation(nan, torch.ones_like(nan), activation=name, limit=1.0)
        assert y.isnan().all(), name


def test_interleaved_and_packed_tensors_are_not_copied(device, monkeypatch):
    passed = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: passed.append(args[0])

    monkeypatch.setattr(glu, "_glu_fwd_kernel", Kernel())
    wide = torch.randn(4, 3, 20, device=device)
    gate_up = wide[..., 4:]
    gated_activation(gate_up, interleaved=True)
    gated_activation(gate_up)
    assert [t.data_ptr() for t in passed] == [gate_up.data_ptr()] * 2


def test_plain_it_is_swiglu(device):
    gate, up = torch.randn(2, 4, 33, device=device).unbind()
    assert torch.equal(gated_activation(gate, up), swiglu(gate, up))
