"""TRL's SFT, DPO and GRPO trainers on our losses, under TRL's names.

    from liger_fn.hf.trl import DPOTrainer          # in the place of trl.DPOTrainer
    trainer = DPOTrainer(model, args=DPOConfig(...), train_dataset=..., processing_class=...)

Each is TRL's class with two differences. Once it is made, `apply` goes over its models. And
`compute_loss`, the method that transformers' Trainer documents to be overridden, is ours: the model
is called as it stands, wrapped by whatever distributes it; its head returns logits that are not
computed yet; of the tokens that count `fused_linear_logprobs` takes what is needed, inside the
head's own hooks and inside of all wrappers (`ask`); and a function of
`liger_fn.functional.preference` makes the loss and the metrics. Batches, references, generation,
rewards and logs are TRL's.

What TRL does not promise to keep, and what we read: the names in a batch, the attributes in which
a trainer holds its options (`beta`, `loss_types`, ...), and `_metrics` and `_total_train_tokens`,
from which its `log` makes what is logged. The tests compare every metric and weight with those of
TRL's own trainers; they pass with TRL 1.15 and 1.16. Older ones hold these things otherwise.

To give the losses to a trainer of your own, put a mixin in front of TRL's class:

    class MyTrainer(DPOLoss, trl.DPOTrainer): ...
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Collection
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn

from liger_fn import functional
from liger_fn.functional import preference
from liger_fn.functional.preference.grpo import NORMALIZATIONS
from liger_fn.hf.deferred import Deferred
from liger_fn.hf.install import apply
from liger_fn.hf.output_head import ask, with_real_logits

OLDEST = "1.15"
IGNORED = -100


class Tokens(NamedTuple):
    """What a head says of each token that counts, (B, T); zeros elsewhere."""

    counts: Tensor
    logps: Tensor
    entropies: Tensor | None
    hits: Tensor | None


def tokens_of(logits: Any, labels: Tensor, *, more: bool = True, **options: Any) -> Tokens:
    """Look up the log-probability of each label, (B, T), and with `more` entropies and hits.

    Rows without a label cost nothing; to find them is to wait for the device, as TRL's own do.
    Options are a temperature, and the chunk_size of `fused_linear_logprobs`.
    """
    counts = labels != IGNORED
    y = labels[counts]
    of_rows = _logprobs(_rows(logits, counts), y, entropy=more, top1=more, **options)

    def placed(x: Tensor) -> Tensor:
        # Also with no row at all this hangs on the graph: a batch of nothing has a gradient, 0.
        return x.new_zeros(counts.shape).masked_scatter(counts, x)

    if not more:
        return Tokens(counts, placed(of_rows), None, None)
    logps, _, entropies, top1 = of_rows
    return Tokens(counts, placed(logps), placed(entropies.detach()), placed(top1 == y))


def _rows(logits: Any, mask: Tensor) -> Any:
    return logits.rows(mask) if isinstance(logits, Deferred) else logits[mask]


def _logprobs(logits: Any, y: Tensor, chunk_size: int | None = None, **options: Any) -> Any:
    if isinstance(logits, Deferred):
        return logits.logprobs(y, chunk_size=chunk_size, **options)
    return functional.logprobs(logits, y, **options)


# A metric, numerator and denominator: over several processes each is summed.
Ratio = tuple[Tensor, Tensor]


def _mean_of(x: Tensor, counts: Tensor) -> Ratio:
    return (x * counts).sum(), counts.sum()


class Patched:
    """What the mixins share: models that are patched, and metrics where TRL's `log` finds them.

    Attributes:
        ops: what `apply` may use; None: all.
        chunk_size: of `fused_linear_logprobs`: fewer rows of logits at once take less memory.
        reports: what `apply` did, model by model.
    """

    ops: Collection[str] | None = None
    chunk_size: int | None = None
    model: Any
    args: Any
    accelerator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if Version(version("trl")) < Version(OLDEST):
            raise ImportError(f"trl: must be {OLDEST} at least; got {version('trl')}.")
        super().__init__(*args, **kwargs)
        models = (self.model, getattr(self, "ref_model", None))
        unwrap = self.accelerator.unwrap_model
        self.reports = [
            apply(unwrap(model, keep_torch_compile=False), ops=self.ops)
            for model in models
            if model is not None
        ]

    def _ask(self, model: nn.Module, inputs: dict[str, Any], read: Callable[[Any], Any]) -> Any:
        if self.aux_loss_enabled:
            inputs = {**inputs, "output_router_logits": True}
        return ask(model, read, **inputs, use_cache=False)

    def _with_aux_loss(self, loss: Tensor, outputs: Any, steps: float, metrics: dict) -> Tensor:
        """Add what keeps the experts of a mixture equally busy."""
        if not self.aux_loss_enabled:
            return loss
        metrics["aux_loss"] = outputs.aux_loss.detach()
        return loss + self.router_aux_loss_coef * outputs.aux_loss / steps

    def _steps(self) -> float:
        """By what a loss is divided that is a mean already: evaluation accumulates nothing."""
        return self.current_gradient_accumulation_steps if self.model.training else 1

    def _note(self, metrics: dict[str, Tensor | Ratio], tokens: Tensor | None = None) -> None:
        """Sum metrics over all processes and hand them to `log`; waits for the device once."""
        one = torch.ones((), device=self.accelerator.device)
        ratios = [m if isinstance(m, tuple) else (m, one) for m in metrics.values()]
        numbers = [x.detach().double() for ratio in ratios for x in ratio]
        numbers.append(one.double() if tokens is None else tokens.double())
        *sums, seen = self.accelerator.reduce(torch.stack(numbers), "sum").tolist()
        noted = self._metrics["train" if self.model.training else "eval"]
        for name, total, number in zip(metrics, sums[::2], sums[1::2], strict=True):
            noted[name].append(total / number if number else 0.0)
        if tokens is None:
            return
        if self.model.training:
            self._total_train_tokens += int(seen) // self._tp_size
        noted["num_tokens"] = [self._total_train_tokens]


class SFTLoss(Patched):
    """The loss of `trl.SFTTrainer`: of next tokens, plain or weighed by their probability (DFT).

    Label smoothing, a `compute_loss_func` and sequences that are cut over devices are left to TRL.

    Attributes:
        token_metrics: whether entropy and token accuracy are logged, as TRL does. They take the
            log-probabilities, whose backward pass makes the logits again: 4 products of head and
            hidden states. Without them the loss is `fused_linear_cross_entropy`: 3 products.
    """

    token_metrics = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of a batch, and note its metrics: see `transformers.Trainer`."""
        by_hand = self.compute_loss_func is not None or self.label_smoother is not None
        if by_hand or "shift_labels" in inputs or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        of_model = {k: v for k, v in inputs.items() if k != "labels"}
        metrics: dict[str, Tensor | Ratio] = {}

        def read(outputs: Any) -> tuple[Any, ...]:
            # Tuned prompts come before the tokens.
            logits = outputs.logits[:, -labels.shape[1] :][:, :-1]
            total, number = self._total(logits, labels[:, 1:], metrics)
            return total, number, with_real_logits(outputs, drop=not return_outputs)

        total, number, outputs = self._ask(model, of_model, read)
        if num_items_in_batch is None:
            num_items_in_batch = number
        loss = total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
        is_of_all = num_items_in_batch is not number
        if self.args.average_tokens_across_devices and is_of_all:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        loss = self._with_aux_loss(loss, outputs, self._steps() if is_of_all else 1, metrics)
        self._note(metrics, self._number_of_tokens(inputs))
        return (loss, outputs) if return_outputs else loss

    def _total(self, logits: Any, y: Tensor, metrics: dict) -> tuple[Tensor, Tensor]:
        """The sum of the losses of all tokens that count, and their number."""
        is_dft = self.args.loss_type == "dft"
        if not self.token_metrics and not is_dft:
            counts = y != IGNORED
            return F.cross_entropy(_rows(logits, counts), y[counts], reduction="sum"), counts.sum()
        tokens = tokens_of(logits, y, more=self.token_metrics, chunk_size=self.chunk_size)
        losses = -tokens.logps
        if is_dft:
            losses = losses * tokens.logps.detach().exp()
        if self.token_metrics:
            metrics["entropy"] = _mean_of(tokens.entropies, tokens.counts)
            metrics["mean_token_accuracy"] = _mean_of(tokens.hits, tokens.counts)
        return losses.sum(), tokens.counts.sum()

    def _number_of_tokens(self, inputs: dict[str, Any]) -> Tensor:
        if "attention_mask" in inputs:
            return inputs["attention_mask"].sum()
        # Sequences in one row, without padding.
        positions = inputs["position_ids"]
        return torch.tensor(positions.shape[1], device=positions.device)


class DPOLoss(Patched):
    """The loss of `trl.DPOTrainer`: `preference.dpo_loss` in all its kinds."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of pairs, and note its metrics: see `transformers.Trainer`."""
        completion = inputs["completion_mask"]
        labels = inputs["input_ids"].masked_fill(completion == 0, IGNORED)[:, 1:]
        ours = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
        of_model = {k: v for k, v in inputs.items() if k not in ours}

        def read(outputs: Any) -> tuple[Any, ...]:
            logits = outputs.logits[:, -completion.shape[1] : -1]
            tokens = tokens_of(logits, labels, chunk_size=self.chunk_size)
            weights = self._weights(logits, labels, tokens) if self.use_weighting else None
            outputs = with_real_logits(outputs, drop=not return_outputs)
            return tokens, weights, _of_pairs(logits, tokens), outputs

        tokens, weights, noted, outputs = self._ask(model, of_model, read)
        pairs, lengths = len(labels) // 2, completion.sum(-1).clamp(min=1)
        loss, metrics = preference.dpo_loss(
            *self._of_sequences(tokens).split(pairs),
            *self._of_reference(of_model, inputs, labels),
            beta=self.beta,
            loss_type=self.loss_types,
            loss_weights=self.loss_weights,
            label_smoothing=self.label_smoothing,
            f_divergence_type=self.f_divergence_type,
            f_alpha_divergence_coef=self.f_alpha_divergence_coef,
            discopop_tau=self.args.discopop_tau,
            chosen_lengths=lengths[:pairs],
            rejected_lengths=lengths[pairs:],
            nll=preference.nll_loss(tokens.logps[:pairs], tokens.counts[:pairs]),
            weights=weights,
        )
        loss = self._with_aux_loss(loss, outputs, 1, metrics)
        self._note(metrics | noted, inputs["attention_mask"].sum())
        return (loss, outputs) if return_outputs else loss

    def _of_sequences(self, tokens: Tokens) -> Tensor:
        if self.ld_alpha is None:
            return preference.sequence_logps(tokens.logps, tokens.counts)
        return preference.length_desensitized_logps(
            tokens.logps, tokens.counts, alpha=self.ld_alpha
        )

    def _of_reference(
        self, of_model: dict[str, Any], inputs: dict[str, Any], labels: Tensor
    ) -> tuple[Tensor, ...]:
        if self.precompute_ref_logps:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]

        def read(outputs: Any) -> Tokens:
            logits = outputs.logits[:, -labels.shape[1] - 1 : -1]
            return tokens_of(logits, labels, more=False, chunk_size=self.chunk_size)

        model, adapters_off = self.ref_model, contextlib.nullcontext()
        if model is None:
            model, adapters_off = self.model, self._as_reference()
        with torch.no_grad(), adapters_off:
            tokens = ask(model, read, **of_model, use_cache=False)
        return self._of_sequences(tokens).split(len(labels) // 2)

    def _as_reference(self) -> contextlib.AbstractContextManager:
        """Of adapters the reference is the model without them, or those that came with it."""
        from trl.trainer.utils import use_adapter

        model = self.accelerator.unwrap_model(self.model)
        return use_adapter(model, "ref" if "ref" in model.peft_config else None)

    @torch.no_grad()
    def _weights(self, logits: Any, labels: Tensor, tokens: Tokens) -> Tensor:
        """How likely the model itself is to write each pair (WPO)."""
        of_rows, y = _rows(logits, tokens.counts), labels[tokens.counts]
        lse, of_squares = (
            _logprobs(of_rows, y, self.chunk_size, temperature=t, lse=True).lse for t in (1.0, 0.5)
        )
        log_sum_sq = torch.zeros_like(tokens.logps).masked_scatter(
            tokens.counts, of_squares - 2 * lse
        )
        chosen, rejected = preference.wpo_weights(tokens.logps, log_sum_sq, tokens.counts).chunk(2)
        return chosen * rejected


def _of_pairs(logits: Any, tokens: Tokens) -> dict[str, Ratio]:
    """The metrics of tokens; the accuracy is of the chosen sequences."""
    chosen, rejected = tokens.counts.clone(), tokens.counts.clone()
    pairs = len(tokens.counts) // 2
    chosen[pairs:] = False
    rejected[:pairs] = False
    return {
        "entropy": _mean_of(tokens.entropies, tokens.counts),
        "mean_token_accuracy": _mean_of(tokens.hits, chosen),
        "logits/chosen": (_sum_of_means(logits, chosen), chosen.sum()),
        "logits/rejected": (_sum_of_means(logits, rejected), rejected.sum()),
    }


@torch.no_grad()
def _sum_of_means(logits: Any, counts: Tensor) -> Tensor:
    """The mean logit of each row that counts, summed."""
    rows = _rows(logits, counts)
    if isinstance(rows, Deferred):
        return rows.sum_of_means()
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).mean(-1).sum()


class GRPOLoss(Patched):
    """The loss of `trl.GRPOTrainer`: `preference.grpo_loss` in all kinds that TRL has.

    Images, and a bonus for entropy, are left to TRL. So are the log-probabilities of answers that
    are kept for later updates and those of the reference, which TRL takes when it writes the
    answers. Over several processes a metric is the mean of theirs; the extremes of clipping too.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of answers, and note its metrics: see `transformers.Trainer`."""
        if return_outputs or _has_images(inputs) or self._entropy_bonus_enabled:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        answers, mask = inputs["completion_ids"], inputs["completion_mask"]
        of_model = {
            "input_ids": torch.cat([inputs["prompt_ids"], answers], dim=1),
            "attention_mask": torch.cat([inputs["prompt_mask"], mask], dim=1),
        }
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        labels = answers.masked_fill(mask == 0, IGNORED)
        options = {"temperature": self.temperature, "chunk_size": self.chunk_size}

        def read(outputs: Any) -> tuple[Any, ...]:
            logits = outputs.logits[:, -answers.shape[1] - 1 : -1]
            return tokens_of(logits, labels, **options), with_real_logits(outputs, drop=True)

        with self.accelerator.autocast():
            tokens, outputs = self._ask(model, of_model, read)
        loss, metrics = preference.grpo_loss(
            tokens.logps,
            inputs["advantages"],
            mask,
            old_logps=inputs.get("old_per_token_logps"),
            ref_logps=inputs["ref_per_token_logps"] if self.beta else None,
            sampling_logps=inputs.get("sampling_per_token_logps"),
            importance_sampling_ratio=self._sampling_ratio(inputs),
            entropies=tokens.entropies,
            num_items=self._number_of_items(inputs),
            **self._options(),
        )
        steps = self._steps()
        loss = self._with_aux_loss(loss / steps, outputs, steps, metrics)
        # TRL has this one where it rewards entropy.
        del metrics["policy_loss"]
        self._note(metrics)
        return loss

    def _sampling_ratio(self, inputs: dict[str, Any]) -> Tensor | None:
        """How much likelier an answer is here than where another program wrote it."""
        corrects = self.use_vllm and self.vllm_importance_sampling_correction
        if corrects or self.loss_type == "vespo":
            return inputs.get("importance_sampling_ratio")
        return None

    def _number_of_items(self, inputs: dict[str, Any]) -> Tensor | None:
        """The tokens of this process's share of all answers of a step, for this call's part.

        TRL counts the answers of a whole generation, which `steps_per_generation` calls use up.
        """
        if NORMALIZATIONS[self.loss_type] != "token_mean" or self.loss_type == "bnpo":
            return None
        number = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        return number / self.args.steps_per_generation if self.model.training else number

    def _options(self) -> dict[str, Any]:
        names = (
            "delta", "use_bias_correction_kl", "sapo_temperature_pos", "sapo_temperature_neg",
            "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg",
        )  # fmt: skip
        return {
            "beta": self.beta,
            "loss_type": self.loss_type,
            "importance_sampling_level": self.importance_sampling_level,
            "epsilon": self.epsilon_low,
            "epsilon_high": self.epsilon_high,
            "off_policy_mask_threshold": self.off_policy_mask_threshold,
            "top_entropy_quantile": self.top_entropy_quantile,
            "max_completion_length": self.max_completion_length,
            **{name: getattr(self.args, name) for name in names},
        }


def _has_images(inputs: dict[str, Any]) -> bool:
    words = ("pixel_values", "image_", "token_type_ids", "mm_token_type_ids")
    return any(key.startswith(words) and value is not None for key, value in inputs.items())


TRAINERS = {"SFTTrainer": SFTLoss, "DPOTrainer": DPOLoss, "GRPOTrainer": GRPOLoss}


def __getattr__(name: str) -> type:
    """Make a trainer when it is first named: TRL is imported only then."""
    if name not in TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    mixin, theirs = TRAINERS[name], getattr(importlib.import_module("trl"), name)
    doc = f"TRL's {name} on our loss: see `{mixin.__name__}` for it, and TRL for all else."
    trainer = type(name, (mixin, theirs), {"__module__": __name__, "__doc__": doc})
    globals()[name] = trainer
    return trainer


def __dir__() -> list[str]:
    return sorted({*globals(), *TRAINERS})
