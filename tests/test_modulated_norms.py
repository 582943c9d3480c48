"""Facts about the modulated norms that can be checked against PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from liger_fn.functional import modulated_layer_norm, modulated_rms_norm


def _samples(*sizes: int, device):
    return (torch.randn(*sizes, dtype=torch.float64, device=device) for _ in range(2))


@pytest.mark.parametrize("shape", [(3, 8), (3, 1, 8)])
def test_is_adaptive_layer_norm(shape, device):
    x = torch.randn(3, 5, 8, dtype=torch.float64, device=device)
    scale, shift = _samples(*shape, device=device)
    each = (t.reshape(3, 1, 8) for t in (scale, shift))
    expected = F.layer_norm(x, (8,), eps=1e-6) * (1 + next(each)) + next(each)
    torch.testing.assert_close(modulated_layer_norm(x, scale, shift), expected)


def test_is_adaptive_rms_norm_with_a_weight(device):
    x = torch.randn(3, 5, 8, dtype=torch.float64, device=device, requires_grad=True)
    scale, shift = (t.requires_grad_() for t in _samples(3, 8, device=device))
    w = torch.randn(8, dtype=torch.float64, device=device, requires_grad=True)
    ours = modulated_rms_norm(x, scale, shift, w)
    theirs = F.rms_norm(x, (8,), w, 1e-6) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sin().sum(), (x, scale, shift, w)),
        torch.autograd.grad(theirs.sin().sum(), (x, scale, shift, w)),
    )


@pytest.mark.parametrize("op", [modulated_rms_norm, modulated_layer_norm])
@pytest.mark.parametrize("samples", [0, 1, 2, 3])
def test_any_first_sizes_may_have_a_scale(op, samples, device):
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64, device=device)
    scale, shift = _samples(*x.shape[:samples], 8, device=device)
    every = (t.reshape(*x.shape[:samples], *[1] * (3 - samples), 8) for t in (scale, shift))
    every = [t.expand(x.shape) for t in every]
    torch.testing.assert_close(op(x, scale, shift), op(x, *every))


def test_without_a_modulation_it_is_the_norm(device):
    x = torch.randn(2, 3, 8, dtype=torch.float64, device=device)
    torch.testing.assert_close(modulated_layer_norm(x, torch.zeros_like(x[0, 0])),
                               F.layer_norm(x, (8,), eps=1e-6))  # fmt: skip
