"""Try the adapter on every architecture of transformers: what `python -m liger_fn models` prints.

Each is made small, with every optional tail of its loss switched on, and trained for a step on the
CPU, untouched and with everything applied; loss and every gradient must be equal. An op counts
where it was called: what is installed may still be idle.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from tqdm import tqdm

from liger_fn import functional
from liger_fn.functional import using
from liger_fn.hf import apply
from liger_fn.hf.families import GELU_NAMES
from liger_fn.hf.install import Report, aligned, installed, op_names
from liger_fn.hf.output_head import FUSED
from liger_fn.testing import tiny_models
from liger_fn.testing.tiny_models import loss_and_gradients

OPS = (
    *(FUSED, "rms_norm", "layer_norm", "gated_rms_norm", "rope"),
    *("fused_moe", "swiglu", "geglu", "gated_activation", "relu_squared"),
)
HEADS = {FUSED: "fused head and loss", "fused_moe": "experts (fused_moe)"}


@dataclass
class Outcome:
    """What became of one architecture.

    Args:
        calls: how often each op was called in one step of training.
        notes: what was not replaced, and why.
        skipped: why it could not be run; empty if it could.
        wrong: what differs from the untouched model; empty if nothing does.
    """

    model_type: str
    calls: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    skipped: str = ""
    wrong: str = ""


def try_all(task: str, types: Iterable[str]) -> list[Outcome]:
    """Try architectures one after another, behind a progress bar where somebody looks on."""
    transformers.logging.set_verbosity_error()
    bar = tqdm(list(types), desc=task, file=sys.stderr, leave=False, disable=None)
    with using("reference"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [try_one(model_type, task) for model_type in bar]


def try_one(model_type: str, task: str) -> Outcome:
    """Train one architecture for a step, untouched, with everything applied, and undone."""
    outcome = Outcome(model_type)
    try:
        model = tiny_models.with_every_tail(tiny_models.tiny_model(model_type, task))
        inputs = tiny_models.tiny_inputs(model)
        expected = loss_and_gradients(model, inputs)
    except Exception as error:
        outcome.skipped = f"{type(error).__name__}: {error}".split("\n")[0][:100]
        return outcome
    report = apply(model)
    extra = {"skip_logits": True} if FUSED in report.replaced() else {}
    with counted_calls() as outcome.calls:
        outcome.wrong = difference(loss_and_gradients(model, {**inputs, **extra}), expected)
    outcome.notes = notes(report, outcome.calls)
    report.undo()
    if installed(model) or difference(loss_and_gradients(model, inputs), expected):
        outcome.wrong += " not undone"
    return outcome


@contextlib.contextmanager
def counted_calls() -> Iterator[Counter[str]]:
    """Count the calls of every op of the adapter."""
    calls: Counter[str] = Counter()
    # What has no op of its name is done without one.
    names = [name for name in (*op_names(), "gated_linear") if hasattr(functional, name)]
    ops = {name: getattr(functional, name) for name in names}

    def counted(name, op):
        def call(*args, **kwargs):
            calls[unit_of(**kwargs) if name == "gated_linear" else name] += 1
            return op(*args, **kwargs)

        return call

    try:
        for name, op in ops.items():
            setattr(functional, name, counted(name, op))
        yield calls
    finally:
        for name, op in ops.items():
            setattr(functional, name, op)


def unit_of(activation: str = "silu", **bounds: Any) -> str:
    """Name the op that computes the unit of a `gated_linear` by itself."""
    if bounds:
        return "gated_activation"
    return "geglu" if activation in GELU_NAMES.values() else "swiglu"


def difference(got: tuple, expected: tuple) -> str:
    """Say what differs; nothing if nothing does.

    Sums in another order differ by a few 1e-6 of the largest gradient of a tensor; experts and
    recurrences magnify that. What is dropped or doubled shows a hundred times more.
    """
    loss, gradients = got
    expected_loss, expected_gradients = expected
    if not torch.allclose(loss, expected_loss, rtol=1e-5, atol=1e-6):
        return f"loss {loss.item():.6f} instead of {expected_loss.item():.6f}"
    if gradients.keys() != expected_gradients.keys():
        return f"gradients of {sorted(gradients.keys() ^ expected_gradients.keys())[:3]}"
    for name, gradient in gradients.items():
        size = expected_gradients[name].abs().max().item() + 1e-4
        error = (gradient - expected_gradients[name]).abs().max().item()
        if not error <= 2e-3 * size:
            return f"gradient of {name}: off by {error:.1e}, its size is {size:.1e}"
    return ""


def notes(report: Report, calls: dict[str, int]) -> list[str]:
    """Say what was not replaced, and what was and is idle."""
    left = [f"{row.name} {row.reason}" for row in report.rows if row.reason]
    return left + [f"{op} was not called" for op in report.replaced() if op not in calls]


def counts(outcomes: list[Outcome]) -> dict[str, int]:
    """The number of architectures that run, and of those in which each op is called."""
    ran = [outcome for outcome in outcomes if not outcome.skipped]
    return {"run": len(ran), **{op: sum(op in outcome.calls for outcome in ran) for op in OPS}}


# What is printed.


def table(outcomes: list[Outcome]) -> str:
    """A line for each architecture: which ops are called, and why not the others."""
    head = ("model type", *(HEADS.get(op, op) for op in OPS), "not replaced")
    return aligned([head, *(_cells(outcome) for outcome in outcomes)])


def _cells(outcome: Outcome) -> tuple[str, ...]:
    said = [f"WRONG: {outcome.wrong}"] if outcome.wrong else []
    said += [f"cannot be run here: {outcome.skipped}"] if outcome.skipped else outcome.notes
    used = ("yes" if op in outcome.calls else "-" for op in OPS)
    return outcome.model_type, *used, "; ".join(said)


def markdown(outcomes: dict[str, list[Outcome]]) -> str:
    """The table of the README: a row for each task, how many architectures get which op."""
    head = ("transformers", "run, all equal", *(HEADS.get(op, op) for op in OPS))
    rows = [head, ("---",) * len(head)]
    for task, tried in outcomes.items():
        numbers = counts(tried)
        equal = numbers["run"] - sum(bool(outcome.wrong) for outcome in tried)
        used = (str(numbers[op]) for op in OPS)
        rows.append((row_name(task), f"{equal} of {len(tried)}", *used))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def row_name(task: str) -> str:
    """How the README calls a task on this version of transformers."""
    version = ".".join(transformers.__version__.split(".")[:2])
    return f"{version}, {task.removesuffix('-lm').removesuffix('-to-text')}"


def main(tasks: list[str], only: list[str], as_markdown: bool) -> int:
    """Try the architectures of the tasks, print what became of them; 1 if one is not equal.

    Raises:
        ValueError: `only` names a type that none of the tasks has.
    """
    types = {task: tiny_models.model_types(task) for task in tasks}
    unknown = [name for name in only if not any(name in known for known in types.values())]
    if unknown:
        raise ValueError(f"models: `--only` must name model types of the task; got {unknown[0]!r}.")
    outcomes = {}
    for task, known in types.items():
        trainable = [name for name in known if name not in tiny_models.NOT_TRAINABLE]
        chosen = [name for name in known if name in only] if only else trainable
        outcomes[task] = try_all(task, chosen)
        if not as_markdown and chosen:
            print(f"{task}, transformers {transformers.__version__}\n\n{table(outcomes[task])}\n")
    print(markdown(outcomes))
    return int(any(outcome.wrong for tried in outcomes.values() for outcome in tried))
