"""TRL's trainers on our losses: loss, metrics and weights are those of TRL's own, step by step."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from liger_fn import functional
from liger_fn.hf import trl as ours
from liger_fn.hf.deferred import Deferred
from liger_fn.testing.tiny_models import tiny_model

trl = pytest.importorskip("trl", minversion=ours.OLDEST, reason="trl is not installed")
pytestmark = pytest.mark.usefixtures("reference_path")

LENGTHS = (3, 9, 5, 12, 7, 4, 8, 6)
# Not of what is computed.
OF_THE_CLOCK = ("runtime", "per_second", "step_time", "total_flos")


def sentence(length: int, seed: int) -> str:
    g = torch.Generator().manual_seed(seed)
    return "".join(f" w{i}" for i in torch.randint(4, 100, (length,), generator=g))


def rows(kind: str) -> list[dict]:
    """Prompts and answers of different lengths."""
    prompts = [{"prompt": sentence(n, i)} for i, n in enumerate(LENGTHS)]
    if kind == "GRPO":
        return prompts
    names = {"SFT": ("completion",), "DPO": ("chosen", "rejected")}[kind]
    for i, row in enumerate(prompts):
        for j, name in enumerate(names, start=1):
            row[name] = sentence(LENGTHS[(i + 3 * j) % 8], 8 * j + i)
    return prompts


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(128)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="w0", eos_token="w1", bos_token="w2", unk_token="w0",
        padding_side="left",
    )  # fmt: skip


def reward(completions: list[str], **_) -> list[float]:
    return [float(sum(map(ord, answer)) % 7) for answer in completions]


def make(kind: str, module, folder, model=None, setting: dict | None = None, **options):
    """A trainer of `module`; plain SGD, under which weights show the gradients."""
    from datasets import Dataset

    model = model or tiny_model("llama")
    more = {} if setting is None else dict(setting)
    if kind == "GRPO":
        if options.get("beta"):
            # TRL loads the reference from where the model came from.
            model.save_pretrained(folder / "reference")
            model.config._name_or_path = str(folder / "reference")
        more["reward_funcs"] = reward
        options = {"num_generations": 4, "max_completion_length": 8, **options}
    if kind == "DPO" and "peft_config" not in more and not options.get("precompute_ref_log_probs"):
        torch.manual_seed(1)
        more["ref_model"] = tiny_model(model.config.model_type)
        with torch.no_grad():
            more["ref_model"].lm_head.weight.mul_(0.9)
    options = {
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 2,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no",
        "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False, "optim": "sgd",
        "learning_rate": 0.1, "max_grad_norm": 0.0, **options,
    }  # fmt: skip
    data = Dataset.from_list(rows(kind))
    return getattr(module, f"{kind}Trainer")(
        model,
        args=getattr(trl, f"{kind}Config")(output_dir=str(folder), **options),
        train_dataset=data,
        eval_dataset=data if options.get("eval_strategy") else None,
        processing_class=tokenizer(),
        **more,
    )


def trained(trainer):
    """The weights after training, and all that was logged."""
    torch.manual_seed(0)
    trainer.train()
    weights = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    logged = [
        {k: v for k, v in entry.items() if not any(word in k for word in OF_THE_CLOCK)}
        for entry in trainer.state.log_history
    ]
    return weights, logged


def assert_equal(kind, tmp_path, models=(None, None), tolerance=1e-5, **options) -> None:
    theirs, ourselves = (
        make(kind, module, tmp_path, model, **options)
        for module, model in zip((trl, ours), models, strict=True)
    )
    weights, logged = trained(theirs)
    our_weights, our_logged = trained(ourselves)
    assert len(our_logged) == len(logged)
    for entry, our_entry in zip(logged, our_logged, strict=True):
        assert our_entry == pytest.approx(entry, rel=tolerance, abs=tolerance)
    torch.testing.assert_close(our_weights, weights, rtol=tolerance, atol=tolerance)


@pytest.fixture
def calls(monkeypatch):
    """The names of the fused ops that were called."""
    names = []

    def watch(name):
        op = getattr(functional, name)
        monkeypatch.setattr(functional, name, lambda *a, **k: names.append(name) or op(*a, **k))

    watch("fused_linear_logprobs")
    watch("fused_linear_cross_entropy")
    return names


# Float32 sums in another order, over two steps.
EACH = ("SFT", "DPO", "GRPO")


@pytest.mark.parametrize("kind", EACH)
def test_two_steps(tmp_path, calls, kind):
    assert_equal(kind, tmp_path)
    # The reference of DPO is asked too.
    assert calls == ["fused_linear_logprobs"] * (4 if kind == "DPO" else 2)


@pytest.mark.parametrize("kind", EACH)
def test_gradient_accumulation_and_evaluation(tmp_path, calls, kind):
    assert_equal(
        kind, tmp_path, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1,
        per_device_train_batch_size=2,
    )  # fmt: skip
    assert set(calls) == {"fused_linear_logprobs"}


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("model_type", ["mixtral", "gemma2"])
def test_mixtures_of_experts_and_softcaps(tmp_path, calls, kind, model_type):
    assert_equal(kind, tmp_path, (tiny_model(model_type), tiny_model(model_type)), tolerance=1e-4)
    assert calls


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize("kind", EACH)
def test_adapters(tmp_path, calls, kind):
    import peft

    adapters = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    setting = {"peft_config": adapters}
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(tiny_model("llama"))
    torch.manual_seed(3)
    theirs = make(kind, trl, tmp_path, models[0], setting)
    torch.manual_seed(3)
    ourselves = make(kind, ours, tmp_path, models[1], setting)
    weights, logged = trained(theirs)
    our_weights, our_logged = trained(ourselves)
    assert our_logged == [pytest.approx(entry, rel=1e-5, abs=1e-5) for entry in logged]
    torch.testing.assert_close(our_weights, weights, rtol=1e-5, atol=1e-5)
    assert calls


def test_dynamic_fine_tuning(tmp_path):
    assert_equal("SFT", tmp_path, loss_type="dft")


def test_what_is_left_to_trl(tmp_path, calls):
    assert_equal("SFT", tmp_path, label_smoothing_factor=0.1)
    assert not calls


def test_without_metrics_of_tokens_the_loss_takes_a_product_less(tmp_path, calls):
    weights, logged = trained(make("SFT", trl, tmp_path))
    trainer = make("SFT", ours, tmp_path)
    trainer.token_metrics = False
    our_weights, our_logged = trained(trainer)
    assert calls == ["fused_linear_cross_entropy"] * 2
    for entry, our_entry in zip(logged, our_logged, strict=True):
        assert set(entry) - set(our_entry) <= {"entropy", "mean_token_accuracy"}
        expected = {name: entry[name] for name in our_entry}
        assert our_entry == pytest.approx(expected, rel=1e-5, abs=1e-5)
    torch.testing.assert_close(our_weights, weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["ipo"]},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": ["robust"], "label_smoothing": 0.1},
        {"ld_alpha": 0.5},
        {"use_weighting": True},
        {"f_divergence_type": "js_divergence"},
        {"precompute_ref_log_probs": True},
    ],
    ids=str,
)
def test_options_of_dpo(tmp_path, calls, options):
    assert_equal("DPO", tmp_path, **options)
    assert calls


@pytest.mark.parametrize(
    "options",
    [
        *({"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "cispo", "sapo", "vespo")),
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        {"loss_type": "dapo", "num_iterations": 2, "temperature": 0.7},
        {"beta": 0.1, "steps_per_generation": 2, "delta": 1.5},
        {"importance_sampling_level": "sequence", "top_entropy_quantile": 0.5},
    ],
    ids=str,
)
def test_options_of_grpo(tmp_path, calls, options):
    assert_equal("GRPO", tmp_path, **options)
    assert calls


def test_a_bonus_for_entropy_is_left_to_trl(tmp_path, calls):
    assert_equal("GRPO", tmp_path, entropy_coef=0.1)
    assert not calls


def test_in_bfloat16(tmp_path, calls):
    # Two steps in bfloat16, which keeps 8 bits.
    assert_equal("SFT", tmp_path, bf16=True, tolerance=2e-2)
    assert calls


def test_evaluation_with_logits(tmp_path):
    found = []
    trainer = make(
        "SFT", ours, tmp_path, setting={"compute_metrics": lambda o: found.append(o) or {}},
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer.evaluate()
    assert found[0].predictions.shape[-1] == 128


def test_a_mixin_for_a_trainer_of_one_s_own(tmp_path):
    class Own(ours.SFTLoss, trl.SFTTrainer):
        ops = ("rms_norm",)

    trainer = make("SFT", type("module", (), {"SFTTrainer": Own}), tmp_path)
    assert trainer.reports[0].replaced() == {"rms_norm": 5}
    # Where logits are real, their log-probabilities are taken of them.
    weights, _ = trained(trainer)
    expected, _ = trained(make("SFT", trl, tmp_path))
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-5)


def test_rows_at_once(tmp_path, monkeypatch):
    class Own(ours.SFTLoss, trl.SFTTrainer):
        chunk_size = 3

    given, op = [], functional.fused_linear_logprobs

    def watched(weight, x, y, chunk_size=None, **options):
        given.append(chunk_size)
        return op(weight, x, y, chunk_size, **options)

    monkeypatch.setattr(functional, "fused_linear_logprobs", watched)
    trained(make("SFT", type("module", (), {"SFTTrainer": Own}), tmp_path))
    assert given == [3, 3]


def test_names():
    assert {"SFTTrainer", "DPOTrainer", "GRPOTrainer"} <= set(dir(ours))
    assert ours.SFTTrainer is ours.SFTTrainer
    with pytest.raises(AttributeError, match="has no attribute 'PPOTrainer'"):
        ours.PPOTrainer  # noqa: B018


@pytest.mark.parametrize("make_logits", [lambda z: z, lambda z: Deferred(None, z, z.shape[-1])])
def test_tokens_of_a_batch_of_nothing_have_a_gradient(make_logits):
    z = torch.randn(2, 3, 5, requires_grad=True)
    tokens = ours.tokens_of(make_logits(z), torch.full((2, 3), -100))
    tokens.logps.sum().backward()
    assert torch.equal(z.grad, torch.zeros_like(z))
