"""Targets of 8 bits: uint8 has no -100, and 156 is a class like any other."""

import pytest
import torch

from liger_fn import functional as LF

V, N, H = 200, 4, 8


def distances(logits, target):
    return LF.jsd(logits.log_softmax(-1), logits.flip(-1).log_softmax(-1), labels=target)


def heads(op, **options):
    weight, x = torch.randn(V, H), torch.randn(N, H)
    return lambda device, target: op(weight.to(device), x.to(device), target, **options)


OPS = {
    "cross_entropy": lambda device, t: LF.cross_entropy(torch.randn(N, V).to(device), t),
    "logprobs": lambda device, t: LF.logprobs(torch.randn(N, V).to(device), t),
    "jsd": lambda device, t: distances(torch.randn(N, V).to(device), t),
    "fused_linear_cross_entropy": heads(LF.fused_linear_cross_entropy),
    "of the valid rows": heads(LF.fused_linear_cross_entropy, max_valid=N - 1),
    "fused_linear_logprobs": heads(LF.fused_linear_logprobs),
    "fused_linear_selected_logprobs": lambda device, t: heads(LF.fused_linear_selected_logprobs)(
        device, t[:, None]
    ),
    "fused_linear_jsd": lambda device, t: LF.fused_linear_jsd(
        *(torch.randn(n, H).to(device) for n in (V, N, V, N)), t, hard_weight=1.0
    ),
}


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize("name", OPS)
def test_class_156_counts(device, name, backend):
    target = torch.tensor([156, 3, 156, 7])
    with LF.using(backend):
        answers = []
        for dtype in (torch.uint8, torch.int64):
            torch.manual_seed(0)
            answers.append(OPS[name](device, target.to(device, dtype)))
    torch.testing.assert_close(*answers, equal_nan=True)
