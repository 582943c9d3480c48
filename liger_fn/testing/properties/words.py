"""What an op says of itself: its signature, its documentation, its errors."""

import inspect
import re

import torch

from liger_fn.testing.properties.registry import holds_for
from liger_fn.testing.spec import Draw

SECTIONS = ("Args:", "Returns:", "Raises:", "Precision:", "Memory:", "Source:")


@holds_for("spec")
def signature(spec, case, device):
    """The reference takes what the op takes, by the same names and defaults."""
    ours, theirs = inspect.signature(spec.op), inspect.signature(spec.reference)
    for p, q in zip(ours.parameters.values(), theirs.parameters.values(), strict=True):
        assert (p.name, p.kind, p.default) == (q.name, q.kind, q.default), f"op {p}, reference {q}"


@holds_for("spec")
def documentation(spec, case, device):
    """One line, then every section in order; every argument is explained."""
    text = inspect.getdoc(spec.op) or ""
    first, *rest = text.splitlines()
    assert first.endswith("."), "the first line must be one sentence"
    assert rest, "there is but one line"
    assert not rest[0], "the first line must stand alone"

    heads = [h for h in re.findall(r"^(\w+:)", text, re.MULTILINE) if h in SECTIONS]
    assert heads == list(SECTIONS), f"the sections must be {SECTIONS}; got {heads}"

    arguments = text[text.index("Args:") : text.index("Returns:")]
    explained = {
        n for line in re.findall(r"^ {4}([\w, ]+):", arguments, re.M) for n in line.split(", ")
    }
    missing = set(inspect.signature(spec.op).parameters) - explained
    assert not missing, f"Args does not explain {missing}"


@holds_for("spec")
def errors(spec, case, device):
    """Every bad call fails with its error, and with one sentence in the form of the house."""
    assert spec.errors, "the spec names no bad call"
    form = re.compile(rf"{spec.name}: `\w+` must [^\n]+; got [^\n]+\.")
    for bad in spec.errors:
        error = _raised(spec.op, bad.make(Draw(device, torch.float32)))
        assert isinstance(error, bad.error), f"{bad.id}: {bad.error} expected; got {error!r}"
        assert bad.sentence in str(error), f"{bad.id}: {error}"
        assert form.fullmatch(str(error)), f"{bad.id}: the sentence is {error}"


def _raised(op, arguments) -> Exception | None:
    try:
        op(**arguments)
    except Exception as error:
        return error
    return None
