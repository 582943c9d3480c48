"""Facts about gated_rms_norm that can be checked by hand or against PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F

from liger_fn.functional import gated_rms_norm, rms_norm


def test_by_hand(device):
    # The root mean square of (3, 4) is √12.5; σ(ln 3) = 3/4 and σ(0) = 1/2.
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64, device=device)
    gate = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64, device=device)
    options = {"eps": 0.0, "activation": "sigmoid"}
    after = gated_rms_norm(x, gate, **options)
    assert after.tolist()[0] == pytest.approx([2.25 / 12.5**0.5, 2.0 / 12.5**0.5])
    # That of (2.25, 2).
    root = ((2.25**2 + 4.0) / 2) ** 0.5
    before = gated_rms_norm(x, gate, gate_first=True, **options)
    assert before.tolist()[0] == pytest.approx([2.25 / root, 2.0 / root])


def test_is_a_norm_and_a_gate(device):
    x, gate = torch.randn(2, 5, 12, dtype=torch.float64, device=device).unbind()
    w = torch.randn(12, dtype=torch.float64, device=device)
    torch.testing.assert_close(
        gated_rms_norm(x, gate, w), rms_norm(x, w) * F.silu(gate), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        gated_rms_norm(x, gate, w, gate_first=True),
        rms_norm(x * F.silu(gate), w),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("gate_first", [False, True])
def test_a_group_is_a_norm_of_its_own(gate_first, device):
    x, gate = torch.randn(2, 5, 12, dtype=torch.float64, device=device).unbind()
    w = torch.randn(12, dtype=torch.float64, device=device)
    each = [
        gated_rms_norm(*parts, gate_first=gate_first)
        for parts in zip(x.chunk(3, -1), gate.chunk(3, -1), w.chunk(3), strict=True)
    ]
    together = gated_rms_norm(x, gate, w, gate_first=gate_first, groups=3)
    torch.testing.assert_close(together, torch.cat(each, -1), rtol=1e-12, atol=1e-12)
