"""The one-call losses of a linear head, functions and modules: equal to what they are made of."""

import pytest
import torch
import torch.nn.functional as F

import liger_fn.nn as lnn
from liger_fn.functional import preference

B, T, H, V = 3, 5, 4, 11
HEAD = {"softcap": 3.0, "logit_scale": 0.5, "temperature": 0.7, "chunk_size": 4}
# Sums of a few dozen numbers of size 1 in another order.
close = {"rtol": 1e-10, "atol": 1e-10}


class Batch:
    """Heads, hidden states and targets of 2B sequences, with what a model would compute of them."""

    def __init__(self, device):
        def draw(*shape):
            return torch.randn(*shape, dtype=torch.float64, device=device)

        self.weight, self.ref_weight = draw(V, H).requires_grad_(), draw(V, H)
        self.x, self.ref_x = draw(2 * B, T, H).requires_grad_(), draw(2 * B, T, H)
        self.bias = draw(V).requires_grad_()
        self.y = torch.randint(V, (2 * B, T), device=device)
        self.y[0, 3:] = self.y[4, 2:] = -100
        self.mask = self.y != -100
        self.wrt = self.weight, self.x, self.bias
        self.head = {"bias": self.bias, **HEAD}

    def log_softmax(self):
        z = F.linear(self.x, self.weight, self.bias) * 0.5
        return (3.0 * torch.tanh(z / 3.0) / 0.7).log_softmax(-1)

    def logps(self):
        picked = self.log_softmax().gather(-1, self.y.clamp(min=0)[..., None]).squeeze(-1)
        return picked * self.mask

    def ref_logps(self):
        z = F.linear(self.ref_x, self.ref_weight) * 0.5
        log_p = (3.0 * torch.tanh(z / 3.0) / 0.7).log_softmax(-1)
        return log_p.gather(-1, self.y.clamp(min=0)[..., None]).squeeze(-1) * self.mask

    def assert_same(self, ours, theirs, metrics_too=True):
        (loss, metrics), (expected, their_metrics) = ours, theirs
        torch.testing.assert_close(loss, expected, **close)
        got, wanted = (
            torch.autograd.grad(z, self.wrt, retain_graph=True) for z in (loss, expected)
        )
        torch.testing.assert_close(got, wanted, **close)
        for name, value in their_metrics.items():
            torch.testing.assert_close(metrics[name], value, **close)


@pytest.fixture
def batch(device):
    return Batch(device)


def test_dpo(batch):
    reference = {"ref_weight": batch.ref_weight, "ref_x": batch.ref_x}
    c, r = batch.logps().sum(-1).chunk(2)
    ref = batch.ref_logps().sum(-1)
    expected = preference.dpo_loss(c, r, *ref.chunk(2), beta=0.3)
    got = preference.fused_linear_dpo(
        batch.weight, batch.x, batch.y, beta=0.3, **reference, **batch.head
    )
    batch.assert_same(got, expected)
    given = preference.fused_linear_dpo(
        batch.weight, batch.x, batch.y, ref, beta=0.3, token_metrics=False, **batch.head
    )
    batch.assert_same(given, expected)
    assert set(got[1]) - set(given[1]) == {"entropy", "mean_token_accuracy"}


def test_dpo_knows_lengths_and_likelihood(batch):
    logps, ref = batch.logps(), batch.ref_logps()
    lengths = batch.mask.sum(-1).chunk(2)
    options = {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.2]}
    expected = preference.dpo_loss(
        *logps.sum(-1).chunk(2), *ref.sum(-1).chunk(2), chosen_lengths=lengths[0],
        rejected_lengths=lengths[1], nll=-logps[:B].sum() / batch.mask[:B].sum(), **options,
    )  # fmt: skip
    got = preference.fused_linear_dpo(
        batch.weight, batch.x, batch.y, ref.sum(-1), **options, **batch.head
    )
    batch.assert_same(got, expected)


def test_length_desensitized_dpo(batch):
    logps, ref = (
        preference.length_desensitized_logps(t, batch.mask, alpha=0.3)
        for t in (batch.logps(), batch.ref_logps())
    )
    expected = preference.dpo_loss(*logps.chunk(2), *ref.chunk(2))
    got = preference.fused_linear_dpo(
        batch.weight, batch.x, batch.y, ref_weight=batch.ref_weight, ref_x=batch.ref_x,
        ld_alpha=0.3, **batch.head,
    )  # fmt: skip
    batch.assert_same(got, expected)


def test_token_metrics_are_those_of_the_logits(batch):
    log_p = batch.log_softmax()
    _, metrics = preference.fused_linear_simpo(batch.weight, batch.x, batch.y, **batch.head)
    entropy = -(log_p.exp() * log_p).sum(-1)[batch.mask].mean()
    torch.testing.assert_close(metrics["entropy"], entropy.detach(), **close)
    hits = (log_p.argmax(-1) == batch.y)[:B][batch.mask[:B]].double().mean()
    torch.testing.assert_close(metrics["mean_token_accuracy"], hits, **close)


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo", "ipo"])
def test_cpo_counts_prompts_in_its_likelihood_alone(batch, loss_type):
    answers = batch.mask & (torch.arange(T, device=batch.y.device) > 0)
    logps = batch.logps()
    sums = (logps * answers).sum(-1)
    if loss_type != "sigmoid":
        sums = sums / answers.sum(-1)
    nll = -logps[:B].sum() / batch.mask[:B].sum()
    expected = preference.cpo_loss(*sums.chunk(2), nll, loss_type=loss_type, cpo_alpha=0.5)
    got = preference.fused_linear_cpo(
        batch.weight, batch.x, batch.y, answers, loss_type=loss_type, cpo_alpha=0.5, **batch.head
    )
    batch.assert_same(got, expected)


def test_orpo(batch):
    logps = batch.logps()
    averages = logps.sum(-1) / batch.mask.sum(-1)
    nll = -logps[:B].sum() / batch.mask[:B].sum()
    expected = preference.orpo_loss(*averages.chunk(2), nll, beta=0.2)
    got = preference.fused_linear_orpo(batch.weight, batch.x, batch.y, beta=0.2, **batch.head)
    batch.assert_same(got, expected)


def test_simpo(batch):
    averages = batch.logps().sum(-1) / batch.mask.sum(-1)
    expected = preference.simpo_loss(*averages.chunk(2), gamma=0.3)
    got = preference.fused_linear_simpo(batch.weight, batch.x, batch.y, gamma=0.3, **batch.head)
    batch.assert_same(got, expected)


@pytest.mark.parametrize("given", [True, False])
def test_kto(batch, given):
    labels = torch.tensor([True, False] * B, device=batch.y.device)
    ref = batch.ref_logps().sum(-1)
    expected = preference.kto_loss(batch.logps().sum(-1), ref, labels, 0.1, desirable_weight=2.0)
    reference = {"ref_logps": ref}
    if not given:
        reference = {"ref_weight": batch.ref_weight, "ref_x": batch.ref_x}
    got = preference.fused_linear_kto(
        batch.weight, batch.x, batch.y, labels, 0.1, desirable_weight=2.0, **reference,
        **batch.head,
    )  # fmt: skip
    batch.assert_same(got, expected)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo"])
def test_grpo(batch, loss_type):
    log_p = batch.log_softmax()
    entropies = -(log_p.exp() * log_p).sum(-1)
    logps = batch.logps()
    advantages = torch.randn(2 * B, dtype=torch.float64, device=batch.y.device)
    answers = batch.mask & (torch.arange(T, device=batch.y.device) > 0)
    options = {
        "old_logps": logps.detach() + 0.1 * torch.randn_like(logps),
        "loss_type": loss_type,
        "beta": 0.1,
        "entropy_coef": 0.05,
    }
    expected = preference.grpo_loss(
        logps, advantages, answers, ref_logps=batch.ref_logps(), entropies=entropies, **options
    )
    got = preference.fused_linear_grpo(
        batch.weight, batch.x, batch.y, advantages, answers, ref_weight=batch.ref_weight,
        ref_x=batch.ref_x, **options, **batch.head,
    )  # fmt: skip
    batch.assert_same(got, expected)


def test_references_get_no_gradient(batch):
    ref_weight = batch.ref_weight.clone().requires_grad_()
    loss, _ = preference.fused_linear_dpo(
        batch.weight, batch.x, batch.y, ref_weight=ref_weight, ref_x=batch.ref_x
    )
    loss.backward()
    assert ref_weight.grad is None
    assert batch.weight.grad is not None


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda b: preference.fused_linear_dpo(b.weight, b.x, b.y),
            "fused_linear_dpo: `ref_weight` must be given, or ref_logps; got None.",
        ),
        (
            lambda b: preference.fused_linear_orpo(b.weight, b.x[:3], b.y[:3]),
            "fused_linear_orpo: `y` must have 2B sequences, the chosen and then the rejected; "
            "got 3.",
        ),
        (
            lambda b: preference.fused_linear_simpo(b.weight, b.x[0], b.y[0]),
            "`y` must have shape (B, T), sequences of tokens; got (5,).",
        ),
        (
            lambda b: preference.fused_linear_cpo(b.weight, b.x, b.y, b.mask[:, 1:]),
            "`mask` must have shape (6, 5), that of `y`; got (6, 4).",
        ),
    ],
)
def test_refusals(batch, call, sentence):
    with pytest.raises(ValueError) as error:
        call(batch)
    assert sentence in str(error.value)


def test_modules_are_their_functions(batch):
    labels = torch.tensor([True, False] * B, device=batch.y.device)
    advantages = torch.randn(2 * B, dtype=torch.float64, device=batch.y.device)
    ref = batch.ref_logps()
    calls = {
        "DPO": ({"beta": 0.2, "loss_type": "hinge"}, (ref.sum(-1),), {}),
        "ORPO": ({"beta": 0.2}, (), {}),
        "CPO": ({"loss_type": "simpo"}, (batch.mask,), {}),
        "SimPO": ({"gamma": 0.1}, (), {}),
        "KTO": ({"desirable_weight": 2.0}, (labels, 0.1, ref.sum(-1)), {}),
        "GRPO": ({"loss_type": "grpo", "beta": 0.1}, (advantages,), {"ref_logps": ref}),
    }
    for name, (options, tensors, named) in calls.items():
        module = getattr(lnn, f"FusedLinear{name}Loss")(**options, **HEAD)
        function = getattr(preference, f"fused_linear_{name.lower()}")
        arguments = (batch.weight, batch.x, batch.y, *tensors)
        got = module(*arguments, bias=batch.bias, **named)
        expected = function(*arguments, bias=batch.bias, **named, **options, **HEAD)
        batch.assert_same(got, expected)
        assert not list(module.parameters())


def test_modules_refuse_options_that_nobody_reads():
    with pytest.raises(TypeError, match="FusedLinearKTOLoss: `gamma` must be one of beta, "):
        lnn.FusedLinearKTOLoss(gamma=0.5)
    assert "beta=0.3, softcap=30.0" in repr(lnn.FusedLinearDPOLoss(beta=0.3, softcap=30.0))
