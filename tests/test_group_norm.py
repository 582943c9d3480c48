"""Facts about group_norm that can be checked by hand or against PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from liger_fn.functional import group_norm


def test_by_hand(device):
    # Two groups of two channels: means 2 and 0, deviations 1 and 3.
    x = torch.tensor([[[1.0], [3.0], [-3.0], [3.0]]], dtype=torch.float64, device=device)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64, device=device)
    y = group_norm(x, 2, weight, torch.ones_like(weight), eps=0.0)
    assert y.flatten().tolist() == pytest.approx([0.0, 3.0, -2.0, 5.0])


@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 5), (3, 6, 4, 5), (2, 6, 3, 2, 4)])
def test_is_torchs(shape, device):
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    w, b = torch.randn(2, 6, dtype=torch.float64, device=device).requires_grad_()
    ours, theirs = group_norm(x, 3, w, b), F.group_norm(x, 3, w, b)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sin().sum(), (x, w, b)),
        torch.autograd.grad(theirs.sin().sum(), (x, w, b)),
    )


def test_far_from_zero_nothing_cancels(device):
    """The peer, which takes E[x²] − E[x]², is off by a thousand here."""
    x = torch.randn(2, 4, 100, device=device) + 3000.0
    exact = F.group_norm(x.double(), 2)
    # Rounding x − mean costs an ulp of 1; rounding the mean would cost half an ulp of 3000, 1e-4.
    torch.testing.assert_close(group_norm(x, 2).double(), exact, rtol=0, atol=2e-6)


def test_a_transposed_batch_is_not_copied(device, monkeypatch):
    from liger_fn.functional.norm import group_norm as room

    passed = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: passed.append(args[0])

    monkeypatch.setattr(room, "_group_norm_fwd_kernel", Kernel())
    x = torch.randn(4, 3, 2, 5, device=device).transpose(0, 1)
    group_norm(x, 2)
    assert passed[0].data_ptr() == x.data_ptr()
