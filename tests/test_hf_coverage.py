"""Every causal and image-text architecture of transformers, small, with every op in it that fits.

Loss and all gradients must be those of the untouched model, and undoing must leave it untouched.
The counts may not fall below what was measured on a version of transformers.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from packaging.version import Version

from liger_fn import functional
from liger_fn.functional import using
from liger_fn.hf import apply
from liger_fn.hf.install import installed, op_names
from liger_fn.testing import tiny_models
from liger_fn.testing.tiny_models import loss_and_gradients

# By the oldest version of transformers they were measured on: the architectures that run, and those
# in which an op is called.
OPS = ("run", "fused_linear_cross_entropy", "rms_norm", "rope", "swiglu", "geglu")
FLOORS = {
    ("5.17", "causal-lm"): (166, 165, 103, 106, 83, 12),
    ("5.17", "image-text-to-text"): (68, 67, 61, 62, 54, 6),
    ("5.24", "causal-lm"): (192, 188, 124, 127, 102, 12),
    ("5.24", "image-text-to-text"): (83, 82, 75, 74, 66, 6),
}


@dataclass
class Outcome:
    """What became of one architecture."""

    model_type: str
    ops: dict[str, int] = field(default_factory=dict)
    skipped: str = ""
    wrong: str = ""


def difference(got, expected) -> str:
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


def try_architecture(model_type: str, task: str) -> Outcome:
    outcome = Outcome(model_type)
    try:
        model = tiny_models.with_every_tail(tiny_models.tiny_model(model_type, task))
        inputs = tiny_models.tiny_inputs(model)
        expected = loss_and_gradients(model, inputs)
    except Exception as error:
        outcome.skipped = f"{type(error).__name__}: {error}".split("\n")[0][:100]
        return outcome
    report = apply(model)
    extra = {"skip_logits": True} if "fused_linear_cross_entropy" in report.replaced() else {}
    with counted_calls() as outcome.ops:
        outcome.wrong = difference(loss_and_gradients(model, {**inputs, **extra}), expected)
    report.undo()
    if installed(model) or difference(loss_and_gradients(model, inputs), expected):
        outcome.wrong += " not undone"
    return outcome


@contextlib.contextmanager
def counted_calls():
    """Count the calls of every op: what is installed may still be idle."""
    calls: Counter[str] = Counter()

    def counted(name, op):
        def call(*args, **kwargs):
            calls[name] += 1
            return op(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in op_names():
            patch.setattr(functional, name, counted(name, getattr(functional, name)))
        yield calls


def table(task: str, outcomes: list[Outcome]) -> str:
    ran = [o for o in outcomes if not o.skipped]
    lines = [f"{task}, transformers {transformers.__version__}: {len(ran)} of {len(outcomes)} run"]
    lines += [f"  {op:28} {n:4}" for op, n in sorted(counts(outcomes).items())]
    lines += [f"  wrong: {o.model_type}: {o.wrong}" for o in outcomes if o.wrong]
    lines += [f"  skipped: {o.model_type}: {o.skipped}" for o in outcomes if o.skipped]
    return "\n".join(lines)


def counts(outcomes: list[Outcome]) -> dict[str, int]:
    """The number of architectures that run, and of those in which each op is used."""
    ran = [o for o in outcomes if not o.skipped]
    return {"run": len(ran), **Counter(op for o in ran for op in o.ops)}


def floor_of(task: str) -> dict[str, int]:
    here = Version(transformers.__version__)
    known = [version for version, t in FLOORS if t == task and Version(version) <= here]
    return dict(zip(OPS, FLOORS[max(known, key=Version), task], strict=True))


@pytest.mark.parametrize("task", list(tiny_models.MAPPINGS))
def test_every_architecture_is_equal_with_all_ops(task: str, capsys) -> None:
    transformers.logging.set_verbosity_error()
    types = [t for t in tiny_models.model_types(task) if t not in tiny_models.NOT_TRAINABLE]
    with using("reference"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes = [try_architecture(model_type, task) for model_type in types]
    with capsys.disabled():
        print("\n" + table(task, outcomes))
    assert not [(o.model_type, o.wrong) for o in outcomes if o.wrong]
    found = counts(outcomes)
    assert all(found.get(op, 0) >= least for op, least in floor_of(task).items())
