"""The losses of log-probabilities: TRL's trainers give the answers, or the papers' formulas do."""

import collections
import importlib
import inspect
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from liger_fn.functional import preference
from liger_fn.functional.preference import dpo, grpo
from liger_fn.testing.properties.words import SECTIONS

B, T = 4, 7
# Sums of a few dozen numbers of size 1 to 100 in another order.
close = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """Trainers make constants of the default dtype, and turn to it by `.float()`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    yield
    torch.set_default_dtype(before)


def trl(name: str):
    """A module of TRL, as its trainers are since 1.16."""
    pytest.importorskip("trl", minversion="1.16", reason="the peer is not installed")
    return importlib.import_module(name)


def draw_logps(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return -scale * torch.rand(*shape).exp().sub(1.0).add(0.01)


def draw_mask(*shape: int) -> torch.Tensor:
    """Prefixes of different lengths, none of them empty."""
    lengths = torch.randint(1, shape[-1] + 1, shape[:-1])
    lengths[0] = shape[-1]
    return (torch.arange(shape[-1]) < lengths[..., None]).long()


class Accelerator(SimpleNamespace):
    """One process."""

    device = torch.device("cpu")
    num_processes = 1
    sync_gradients = True

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction):
        return x

    def pad_across_processes(self, x, dim, pad_index):
        return x


def stand_in(**attributes):
    """What a trainer's loss reads of its trainer."""
    modes = {"train": collections.defaultdict(list), "eval": collections.defaultdict(list)}
    model = SimpleNamespace(training=True)
    return SimpleNamespace(
        accelerator=Accelerator(),
        model=model,
        _metrics=modes,
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def logged(trainer) -> dict:
    return {name: values[-1] for name, values in trainer._metrics["train"].items()}


def assert_same(ours, theirs, wrt, metrics, their_metrics) -> None:
    """Losses, gradients, and every metric that both report."""
    torch.testing.assert_close(ours, theirs.to(ours.dtype), **close)
    gradients = (torch.autograd.grad(loss, wrt, retain_graph=True) for loss in (ours, theirs))
    torch.testing.assert_close(*gradients, **close)
    shared = set(metrics) & set(their_metrics)
    for name in shared:
        assert not metrics[name].requires_grad
        theirs = torch.tensor(float(their_metrics[name]))
        torch.testing.assert_close(
            metrics[name], theirs, equal_nan=True, **close, msg=lambda m, n=name: f"{n}: {m}"
        )
    missing = set(metrics) - shared
    assert not missing, f"TRL logs no {missing}"


# DPO


def dpo_batch():
    logps = draw_logps(2 * B, T).requires_grad_()
    return logps, draw_mask(2 * B, T), draw_logps(2 * B, T).sum(-1)


def trl_dpo(logps, mask, ref, **options):
    """The trainer's loss and metrics for log-probabilities (2B, T) and reference sums (2B,)."""
    trainer_class = trl("trl.trainer.dpo_trainer").DPOTrainer
    settings = {
        "beta": 0.1,
        "loss_types": ["sigmoid"],
        "loss_weights": None,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
        **options,
    }
    if settings["loss_weights"] is None:
        settings["loss_weights"] = [1.0] * len(settings["loss_types"])
    trainer = stand_in(
        precompute_ref_logps=True, args=SimpleNamespace(discopop_tau=0.05), **settings
    )
    ref_chosen, ref_rejected = ref.chunk(2)
    counts = mask.bool()
    outputs = SimpleNamespace(
        log_probs=logps.masked_fill(~counts, 0.0),
        entropy=torch.zeros(2 * B, T),
        mean_logits=torch.zeros(2 * B, T),
        is_top1=torch.zeros(2 * B, T, dtype=torch.bool),
        log_sum_sq_probs=LOG_SUM_SQ,
    )
    # The first token, which nothing predicts, belongs to the prompt.
    inputs = {
        "input_ids": torch.zeros(2 * B, T + 1, dtype=torch.long),
        "attention_mask": torch.ones(2 * B, T + 1, dtype=torch.long),
        "completion_mask": F.pad(mask, (1, 0)),
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    loss = trainer_class._compute_loss(trainer, lambda **_: outputs, inputs, False)
    metrics = logged(trainer)
    return loss, metrics


LOG_SUM_SQ = -torch.rand(2 * B, T, generator=torch.Generator().manual_seed(3)).double()


def our_dpo(logps, mask, ref, **options):
    chosen, rejected = preference.sequence_logps(logps, mask).chunk(2)
    chosen_lengths, rejected_lengths = mask.sum(-1).chunk(2)
    return preference.dpo_loss(
        chosen,
        rejected,
        *ref.chunk(2),
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        nll=preference.nll_loss(logps[:B], mask[:B]),
        **options,
    )


SMOOTHED = {"robust": 0.1, "exo_pair": 0.1, "aot": 0.2, "aot_unpaired": 0.2}


@pytest.mark.parametrize("loss_type", sorted(set(dpo.LOSSES) - {"cdpo"}))
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_every_dpo_is_trls(loss_type, beta):
    logps, mask, ref = dpo_batch()
    epsilon = SMOOTHED.get(loss_type, 0.0)
    theirs, their_metrics = trl_dpo(
        logps, mask, ref, loss_types=[loss_type], beta=beta, label_smoothing=epsilon
    )
    loss, metrics = our_dpo(
        logps, mask, ref, loss_type=loss_type, beta=beta, label_smoothing=epsilon
    )
    assert_same(loss, theirs, logps, metrics, their_metrics)


def test_a_weighted_sum_of_dpos_is_trls():
    logps, mask, ref = dpo_batch()
    types, weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]
    theirs, their_metrics = trl_dpo(logps, mask, ref, loss_types=types, loss_weights=weights)
    loss, metrics = our_dpo(logps, mask, ref, loss_type=types, loss_weights=weights)
    assert_same(loss, theirs, logps, metrics, their_metrics)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "discopop", "sigmoid_norm"])
def test_every_divergence_of_dpo_is_trls(divergence, loss_type):
    logps, mask, ref = dpo_batch()
    theirs, their_metrics = trl_dpo(
        logps, mask, ref, loss_types=[loss_type], f_divergence_type=divergence
    )
    loss, metrics = our_dpo(logps, mask, ref, loss_type=loss_type, f_divergence_type=divergence)
    assert_same(loss, theirs, logps, metrics, their_metrics)


@pytest.mark.parametrize("alpha", [-1.0, 0.5, 1.0, 2.0])
def test_the_alpha_divergence_of_dpo(alpha):
    """TRL has no float64 for it."""
    c, r, ref_c, ref_r = draw_logps(4, B, scale=3.0)
    loss, _ = preference.dpo_loss(
        c, r, ref_c, ref_r, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha
    )

    def score(u):
        t = u.exp()
        return u if alpha == 1 else (t ** (alpha - 1) - 1) / (alpha - 1)

    expected = -F.logsigmoid(0.1 * (score(c - ref_c) - score(r - ref_r))).mean()
    torch.testing.assert_close(loss, expected, **close)


def test_length_desensitized_dpo_is_trls():
    logps, mask, _ = dpo_batch()
    ref = torch.zeros(2 * B)
    theirs, _ = trl_dpo(logps, mask, ref, ld_alpha=0.3)
    each = preference.length_desensitized_logps(logps, mask, alpha=0.3)
    loss, _ = preference.dpo_loss(*each.chunk(2), *ref.chunk(2))
    torch.testing.assert_close(loss, theirs, **close)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logps), torch.autograd.grad(theirs, logps), **close
    )


def test_weighted_preference_optimisation_is_trls():
    logps, mask, ref = dpo_batch()
    theirs, their_metrics = trl_dpo(logps, mask, ref, use_weighting=True)
    chosen, rejected = preference.wpo_weights(logps, LOG_SUM_SQ, mask).chunk(2)
    loss, metrics = our_dpo(logps, mask, ref, weights=chosen * rejected)
    assert_same(loss, theirs, logps, metrics, their_metrics)


def test_conservative_dpo_by_its_formula():
    c, r, ref_c, ref_r = draw_logps(4, B)
    loss, _ = preference.dpo_loss(c, r, ref_c, ref_r, loss_type="cdpo", label_smoothing=0.2)
    margin = 0.1 * (c - ref_c - r + ref_r)
    expected = 0.8 * torch.log1p(torch.exp(-margin)) + 0.2 * torch.log1p(torch.exp(margin))
    torch.testing.assert_close(loss, expected.mean(), **close)


def test_dpo_starts_at_log_2():
    c, r = draw_logps(2, B)
    assert preference.dpo_loss(c, r, c, r)[0].item() == pytest.approx(math.log(2.0))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loss_type": "dpo"}, "dpo_loss: `loss_type` must be one of"),
        ({"beta": 0.0}, "dpo_loss: `beta` must be positive; got 0.0."),
        ({"label_smoothing": 0.1}, "`label_smoothing` must be 0 for sigmoid; got 0.1."),
        ({"loss_type": "exo_pair"}, "`label_smoothing` must be above 0 for exo_pair"),
        (
            {"loss_type": "robust", "label_smoothing": 0.5},
            "`label_smoothing` must be in [0, 0.5); got 0.5.",
        ),
        ({"loss_type": "ipo"}, "`chosen_lengths` must be the number of tokens for ipo"),
        ({"loss_type": "sft"}, "`nll` must be a scalar for sft; got None."),
        ({"loss_weights": [1.0, 2.0]}, "`loss_weights` must have one weight for each of 1; got 2."),
        ({"reduction": "average"}, "`reduction` must be one of 'none', 'mean', 'sum'"),
        ({"weights": torch.ones(3)}, "`weights` must have shape (4,), that of `chosen_logps`"),
    ],
)
def test_dpo_refuses(options, sentence):
    with pytest.raises(ValueError) as error:
        preference.dpo_loss(*draw_logps(4, B), **options)
    assert sentence in str(error.value)


# Without a reference


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo"])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_every_cpo_is_trls(loss_type, alpha):
    cpo_trainer = trl("trl.experimental.cpo.cpo_trainer").CPOTrainer
    c, r = (t.requires_grad_() for t in (draw_logps(B), draw_logps(B)))
    nll = torch.rand(()).requires_grad_()
    epsilon = 0.1 if loss_type in ("sigmoid", "simpo") else 0.0
    trainer = stand_in(
        beta=0.2, loss_type=loss_type, label_smoothing=epsilon, simpo_gamma=0.5, alpha=alpha,
        cpo_alpha=0.7, concatenated_forward=lambda *_: (c, r, torch.zeros(1), torch.zeros(1), nll),
    )  # fmt: skip
    trainer.cpo_loss = lambda *logps: cpo_trainer.cpo_loss(trainer, *logps)
    theirs, their_metrics = cpo_trainer.get_batch_loss_metrics(trainer, None, {})
    loss, metrics = preference.cpo_loss(
        c, r, nll, beta=0.2, loss_type=loss_type, label_smoothing=epsilon, alpha=alpha,
        cpo_alpha=0.7,
    )  # fmt: skip
    assert_same(loss, theirs, (c, r, nll), metrics, their_metrics)
    if loss_type == "simpo":
        ours, _ = preference.simpo_loss(c, r, nll, beta=0.2, label_smoothing=epsilon, alpha=alpha,
                                        nll_weight=0.7)  # fmt: skip
        torch.testing.assert_close(ours, loss, **close)


def test_simpo_by_its_formula():
    logps, mask = draw_logps(2 * B, T), draw_mask(2 * B, T)
    c, r = ((logps * mask).sum(-1) / mask.sum(-1)).chunk(2)
    averages = preference.sequence_logps(logps, mask, average=True).chunk(2)
    loss, _ = preference.simpo_loss(*averages, beta=2.0, gamma=1.2)
    torch.testing.assert_close(loss, -torch.sigmoid(2.0 * (c - r) - 1.2).log().mean(), **close)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "tpo-l"])
def test_every_tpo_is_trls(loss_type):
    tpo_trainer = trl("trl.experimental.tpo.tpo_trainer").TPOTrainer
    logits = torch.randn(3 * B, T + 1, 9).requires_grad_()
    input_ids, mask = torch.randint(9, (3 * B, T + 1)), draw_mask(3 * B, T)
    trainer = stand_in(
        beta=0.2, loss_type=loss_type, label_smoothing=0.0, tpo_alpha=0.7, tpo_l_gamma=0.5
    )
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "completion_mask": F.pad(mask, (1, 0)),
    }
    outputs = SimpleNamespace(logits=logits)
    theirs = tpo_trainer._compute_loss(trainer, lambda **_: outputs, inputs, False)

    from liger_fn.functional import logprobs

    logps = logprobs(logits[:, :-1], input_ids[:, 1:])
    average = loss_type in ("ipo", "tpo-l")
    c, r, _ = preference.sequence_logps(logps, mask, average=average).chunk(3)
    loss, metrics = preference.cpo_loss(
        c, r, preference.nll_loss(logps[2 * B :], mask[2 * B :]), beta=0.2,
        loss_type="simpo" if loss_type == "tpo-l" else loss_type, cpo_alpha=0.7,
    )  # fmt: skip
    # TPO's likelihood term is not logged by itself.
    del metrics["nll_loss"]
    assert_same(loss, theirs, logits, metrics, logged(trainer))


def test_orpo_is_trls():
    orpo_trainer = trl("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    # On both sides of log ½, where the form of log(1 − e^x) changes.
    c = torch.tensor([-0.01, -0.5, -0.8, -5.0]).requires_grad_()
    r = torch.tensor([-0.9, -3.0, -0.2, -40.0]).requires_grad_()
    nll = torch.rand(()).requires_grad_()
    trainer = stand_in(
        beta=0.1, concatenated_forward=lambda *_: (c, r, torch.zeros(1), torch.zeros(1), nll)
    )
    trainer.odds_ratio_loss = lambda *logps: orpo_trainer.odds_ratio_loss(trainer, *logps)
    theirs, their_metrics = orpo_trainer.get_batch_loss_metrics(trainer, None, {})
    loss, metrics = preference.orpo_loss(c, r, nll)
    assert_same(loss, theirs, (c, r, nll), metrics, their_metrics)


def test_orpo_near_certainty_has_a_gradient():
    """Where e^x rounds to 1, one of the two forms of log(1 − e^x) has none."""
    c = torch.tensor([-1e-9], dtype=torch.float32, requires_grad=True)
    loss, _ = preference.orpo_loss(c, torch.tensor([-1.0], dtype=torch.float32))
    loss.backward()
    assert c.grad.isfinite().all()


# KTO


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("labels", [[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
def test_every_kto_is_trls(loss_type, labels):
    kto_trainer = trl("trl.trainer.kto_trainer").KTOTrainer
    logps, mask = draw_logps(B, T).requires_grad_(), draw_mask(B, T)
    ref, kl_logps, ref_kl_logps = draw_logps(B, T).sum(-1), draw_logps(B), draw_logps(B, scale=2.0)
    labels = torch.tensor(labels, dtype=torch.bool)
    trainer = stand_in(
        beta=0.2, loss_type=loss_type, desirable_weight=1.3, undesirable_weight=0.6,
        precompute_ref_logps=True, calculate_KL=loss_type == "kto",
        _compute_kl_logps=lambda *_: kl_logps,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(B, T + 1, dtype=torch.long),
        "attention_mask": torch.ones(B, T + 1, dtype=torch.long),
        "completion_mask": F.pad(mask, (1, 0)),
        "label": labels,
        "ref_logps": ref,
        "ref_KL_logps": ref_kl_logps,
    }
    outputs = SimpleNamespace(
        log_probs=logps.masked_fill(mask == 0, 0.0),
        entropy=torch.zeros(B, T),
        mean_logits=torch.zeros(B, T),
    )
    theirs = kto_trainer._compute_loss(trainer, lambda **_: outputs, inputs, False)

    kl = preference.kto_kl(kl_logps, ref_kl_logps) if loss_type == "kto" else 0.0
    loss, metrics = preference.kto_loss(
        preference.sequence_logps(logps, mask), ref, labels, kl, beta=0.2, loss_type=loss_type,
        desirable_weight=1.3, undesirable_weight=0.6,
    )  # fmt: skip
    # Of answers that are not there TRL logs nothing; we say NaN.
    metrics = {name: value for name, value in metrics.items() if not value.isnan()}
    assert_same(loss, theirs, logps, metrics, logged(trainer))


def test_kto_takes_one_kl_per_answer():
    """Each answer is held against its own: nothing is broadcast to (B, B)."""
    logps, ref, kl = draw_logps(B), draw_logps(B), torch.rand(B)
    labels = torch.tensor([True, False, True, False])
    each = [
        preference.kto_loss(logps[i : i + 1], ref[i : i + 1], labels[i : i + 1], kl[i])[0]
        for i in range(B)
    ]
    loss, _ = preference.kto_loss(logps, ref, labels, kl)
    torch.testing.assert_close(loss, torch.stack(each).mean(), **close)
    ratios = logps - ref
    good, bad = (1 - torch.sigmoid(0.1 * s * (ratios - kl)) for s in (1, -1))
    torch.testing.assert_close(loss, torch.where(labels, good, bad).mean(), **close)
    with pytest.raises(ValueError, match="`kl` must have shape"):
        preference.kto_loss(logps, ref, labels, kl[:, None])


# GRPO and kin


def grpo_batch():
    logps = draw_logps(B, T).requires_grad_()
    old, ref = (logps.detach() + 0.5 * torch.randn(B, T) for _ in range(2))
    return logps, old, ref, torch.randn(B), draw_mask(B, T)


def trl_grpo(trainer_class, logps, old, ref, advantages, mask, entropies, **options):
    """The trainer's loss and metrics; it reads masked positions, and all are finite here."""
    arguments = {
        "delta": None,
        "use_bias_correction_kl": True,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
        "steps_per_generation": 1,
    }
    settings = {
        "beta": 0.0,
        "loss_type": "dapo",
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "max_completion_length": 11,
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
    }
    extra = {k: v for k, v in options.items() if isinstance(v, torch.Tensor)}
    arguments |= {k: v for k, v in options.items() if k in arguments}
    settings |= {k: v for k, v in options.items() if k in settings}
    trainer = stand_in(
        args=SimpleNamespace(**arguments),
        _entropy_bonus_enabled=settings["entropy_coef"] > 0,
        **settings,
    )
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, entropies, None)
    for name in ("get_off_policy_mask", "get_gamma_weights"):
        setattr(trainer, name, getattr(trainer_class, name))
    trainer.get_high_entropy_mask = lambda *a: trainer_class.get_high_entropy_mask(trainer, *a)
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.long),
        "prompt_mask": torch.ones(B, 1, dtype=torch.long),
        "completion_ids": torch.zeros(B, T, dtype=torch.long),
        "completion_mask": mask,
        "advantages": advantages,
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        **extra,
    }
    inputs = {name: value for name, value in inputs.items() if value is not None}
    return trainer_class._compute_loss(trainer, None, inputs), logged(trainer)


def compare_grpo(batch, entropies=None, trainer: str = "", **options):
    grpo_trainer = trl("trl.trainer.grpo_trainer").GRPOTrainer
    if trainer:
        grpo_trainer = trl("trl.experimental.gmpo.gmpo_trainer").GMPOTrainer
    logps, old, ref, advantages, mask = batch
    given = torch.rand(B, T) if entropies is None else entropies
    theirs, their_metrics = trl_grpo(grpo_trainer, *batch, given, **options)
    renamed = {"sampling_per_token_logps": "sampling_logps", "epsilon_low": "epsilon"}
    ours = {renamed.get(k, k): v for k, v in options.items() if k != "use_vllm"}
    if trainer:
        ours["loss_type"] = "gmpo"
    loss, metrics = preference.grpo_loss(
        logps, advantages, mask, old_logps=old, ref_logps=ref, entropies=given,
        max_completion_length=11, **ours,
    )  # fmt: skip
    if "policy_loss" not in their_metrics:
        # TRL logs it where there is an entropy term.
        del metrics["policy_loss"]
    assert_same(loss, theirs, logps, metrics, their_metrics)


TRLS = sorted(set(grpo.LOSSES) - {"gmpo"})


@pytest.mark.parametrize("loss_type", TRLS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_every_grpo_is_trls(loss_type, level, beta):
    compare_grpo(grpo_batch(), loss_type=loss_type, importance_sampling_level=level, beta=beta)


@pytest.mark.parametrize("loss_type", TRLS)
@pytest.mark.parametrize(
    "options",
    [
        {"epsilon_low": 0.1, "epsilon_high": 0.28},
        {"delta": 1.1},
        {"beta": 0.3, "use_bias_correction_kl": False},
        {"off_policy_mask_threshold": 0.05},
        {"top_entropy_quantile": 0.4},
        {"sapo_temperature_pos": 0.8, "sapo_temperature_neg": 2.0},
        {"vespo_k_pos": 1.0, "vespo_lambda_neg": 3.0},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_option_of_grpo_is_trls(loss_type, options):
    compare_grpo(grpo_batch(), loss_type=loss_type, **options)


@pytest.mark.parametrize("loss_type", TRLS)
@pytest.mark.parametrize("per", ["token", "answer"])
def test_ratios_of_another_sampler_are_trls(loss_type, per):
    """VESPO too, which takes them into the weight of the whole answer."""
    batch = grpo_batch()
    ratio = torch.rand(B, T if per == "token" else 1) + 0.5
    if per == "token":
        ratio = ratio.masked_fill(batch[-1] == 0, 1.0)
    compare_grpo(batch, loss_type=loss_type, use_vllm=True, importance_sampling_ratio=ratio)


@pytest.mark.parametrize("loss_type", TRLS)
def test_entropy_terms_are_trls(loss_type):
    logps, old, ref, advantages, mask = grpo_batch()
    entropies = logps.square() + 0.1
    compare_grpo(
        (logps, old, ref, advantages, mask), entropies, loss_type=loss_type, entropy_coef=0.02,
        top_entropy_quantile=0.5,
    )  # fmt: skip


def test_off_policy_masks_take_the_samplers_log_probabilities():
    batch = grpo_batch()
    compare_grpo(batch, off_policy_mask_threshold=0.05, sampling_per_token_logps=batch[1] + 0.2)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_advantages_by_token_are_trls(level):
    logps, old, ref, _, mask = grpo_batch()
    batch = logps, old, ref, torch.randn(B, T), mask
    compare_grpo(batch, loss_type="bnpo", importance_sampling_level=level)


def test_on_policy_answers_need_no_old_log_probabilities():
    logps, _, ref, advantages, mask = grpo_batch()
    compare_grpo((logps, None, ref, advantages, mask), loss_type="grpo", beta=0.1)


@pytest.mark.parametrize(
    "options", [{}, {"beta": 0.3}, {"epsilon_low": 0.4, "epsilon_high": 0.3},
                {"top_entropy_quantile": 0.5}], ids=lambda options: "-".join(options) or "plain"
)  # fmt: skip
def test_gmpo_is_trls(options):
    compare_grpo(grpo_batch(), trainer="gmpo", **options)


def test_num_items_normalise_a_whole_step():
    """Two halves of a batch, each divided by the tokens of both, are the batch."""
    logps, old, _, advantages, mask = grpo_batch()

    def of(rows):
        return preference.grpo_loss(
            logps[rows], advantages[rows], mask[rows], old_logps=old[rows], num_items=mask.sum()
        )[0]

    whole = of(slice(None))
    torch.testing.assert_close(of(slice(0, 2)) + of(slice(2, None)), whole, **close)


def test_luspo_with_padding_by_its_formula():
    """The ratio of an answer counts once for each of its tokens, not once for each of T."""
    logps, old, _, advantages, mask = grpo_batch()
    loss, _ = preference.grpo_loss(
        logps, advantages, mask, old_logps=old, loss_type="luspo",
        importance_sampling_level="sequence",
    )  # fmt: skip
    expected = []
    for i in range(B):
        n = int(mask[i].sum())
        s = torch.exp((logps - old)[i, :n].mean())
        clipped = min(max(s, torch.tensor(0.8)), torch.tensor(1.2))
        expected.append(-n * min(s * advantages[i], clipped * advantages[i]))
    torch.testing.assert_close(loss, torch.stack(expected).mean(), **close)


def test_vespo_with_a_samplers_ratio_by_its_formula():
    logps, old, _, advantages, mask = grpo_batch()
    ratio = torch.rand(B, T) + 0.5
    loss, _ = preference.grpo_loss(
        logps, advantages, mask, old_logps=old, loss_type="vespo",
        importance_sampling_ratio=ratio,
    )  # fmt: skip
    total = 0.0
    for i in range(B):
        n = int(mask[i].sum())
        w = math.exp((logps.detach() - old)[i, :n].sum()) * float(ratio[i, :n].prod())
        k, rate = (2.0, 3.0) if advantages[i] >= 0 else (3.0, 2.0)
        phi = math.exp(rate) * w**k * math.exp(-rate * w)
        total = total - phi * advantages[i] * logps[i, :n].sum()
    torch.testing.assert_close(loss, total / mask.sum(), **close)


@pytest.mark.parametrize("loss_type", grpo.LOSSES)
def test_what_is_masked_has_no_influence(loss_type):
    logps, old, ref, advantages, mask = grpo_batch()

    def answers(elsewhere):
        def put(x):
            return x.detach().masked_fill(mask == 0, elsewhere).requires_grad_()

        leaf = put(logps)
        loss, metrics = preference.grpo_loss(
            leaf, advantages, mask.bool(), old_logps=put(old), ref_logps=put(ref), beta=0.1,
            loss_type=loss_type, importance_sampling_ratio=put(torch.exp(old)).detach(),
            entropies=put(old), sampling_logps=put(old), off_policy_mask_threshold=0.1,
            top_entropy_quantile=0.5, max_completion_length=T,
        )  # fmt: skip
        return loss, torch.autograd.grad(loss, leaf), metrics

    torch.testing.assert_close(answers(math.nan), answers(0.0))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loss_type": "gspo"}, "grpo_loss: `loss_type` must be one of"),
        ({"importance_sampling_level": "answer"}, "must be one of 'token', 'sequence'"),
        ({"beta": 0.1}, "`ref_logps` must be given for beta; got None."),
        ({"entropy_coef": 0.1}, "`entropies` must be given for entropy_coef; got None."),
        ({"top_entropy_quantile": 0.5}, "`entropies` must be given for top_entropy_quantile"),
        ({"loss_type": "dr_grpo"}, "`max_completion_length` must be given for constant"),
        ({"normalization": "batch"}, "`normalization` must be one of"),
        ({"old_logps": torch.zeros(B, 2)}, "`mask` must have shape (4, 2), that of `old_logps`"),
        (
            {"importance_sampling_ratio": torch.ones(B)},
            "`importance_sampling_ratio` must have shape (4, 7) or (4, 1); got (4,).",
        ),
    ],
)
def test_grpo_refuses(options, sentence):
    logps, _, _, advantages, mask = grpo_batch()
    with pytest.raises(ValueError) as error:
        preference.grpo_loss(logps, advantages, mask, **options)
    assert sentence in str(error.value)


# PPO, REINFORCE, RLOO


def test_rloo_is_trls():
    rloo_trainer = trl("trl.trainer.rloo_trainer").RLOOTrainer
    logps, mask = draw_logps(B, T).requires_grad_(), draw_mask(B, T)
    sums = preference.sequence_logps(logps, mask)
    old, advantages = (sums + 0.3 * torch.randn(B)).detach(), torch.randn(B)
    trainer = stand_in(epsilon_low=0.2, epsilon_high=0.3)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, logps.detach(), None)
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.long),
        "prompt_mask": torch.ones(B, 1, dtype=torch.long),
        "completion_ids": torch.zeros(B, T, dtype=torch.long),
        "completion_mask": mask,
        "advantages": advantages,
        "old_logps": old,
    }
    theirs = rloo_trainer._compute_loss(trainer, None, inputs)
    loss, metrics = preference.rloo_loss(sums, old, advantages, epsilon=0.2, epsilon_high=0.3)
    assert_same(loss, theirs, logps, metrics, logged(trainer))


def test_ppo_by_its_formula():
    logps, old, _, _, mask = grpo_batch()
    advantages = torch.randn(B, T)
    loss, metrics = preference.ppo_loss(logps, old, advantages, mask, epsilon=0.1)
    rho = torch.exp(logps - old)
    surrogate = torch.minimum(rho * advantages, rho.clamp(0.9, 1.1) * advantages)
    torch.testing.assert_close(loss, -surrogate[mask.bool()].mean(), **close)
    clipped = ((rho < 0.9) & (advantages < 0)) | ((rho > 1.1) & (advantages > 0))
    torch.testing.assert_close(
        metrics["clip_ratio/region_mean"], clipped[mask.bool()].double().mean(), **close
    )


def test_the_value_loss_by_its_formula():
    values, old, returns, mask = *torch.randn(3, B, T), draw_mask(B, T)
    loss, metrics = preference.ppo_value_loss(values, old, returns, mask, clip=0.2)
    held = old + (values - old).clamp(-0.2, 0.2)
    both = torch.stack([(values - returns) ** 2, (held - returns) ** 2])[:, mask.bool()]
    torch.testing.assert_close(loss, 0.5 * both.amax(0).mean(), **close)
    torch.testing.assert_close(
        metrics["value_clip_ratio"], (both[1] > both[0]).double().mean(), **close
    )
    loss, _ = preference.ppo_value_loss(values, old, returns, mask, clip=None)
    torch.testing.assert_close(loss, 0.5 * both[0].mean(), **close)


def test_reinforce_by_its_formula():
    logps, _, _, advantages, mask = grpo_batch()
    loss = preference.reinforce_loss(logps, advantages, mask)
    expected = -(advantages * (logps * mask).sum(-1)).mean()
    torch.testing.assert_close(loss, expected, **close)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logps), torch.autograd.grad(expected, logps), **close
    )


def test_group_advantages_by_hand():
    rewards = torch.tensor([0.0, 1.0, 2.0, 5.0, 5.0, 5.0])
    got = preference.group_advantages(rewards, 3)
    assert got.tolist() == pytest.approx([-1 / 1.0001, 0.0, 1 / 1.0001, 0.0, 0.0, 0.0])
    plain = preference.group_advantages(rewards, 3, scale="none")
    assert plain.tolist() == pytest.approx([-1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    by_batch = preference.group_advantages(rewards, 3, scale="batch")
    torch.testing.assert_close(by_batch, plain / (rewards.std() + 1e-4), **close)


def test_rloo_advantages_by_hand():
    rewards = torch.tensor([0.0, 1.0, 5.0, 2.0, 2.0, 2.0])
    got = preference.rloo_advantages(rewards, 3)
    assert got.tolist() == pytest.approx([-3.0, -1.5, 4.5, 0.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [[2.0, 0.5, 1.0], [1.0, 1.0, 1.0]]),
        ("token_mask", [[0.0, 0.5, 1.0], [1.0, 1.0, 1.0]]),
        ("sequence_truncate", [[2.0], [1.0]]),
        ("sequence_mask", [[0.0], [1.0]]),
    ],
)
def test_sampling_ratios_by_hand(mode, expected):
    old = torch.tensor([[8.0, 0.5, 9.0], [1.0, 1.0, 1.0]]).log()
    drawn = torch.tensor([[1.0, 1.0, 1.0], [1.0, math.nan, 1.0]]).log()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    ratio = preference.sampling_ratio(old, drawn, mask, mode=mode, clip_max=2.0)
    torch.testing.assert_close(ratio, torch.tensor(expected), **close)


def test_off_policy_masks_by_hand():
    """A token that the sampler could not score is no evidence against its answer."""
    logps = torch.full((4, 3), -1.0)
    drawn = torch.tensor([[0.0] * 3, [0.0] * 3, [-1.0, math.nan, -1.0], [-1.0, -1.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0]])
    advantages = torch.tensor([1.0, -1.0, -1.0, -1.0])
    kept = preference.off_policy_mask(logps, drawn, advantages, mask, 0.5)
    assert kept.tolist() == [[True], [False], [True], [True]]


def test_high_entropy_masks_by_hand():
    entropies = torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 5.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    high = preference.high_entropy_mask(entropies, mask, 0.5)
    assert high.tolist() == [[False, False, False], [True, True, True]]


# Distillation


def distributions(*shape):
    student, teacher = torch.randn(*shape).requires_grad_(), torch.randn(*shape)
    return student, student.log_softmax(-1), teacher, teacher.log_softmax(-1)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_distillation_is_trls(beta):
    gkd = trl("trl.experimental.gkd.gkd_trainer").GKDTrainer
    student, log_p, teacher, log_q = distributions(B, T, 9)
    mask = draw_mask(B, T)
    labels = torch.where(mask == 1, 3, -100)
    for num_items in (None, 17):
        theirs = gkd.generalized_jsd_loss(
            student, teacher, labels, beta, num_items_in_batch=num_items
        )
        loss = preference.distillation_loss(log_p, log_q, mask, beta=beta, num_items=num_items)
        assert_same(loss, theirs, student, {}, {})


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tail", [True, False])
def test_distillation_of_the_likeliest_tokens_is_trls(beta, tail):
    sdpo = trl("trl.experimental.sdpo.loss_utils")
    student, log_p, teacher, log_q = distributions(B, T, 9)
    theirs = sdpo.compute_topk_self_distillation_loss(
        student, teacher, distillation_topk=3, distillation_alpha=beta, distillation_add_tail=tail
    )
    tokens = student.topk(3).indices
    loss = preference.distillation_loss(
        log_p.gather(-1, tokens), log_q.gather(-1, tokens), beta=beta, reduction="none",
        support="tail" if tail else "renormalized",
    )  # fmt: skip
    torch.testing.assert_close(loss, theirs, **close)
    assert_same(loss.sum(), theirs.sum(), student, {}, {})


def test_divergences_by_hand():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.5, 0.5, 0.0])

    def loss(divergence):
        return preference.distillation_loss(p.log(), q.log(), divergence=divergence).item()

    assert loss("forward_kl") == pytest.approx(0.5 * math.log(2.0))
    assert loss("reverse_kl") == math.inf
    assert loss("tvd") == pytest.approx(0.25)
    # The mixture is (0.5, 0.375, 0.125).
    of_teacher = 0.5 * math.log(0.5 / 0.375)
    of_student = 0.25 * math.log(0.25 / 0.375) + 0.25 * math.log(0.25 / 0.125)
    assert loss("jsd") == pytest.approx(0.5 * of_teacher + 0.5 * of_student)


@pytest.mark.parametrize("divergence", ["jsd", "forward_kl", "reverse_kl", "tvd"])
@pytest.mark.parametrize("support", ["full", "tail", "renormalized"])
def test_tokens_that_neither_can_say_and_masked_positions_change_nothing(divergence, support):
    student, _, teacher, _ = distributions(2, 3, 5)
    kind = {"divergence": divergence, "support": support}

    def answers(impossible: int, elsewhere: float):
        leaf = F.pad(student.detach(), (0, impossible), value=-math.inf)
        leaf[1, 2] = elsewhere
        leaf.requires_grad_()
        target = F.pad(teacher, (0, impossible), value=-math.inf)
        mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        loss = preference.distillation_loss(
            leaf.log_softmax(-1), target.log_softmax(-1), mask, **kind
        )
        logps = leaf.log_softmax(-1).detach().requires_grad_()
        again = preference.distillation_loss(logps, target.log_softmax(-1), mask, **kind)
        (gradient,) = torch.autograd.grad(again, logps)
        return loss, gradient[..., :5]

    torch.testing.assert_close(answers(3, math.nan), answers(0, 0.0), **close)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"divergence": "cosine"}, "distillation_loss: `divergence` must be one of 'jsd', "),
        ({"beta": 1.5}, "`beta` must be between 0 and 1; got 1.5."),
        ({"support": "top"}, "`support` must be one of 'full', 'tail', 'renormalized'"),
        ({"mask": torch.ones(3)}, "`mask` must have shape (4,), that of `student_logps` without"),
    ],
)
def test_distillation_refuses(options, sentence):
    with pytest.raises(ValueError) as error:
        preference.distillation_loss(draw_logps(4, 5), draw_logps(4, 5), **options)
    assert sentence in str(error.value)


# Sequences, and what holds for all


def test_sequence_logps_by_hand():
    logps = torch.tensor([[-1.0, -2.0, math.nan], [-3.0, -4.0, -5.0], [math.nan] * 3])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    assert preference.sequence_logps(logps, mask).tolist() == [-3.0, -12.0, 0.0]
    assert preference.sequence_logps(logps, mask, average=True).tolist() == [-1.5, -4.0, 0.0]
    assert preference.nll_loss(logps, mask).item() == 3.0


@pytest.mark.parametrize("name", preference.__all__)
def test_every_docstring_has_its_sections(name):
    function = getattr(preference, name)
    text = inspect.getdoc(function)
    found = [s for line in text.splitlines() for s in SECTIONS if line.startswith(s)]
    assert found == list(SECTIONS)
    arguments = text[text.index("Args:") : text.index("Returns:")]
    for parameter in inspect.signature(function).parameters:
        assert parameter in arguments, f"{name} does not explain {parameter}"


def test_losses_compose_with_func_and_compile():
    """They are pure: torch.func differentiates them, and one graph holds one."""
    logps, mask, ref = dpo_batch()

    def loss(logps):
        chosen, rejected = preference.sequence_logps(logps, mask).chunk(2)
        return preference.dpo_loss(chosen, rejected, *ref.chunk(2))

    gradient, metrics = torch.func.grad(loss, has_aux=True)(logps.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(loss(logps)[0], logps)[0], **close)
    compiled, _ = torch.compile(loss, fullgraph=True, backend="aot_eager")(logps)
    torch.testing.assert_close(compiled, loss(logps)[0], **close)
    assert metrics["rewards/margins"].shape == ()


def test_no_loss_waits_for_the_device():
    """On meta tensors there is nothing to wait for: asking for a value would fail."""

    def draw(*shape):
        return torch.empty(*shape, device="meta")

    mask = torch.ones(B, T, device="meta")
    for loss_type in dpo.LOSSES:
        preference.dpo_loss(
            *(draw(B) for _ in range(4)), loss_type=loss_type, nll=draw(()),
            label_smoothing=SMOOTHED.get(loss_type, 0.0), chosen_lengths=draw(B),
            rejected_lengths=draw(B),
        )  # fmt: skip
    for loss_type in grpo.LOSSES:
        preference.grpo_loss(
            draw(B, T), draw(B), mask, old_logps=draw(B, T), ref_logps=draw(B, T), beta=0.1,
            loss_type=loss_type, entropies=draw(B, T), top_entropy_quantile=0.5, entropy_coef=0.1,
            importance_sampling_ratio=draw(B, T), sampling_logps=draw(B, T),
            off_policy_mask_threshold=0.1, max_completion_length=T,
        )  # fmt: skip
    preference.orpo_loss(draw(B), draw(B), draw(()))
    preference.cpo_loss(draw(B), draw(B), draw(()), alpha=0.1)
    labels = torch.ones(B, dtype=torch.bool, device="meta")
    kl = preference.kto_kl(draw(B), draw(B))
    preference.kto_loss(draw(B), draw(B), labels, kl, desirable_weight=1.5)
    preference.rloo_loss(draw(B), draw(B), preference.rloo_advantages(draw(B), 2))
    preference.ppo_value_loss(draw(B, T), draw(B, T), draw(B, T), mask)
    preference.sampling_ratio(draw(B, T), draw(B, T), mask)
    preference.length_desensitized_logps(draw(B, T), mask, alpha=0.5)
    preference.distillation_loss(draw(B, T, 9), draw(B, T, 9), mask, support="tail")


def test_grpo_is_one_graph():
    logps, old, ref, advantages, mask = grpo_batch()

    def loss(logps):
        return preference.grpo_loss(
            logps, advantages, mask, old_logps=old, ref_logps=ref, beta=0.1, entropies=-old,
            top_entropy_quantile=0.5,
        )[0]  # fmt: skip

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logps), loss(logps), **close)
