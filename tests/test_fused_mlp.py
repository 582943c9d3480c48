"""Facts of fused_mlp: Hugging Face's answers, what is kept, and how many products there are."""

import pytest
import torch
from transformers import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3MLP

import liger_fn.nn as lnn
from liger_fn.functional import fused_mlp, using

T, D, F = 5, 8, 6


@pytest.fixture(params=["kernels", "reference"], autouse=True)
def backend(request):
    with using(request.param):
        yield


@pytest.mark.parametrize("recompute", [False, True])
def test_is_hugging_faces(recompute, device):
    config = Phi3Config(hidden_size=D, intermediate_size=F, pad_token_id=0)
    theirs = Phi3MLP(config).to(device, torch.float64)
    ours = lnn.FusedMLP(D, F, recompute=recompute, device=device, dtype=torch.float64)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, T, D, dtype=torch.float64, device=device, requires_grad=True)
    got, want = ours(x), theirs(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.sin().sum(), (x, *ours.parameters())),
        torch.autograd.grad(want.sin().sum(), (x, *theirs.parameters())),
    )


def test_two_matrices_of_llama_load_as_one(device):
    apart = lnn.SwiGLUMLP(D, F, bias=True, device=device, dtype=torch.float64)
    packed = lnn.FusedMLP(D, F, bias=True, device=device, dtype=torch.float64)
    state = apart.state_dict()
    packed.load_state_dict(
        {
            f"{to}.{kind}": torch.cat([state[f"{name}.{kind}"] for name in of])
            for to, of in {
                "gate_up_proj": ("gate_proj", "up_proj"),
                "down_proj": ("down_proj",),
            }.items()
            for kind in ("weight", "bias")
        }
    )
    x = torch.randn(T, D, dtype=torch.float64, device=device)
    torch.testing.assert_close(packed(x), apart(x))
    assert "recompute=True" in repr(packed)


def arguments(device):
    sizes = {"x": (T, D), "gate_up": (2 * F, D), "down": (D, F)}
    return {n: torch.randn(s, device=device, requires_grad=True) for n, s in sizes.items()}


@pytest.mark.parametrize(("recompute", "numbers"), [(True, 2 * F), (False, 3 * F)])
def test_what_is_kept_of_a_token(recompute, numbers, device):
    kept = []

    def pack(t):
        kept.append(t)
        return t

    given = arguments(device)
    with using("kernels"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fused_mlp(**given, recompute=recompute)
    own = [t for t in kept if all(t is not leaf for leaf in given.values())]
    assert sum(t.numel() for t in own) == T * numbers


@pytest.mark.parametrize(
    ("wanted", "products"),
    [(("x", "gate_up", "down"), 4), (("x",), 2), (("gate_up",), 2), (("down",), 1)],
)
def test_as_many_products_backward_as_gradients_need(wanted, products, device, monkeypatch):
    given, counted, mm = arguments(device), [], torch.Tensor.mm

    def counting(a, b):
        counted.append((a.shape, b.shape))
        return mm(a, b)

    with using("kernels"):
        y = fused_mlp(**{n: t.requires_grad_(n in wanted) for n, t in given.items()})
        monkeypatch.setattr(torch.Tensor, "mm", counting)
        torch.autograd.grad(y.sum(), [given[n] for n in wanted])
    assert len(counted) == products
