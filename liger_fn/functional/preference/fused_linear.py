"""A linear head and a loss of its log-probabilities in one call, no logits in memory.

    fused_linear_dpo(weight, x, y, ...) = dpo_loss(of fused_linear_logprobs(weight, x, y), ...)

Options by name go where they belong: those of `fused_linear_logprobs` (bias, chunk_size,
temperature, logit_scale, softcap, ignore_index) to the head, all others to the loss. Positions
without a target have y = ignore_index. Pairs are (2B, T): the chosen sequences, then the rejected
ones. A reference's head takes the options of the policy's, but for the bias.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from liger_fn.functional.core import check
from liger_fn.functional.linear_loss.logprobs import fused_linear_logprobs
from liger_fn.functional.preference.cpo import cpo_loss, simpo_loss
from liger_fn.functional.preference.dpo import dpo_loss
from liger_fn.functional.preference.grpo import grpo_loss
from liger_fn.functional.preference.kto import kto_loss
from liger_fn.functional.preference.orpo import orpo_loss
from liger_fn.functional.preference.pairs import Metrics
from liger_fn.functional.preference.sequence import (
    length_desensitized_logps,
    nll_loss,
    sequence_logps,
)

HEAD_OPTIONS = ("bias", "chunk_size", "temperature", "logit_scale", "softcap", "ignore_index")


class _Tokens(NamedTuple):
    """What the head says of each position, (B, T)."""

    logps: Tensor
    has_target: Tensor
    entropies: Tensor | None
    hits: Tensor | None


def _split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the head, and those of the loss."""
    head = {name: value for name, value in options.items() if name in HEAD_OPTIONS}
    return head, {name: value for name, value in options.items() if name not in head}


def _tokens(
    op: str, weight: Tensor, x: Tensor, y: Tensor, head: dict[str, Any], token_metrics: bool
) -> _Tokens:
    check.tensor(op, "y", y)
    if y.dim() != 2:
        check.fail(op, "y", "have shape (B, T), sequences of tokens", check.spell(y.shape))
    has_target = y != head.get("ignore_index", -100)
    rows: Any = fused_linear_logprobs(
        weight, x, y, entropy=token_metrics, top1=token_metrics, **head
    )
    if not token_metrics:
        return _Tokens(rows, has_target, None, None)
    return _Tokens(rows.logp, has_target, rows.entropy, (rows.top1 == y) & has_target)


def _reference(
    op: str,
    y: Tensor,
    head: dict[str, Any],
    ref_weight: Tensor | None,
    ref_x: Tensor | None,
    ref_bias: Tensor | None,
) -> Tensor:
    """The reference's log-probabilities of tokens, (B, T), constants."""
    for name, given in (("ref_weight", ref_weight), ("ref_x", ref_x)):
        if given is None:
            check.fail(op, name, "be given, or ref_logps", None)
    with torch.no_grad():
        logps: Any = fused_linear_logprobs(ref_weight, ref_x, y, **{**head, "bias": ref_bias})
    return logps


def _mean_over(counts: Tensor, x: Tensor) -> Tensor:
    x = x.detach().masked_fill(~counts, 0.0)
    return x.sum() / counts.sum().clamp(min=1)


def _token_metrics(tokens: _Tokens, mask: Tensor, accuracy_of: int) -> Metrics:
    """The trainers' entropy, and the share of hits in the first `accuracy_of` sequences."""
    if tokens.entropies is None:
        return {}
    hits = tokens.hits[:accuracy_of].to(tokens.entropies.dtype)
    return {
        "entropy": _mean_over(mask, tokens.entropies),
        "mean_token_accuracy": _mean_over(mask[:accuracy_of], hits),
    }


def fused_linear_dpo(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    ref_logps: Tensor | None = None,
    *,
    ref_weight: Tensor | None = None,
    ref_x: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ld_alpha: float | None = None,
    token_metrics: bool = True,
    **options: Any,
) -> tuple[Tensor, Metrics]:
    """Compute `dpo_loss` of pairs under a linear head.

        logps = fused_linear_logprobs(weight, x, y);  loss = dpo_loss(sums over tokens, reference's)

    Args:
        weight: (V, H), the head.
        x: (2B, T, H), hidden states: those of the chosen sequences, then of the rejected ones.
        y: (2B, T), the next token at each position; ignore_index where none counts.
        ref_logps: (2B,), the reference's log-probabilities of the sequences; None: of its head.
        ref_weight, ref_x, ref_bias: the reference's head and hidden states, if ref_logps is None.
            No gradient passes.
        ld_alpha: the weight of tokens beyond the shorter sequence, see `length_desensitized_logps`;
            None: all count alike.
        token_metrics: whether to report entropy and mean_token_accuracy too.
        options: bias, chunk_size, temperature, logit_scale, softcap, ignore_index as in
            `fused_linear_logprobs`; all others as in `dpo_loss`. Lengths and nll are known here.

    Returns:
        The loss and the metrics of `dpo_loss`, with entropy and, of the chosen,
        mean_token_accuracy.

    Raises:
        TypeError, ValueError: as `fused_linear_logprobs` and `dpo_loss`.

    Precision: that of `fused_linear_logprobs`.
    Memory: that of `fused_linear_logprobs`, and a few tensors of 2B · T numbers.
    Source: see `dpo_loss`.
    """
    op = "fused_linear_dpo"
    head, loss_options = _split(options)
    tokens = _tokens(op, weight, x, y, head, token_metrics)
    mask, pairs = tokens.has_target, _number_of_pairs(op, y)

    def of_sequences(logps: Tensor) -> Tensor:
        if ld_alpha is None:
            return sequence_logps(logps, mask)
        return length_desensitized_logps(logps, mask, alpha=ld_alpha)

    if ref_logps is None:
        ref_logps = of_sequences(_reference(op, y, head, ref_weight, ref_x, ref_bias))
    check.shape(op, "ref_logps", ref_logps, y.shape[:1], "one per sequence")
    chosen_lengths, rejected_lengths = mask.sum(-1).split(pairs)
    loss, metrics = dpo_loss(
        *of_sequences(tokens.logps).split(pairs),
        *ref_logps.split(pairs),
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        nll=nll_loss(tokens.logps[:pairs], mask[:pairs]),
        **loss_options,
    )
    return loss, metrics | _token_metrics(tokens, mask, pairs)


def _number_of_pairs(op: str, y: Tensor) -> int:
    if y.shape[0] % 2 or not y.shape[0]:
        check.fail(op, "y", "have 2B sequences, the chosen and then the rejected", len(y))
    return y.shape[0] // 2


def _without_reference(
    op: str, loss_function: Any, average: bool, with_nll: bool,
    weight: Tensor, x: Tensor, y: Tensor, mask: Tensor | None,
    token_metrics: bool, options: dict[str, Any],
) -> tuple[Tensor, Metrics]:  # fmt: skip
    head, loss_options = _split(options)
    tokens = _tokens(op, weight, x, y, head, token_metrics)
    pairs = _number_of_pairs(op, y)
    counts = _counts(op, mask, tokens)
    logps = sequence_logps(tokens.logps, counts, average=average)
    nll = nll_loss(tokens.logps[:pairs], tokens.has_target[:pairs]) if with_nll else None
    loss, metrics = loss_function(*logps.split(pairs), nll, **loss_options)
    return loss, metrics | _token_metrics(tokens, counts, pairs)


def _counts(op: str, mask: Tensor | None, tokens: _Tokens) -> Tensor:
    """The tokens that the loss is of: those with a target, or those of them in the mask."""
    if mask is None:
        return tokens.has_target
    check.tensor(op, "mask", mask)
    check.shape(op, "mask", mask, tokens.logps.shape, "that of `y`")
    return (mask != 0) & tokens.has_target


def fused_linear_orpo(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    mask: Tensor | None = None,
    *,
    token_metrics: bool = True,
    **options: Any,
) -> tuple[Tensor, Metrics]:
    """Compute `orpo_loss` of pairs under a linear head.

        logps = fused_linear_logprobs(weight, x, y);  loss = orpo_loss(averages over tokens, nll)

    Args:
        weight: (V, H), the head.
        x: (2B, T, H), hidden states: those of the chosen sequences, then of the rejected ones.
        y: (2B, T), the next token at each position; ignore_index where there is none. The
            likelihood term counts all of the chosen sequences', prompts too if they are here.
        mask: (2B, T), the answers' tokens, of which the odds are; None: all in y.
        token_metrics: whether to report entropy and mean_token_accuracy too.
        options: bias, chunk_size, temperature, logit_scale, softcap, ignore_index as in
            `fused_linear_logprobs`; all others as in `orpo_loss`.

    Returns:
        The loss and the metrics of `orpo_loss`, with entropy and, of the chosen,
        mean_token_accuracy.

    Raises:
        TypeError, ValueError: as `fused_linear_logprobs` and `orpo_loss`.

    Precision: that of `fused_linear_logprobs`.
    Memory: that of `fused_linear_logprobs`, and a few tensors of 2B · T numbers.
    Source: see `orpo_loss`.
    """
    return _without_reference(
        "fused_linear_orpo", orpo_loss, True, True, weight, x, y, mask, token_metrics, options
    )


def fused_linear_cpo(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    mask: Tensor | None = None,
    *,
    token_metrics: bool = True,
    **options: Any,
) -> tuple[Tensor, Metrics]:
    """Compute `cpo_loss` of pairs under a linear head.

        logps = fused_linear_logprobs(weight, x, y);  loss = cpo_loss(of sequences, nll)

    Args:
        weight: (V, H), the head.
        x: (2B, T, H), hidden states: those of the chosen sequences, then of the rejected ones.
        y: (2B, T), the next token at each position; ignore_index where there is none. The
            likelihood term counts all of the chosen sequences', prompts too if they are here.
        mask: (2B, T), the answers' tokens, which are compared; None: all in y.
        token_metrics: whether to report entropy and mean_token_accuracy too.
        options: bias, chunk_size, temperature, logit_scale, softcap, ignore_index as in
            `fused_linear_logprobs`; all others as in `cpo_loss`. simpo and ipo take averages over
            tokens, the others sums.

    Returns:
        The loss and the metrics of `cpo_loss`, with entropy and, of the chosen,
        mean_token_accuracy.

    Raises:
        TypeError, ValueError: as `fused_linear_logprobs` and `cpo_loss`.

    Precision: that of `fused_linear_logprobs`.
    Memory: that of `fused_linear_logprobs`, and a few tensors of 2B · T numbers.
    Source: see `cpo_loss`.
    """
    average = options.get("loss_type") in ("simpo", "ipo")
    return _without_reference(
        "fused_linear_cpo", cpo_loss, average, True, weight, x, y, mask, token_metrics, options
    )


def fused_linear_simpo(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    mask: Tensor | None = None,
    *,
    token_metrics: bool = True,
    **options: Any,
) -> tuple[Tensor, Metrics]:
    """Compute `simpo_loss` of pairs under a linear head, without a likelihood term.

        logps = fused_linear_logprobs(weight, x, y);  loss = simpo_loss(averages over tokens)

    Args:
        weight: (V, H), the head.
        x: (2B, T, H), hidden states: those of the chosen sequences, then of the rejected ones.
        y: (2B, T), the next token at each position; ignore_index where none counts.
        mask: (2B, T), which tokens of y count; None: all.
        token_metrics: whether to report entropy and mean_token_accuracy too.
        options: bias, chunk_size, temperature, logit_scale, softcap, ignore_index as in
            `fused_linear_logprobs`; all others as in `simpo_loss`.

    Returns:
        The loss and the metrics of `simpo_loss`, with entropy and, of the chosen,
        mean_token_accuracy.

    Raises:
        TypeError, ValueError: as `fused_linear_logprobs` and `simpo_loss`.

    Precision: that of `fused_linear_logprobs`.
    Memory: that of `fused_linear_logprobs`, and a few tensors of 2B · T numbers.
    Source: see `simpo_loss`.
    """
    return _without_reference(
        "fused_linear_simpo", simpo_loss, True, False, weight, x, y, mask, token_metrics, options
    )


def fused_linear_kto(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    labels: Tensor,
    kl: Tensor | float = 0.0,
    ref_logps: Tensor | None = None,
    *,
    ref_weight: Tensor | None = None,
    ref_x: Tensor | None = None,
    ref_bias: Tensor | None = None,
    token_metrics: bool = True,
    **options: Any,
) -> tuple[Tensor, Metrics]:
    """Compute `kto_loss` of answers under a linear head.

        logps = fused_linear_logprobs(weight, x, y);  loss = kto_loss(sums over tokens, reference's)

    Args:
        weight: (V, H), the head.
        x: (B, T, H), hidden states.
        y: (B, T), the next token at each position; ignore_index where none counts.
        labels: (B,), boolean: which answers are good.
        kl: a scalar or (B,), see `kto_loss`.
        ref_logps: (B,), the reference's log-probabilities of the answers; None: of its head.
        ref_weight, ref_x, ref_bias: the reference's head and hidden states, if ref_logps is None.
            No gradient passes.
        token_metrics: whether to report entropy and mean_token_accuracy too.
        options: bias, chunk_size, temperature, logit_scale, softcap, ignore_index as in
            `fused_linear_logprobs`; all others as in `kto_loss`.

    Returns:
        The loss and the metrics of `kto_loss`, with entropy and mean_token_accuracy.

    Raises:
        TypeError, ValueError: as `fused_linear_logprobs` and `kto_loss`.

    Precision: that of `fused_linear_logprobs`.
    Memory: that of `fused_linear_logprobs`, and a few tensors of B · T numbers.
    Source: see `kto_loss`.
    """
    op = "fused_linear_kto"
    head, loss_options = _split(options)
    tokens = _tokens(op, weight, x, y, head, token_metrics)
    mask = tokens.has_target
    if ref_logps is None:
        ref_logps = sequence_logps(_reference(op, y, head, ref_weight, ref_x, ref_bias), mask)
    logps = sequence_logps(tokens.logps, mask)
    loss, metrics = kto_loss(logps, ref_logps, labels, kl, **loss_options)
    return loss, metrics | _token_metrics(tokens, mask, len(y))


def fused_linear_grpo(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    ref_logps: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_x: Tensor | None = None,
    ref_bias: Tensor | None = None,
    token_metrics: bool = True,
    **options: Any,
) -> tuple[Tensor, Metrics]:
    """Compute `grpo_loss` of answers under a linear head.

        logps = fused_linear_logprobs(weight, x, y);  loss = grpo_loss(logps, advantages, mask)

    Args:
        weight: (V, H), the head.
        x: (B, T, H), hidden states.
        y: (B, T), the next token at each position; ignore_index where there is none.
        advantages: (B,) or (B, T).
        mask: (B, T), which tokens of y count; None: all.
        ref_logps: (B, T), the reference's log-probabilities of tokens; None: of its head, if beta
            is not 0.
        ref_weight, ref_x, ref_bias: the reference's head and hidden states, if ref_logps is None.
            No gradient passes.
        token_metrics: whether entropies are computed, which entropy_coef and top_entropy_quantile
            need, and entropy and mean_token_accuracy reported.
        options: bias, chunk_size, temperature, logit_scale, softcap, ignore_index as in
            `fused_linear_logprobs`; all others as in `grpo_loss`.

    Returns:
        The loss and the metrics of `grpo_loss`, with mean_token_accuracy.

    Raises:
        TypeError, ValueError: as `fused_linear_logprobs` and `grpo_loss`.

    Precision: that of `fused_linear_logprobs`.
    Memory: that of `fused_linear_logprobs`, and a few tensors of B · T numbers.
    Source: see `grpo_loss`.
    """
    op = "fused_linear_grpo"
    head, loss_options = _split(options)
    tokens = _tokens(op, weight, x, y, head, token_metrics)
    counts = _counts(op, mask, tokens)
    if loss_options.get("beta") and ref_logps is None:
        ref_logps = _reference(op, y, head, ref_weight, ref_x, ref_bias)
    loss, metrics = grpo_loss(
        tokens.logps, advantages, counts,
        ref_logps=ref_logps, entropies=tokens.entropies, **loss_options,
    )  # fmt: skip
    return loss, _token_metrics(tokens, counts, len(y)) | metrics
