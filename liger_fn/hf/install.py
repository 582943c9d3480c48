"""Put ops into a model, say what was done, and take everything out again.

    report = apply(model)          replace what is proved equal; print(report)
    report.undo()                  exactly as before
    undo(model)                    the same without the report, for a deepcopy
    with patched(model): ...       for a while

Nothing is registered and no configuration is changed. What is installed can be read off the model:
methods on instances that bear a mark, two changed classes (`output_head.py`), and a name in the
globals of the modelling file (`rotary.py`). That is why applying twice changes nothing, and why a
deepcopy can be undone like the original.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import nn
from torch._guards import CompileContext
from transformers import PreTrainedModel

from liger_fn.hf import causal_mask
from liger_fn.hf.families import FAMILIES, Place
from liger_fn.hf.output_head import FUSED, PLAIN, DeferringModel, Swapped, defer, undefer
from liger_fn.hf.probe import Proof, Rejected, check_own, fingerprint, slot_of
from liger_fn.hf.rotary import Domain, guarded, prove_rotary, rotary_functions

LOSSES = (FUSED, PLAIN)
IDLE_IN_TRL = (
    "idle in TRL's own trainers, which make their loss from the head's weight; "
    "those of liger_fn.hf.trl use it"
)


def op_names() -> tuple[str, ...]:
    """The names that `ops` may contain, in the order of the report."""
    ops = (family.op for family in FAMILIES)
    return tuple(dict.fromkeys(["rope", *ops, causal_mask.OP, *LOSSES]))


# Patches. Each can be undone, in any order, also when another library has wrapped it since.


@dataclass
class MethodPatch:
    """A method of ours on an instance."""

    module: nn.Module
    method: str
    before: Any = None

    @classmethod
    def install(cls, module: nn.Module, method: str, proof: Proof) -> MethodPatch:
        slot = slot_of(module, method)
        before = module.__dict__.get(slot)
        run: Any = proof.candidate.run
        run.liger_proof = proof
        module.__dict__[slot] = MethodType(run, module)
        return cls(module, method, before)

    def undo(self) -> None:
        for slot in (self.method, "_old_forward"):
            if proof_of(self.module.__dict__.get(slot)) is None:
                continue
            if self.before is not None:
                self.module.__dict__[slot] = self.before
            elif slot == "_old_forward":
                self.module.__dict__[slot] = MethodType(type(self.module).forward, self.module)
            else:
                del self.module.__dict__[slot]


@dataclass
class LossPatch:
    """A model and a head that have changed class."""

    model: nn.Module

    def undo(self) -> None:
        undefer(self.model)


@dataclass
class RotaryPatch:
    """A model's share in a rotary function that was replaced in the globals of its file."""

    model: nn.Module
    rotary: Rotary

    def undo(self) -> None:
        self.rotary.release(self.model)


class Rotary:
    """A replaced global function, and the models that use it."""

    installed: ClassVar[dict[tuple[int, str], Rotary]] = {}

    def __init__(self, namespace: dict[str, Any], name: str):
        self.namespace, self.name = namespace, name
        self.original: Callable = namespace[name]
        self.domain: Domain = prove_rotary(self.original)
        self.users: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    @classmethod
    def find(cls, namespace: dict[str, Any], name: str) -> Rotary:
        """Return the rotary function of that name, proved, and installed if it is not yet."""
        key = (id(namespace), name)
        if key not in cls.installed:
            rotary = cls(namespace, name)
            namespace[name] = guarded(rotary.original, rotary.domain)
            cls.installed[key] = rotary
        return cls.installed[key]

    def serve(self, model: nn.Module) -> None:
        self.users.add(model)
        weakref.finalize(model, self._forget).atexit = False

    def release(self, model: nn.Module) -> None:
        self.users.discard(model)
        self._restore_if_unused()

    def _forget(self) -> None:
        """A user was collected; whatever ran meanwhile may be Dynamo, which has read the function.

        It then stays until it is asked for again: it computes the same.
        """
        if CompileContext.try_get() is None:
            self._restore_if_unused()

    def _restore_if_unused(self) -> None:
        key = (id(self.namespace), self.name)
        # Listed, not counted: a model that is just being collected is still counted.
        if not list(self.users) and self.installed.get(key) is self:
            del self.installed[key]
            self.namespace[self.name] = self.original


def proof_of(method: Any) -> Proof | None:
    """The proof that a method of ours carries; None for any other."""
    return getattr(getattr(method, "__func__", None), "liger_proof", None)


def installed(model: nn.Module) -> list[MethodPatch | LossPatch | RotaryPatch]:
    """Read off a model what of ours is in it."""
    patches: list[Any] = [
        MethodPatch(module, method)
        for module in model.modules()
        for method in ("forward", "_apply_gate")
        if proof_of(module.__dict__.get(slot_of(module, method))) is not None
    ]
    if any(isinstance(module, Swapped) for module in model.modules()):
        patches.append(LossPatch(model))
    patches += [RotaryPatch(model, r) for r in Rotary.installed.values() if model in r.users]
    return patches


# The report.


@dataclass
class Row:
    """A class of modules (or a function) and what became of it."""

    name: str
    op: str = ""
    how: str = ""
    error32: float | None = None
    error16: float | None = None
    reason: str = ""
    count: int = 0

    def cells(self) -> tuple[str, ...]:
        errors = ("" if e is None else f"{e:.1e}" for e in (self.error32, self.error16))
        return (self.name, str(self.count), self.how or "-", *errors, self.reason)


@dataclass(repr=False)
class Report:
    """What `apply` did to a model. Print it for a table; `undo()` takes it back.

    Args:
        model: the class name of the model.
        rows: one for each class of modules (and way of replacing it), replaced or not.
        patches: what was installed by this call.
        check: the losses before and after, if `verify="full"`.
    """

    model: str
    rows: list[Row] = field(default_factory=list)
    patches: list[Any] = field(default_factory=list)
    check: str = ""

    def undo(self) -> None:
        """Take back everything that this call installed. Calling it again does nothing."""
        while self.patches:
            self.patches.pop().undo()

    def replaced(self) -> dict[str, int]:
        """Count, for each op, the modules and functions where it now is."""
        counts: Counter[str] = Counter()
        for row in self.rows:
            if row.op:
                counts[row.op] += row.count
        return dict(counts)

    def add(self, row: Row) -> None:
        """Count a module in the row that is like `row`."""
        key = (row.name, row.how, row.reason)
        known = next((r for r in self.rows if (r.name, r.how, r.reason) == key), row)
        if known is row:
            self.rows.append(row)
        known.count += 1

    def __str__(self) -> str:
        head = ("module", "count", "replaced by", "error fp32", "error bf16", "note")
        body = [row.cells() for row in sorted(self.rows, key=lambda row: not row.op)]
        rule = tuple("-" * max(map(len, column)) for column in zip(head, *body, strict=True))
        table = aligned([head, rule, *body])
        return "\n".join([self.model, table, *filter(None, [self.check])])

    __repr__ = __str__


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Set lines of cells in columns, flush left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


# What users call.


def apply(
    model: PreTrainedModel, *, ops: Collection[str] | None = None, verify: bool | str = True
) -> Report:
    """Replace every part of a Hugging Face model for which an op is proved to compute the same.

    Structure picks the candidates, a comparison on numbers decides (`probe.py`); the name of the
    model plays no part. Applying twice changes nothing.

    Args:
        model: any `PreTrainedModel`, also empty (meta), sharded, offloaded or with adapters. Not
            for `nn.DataParallel`, whose replicas share the methods of instances: use DDP.
        ops: which ops to use; by default all but "cross_entropy".
            "fused_linear_cross_entropy": while the model trains, or with `skip_logits=True`, logits
            are not computed (`skip_logits=False` computes them).
            "cross_entropy": logits are computed, and their loss is our op's.
            "rope": replaces a function of the modelling file; while one model of that file uses
            it, all of them do.
            "causal_mask": no op; compiled, a model that is given neither mask nor positions nor
            cache makes no mask, as it makes none uncompiled.
            "fused_moe": runs where there are kernels for it, not on a CPU, and yields to an
            implementation that is chosen by `model.set_experts_implementation`.
        verify: True; or "full" to run the model on a small batch before and after as well, the
            report then has both losses. The proofs cannot be switched off: they also choose.

    Returns:
        The report. `print(report)` shows it, `report.undo()` restores the model.

    Raises:
        TypeError: `model` is not a `PreTrainedModel`, or `ops` no collection of names.
        ValueError: `ops` has an unknown name, or both losses.
    """
    chosen = check_ops(model, ops, verify)
    model = _unwrapped(model)
    report = Report(type(model).__name__)
    before = _loss(model, None) if verify == "full" else None
    try:
        _replace_methods(model, chosen, report)
        if "rope" in chosen:
            _replace_rotary(model, report)
        if causal_mask.OP in chosen:
            _leave_out_masks(model, report)
        for mode in LOSSES:
            if mode in chosen:
                _replace_loss(model, mode, report)
    except BaseException:
        report.undo()
        raise
    if before is not None:
        report.check = f"loss before: {before}; after: {_loss(model, True)}"
    return report


@contextlib.contextmanager
def patched(model: PreTrainedModel, **options: Any) -> Iterator[Report]:
    """Apply within a block; the options are those of `apply`."""
    report = apply(model, **options)
    try:
        yield report
    finally:
        report.undo()


def undo(model: nn.Module) -> None:
    """Take everything of ours out of a model, also out of a deepcopy, which has no report."""
    for patch in installed(_unwrapped(model)):
        patch.undo()


def check_ops(model: Any, ops: Collection[str] | None, verify: bool | str) -> tuple[str, ...]:
    """Check the arguments of `apply`, and return the ops to use."""
    if not isinstance(_unwrapped(model), PreTrainedModel):
        got = f"{type(model).__name__}{_way_to_the_model(model)}"
        raise TypeError(f"apply: `model` must be a PreTrainedModel; got {got}.")
    if verify is not True and verify != "full":
        raise ValueError(f"apply: `verify` must be True or 'full'; got {verify!r}.")
    names = op_names()
    if ops is None:
        ops = [name for name in names if name != PLAIN]
    if not isinstance(ops, Collection) or isinstance(ops, Mapping):
        raise TypeError(f"apply: `ops` must be a collection of names; got {ops!r}.")
    chosen = (ops,) if isinstance(ops, str) else tuple(ops)
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise ValueError(f"apply: `ops` must be among {', '.join(names)}; got {unknown[0]!r}.")
    if FUSED in chosen and PLAIN in chosen:
        raise ValueError(f"apply: `ops` must have one of {FUSED} and {PLAIN}; got both.")
    return chosen


def _replace_methods(model: nn.Module, chosen: Collection[str], report: Report) -> None:
    """Try every module whose structure suggests an op; modules that are alike share one proof."""
    places: dict[Place, list] = {}
    for family in FAMILIES:
        places.setdefault(family.place, [])
        if family.op in chosen:
            places[family.place].append(family)
    proofs: dict[tuple, Proof | str] = {}
    for module in model.modules():
        for place, families in places.items():
            if families and place.suggests(module):
                row = _replace_method(module, place, families, proofs, report.patches)
                report.add(row)
                # Experts that are replaced as a whole need no gate.
                if row.op:
                    break


def _replace_method(module, place, families, proofs, patches) -> Row:
    name = type(module).__name__ + ("" if place.method == "forward" else f".{place.method}")
    proof = proof_of(module.__dict__.get(slot_of(module, place.method)))
    if proof is not None:
        return _row(name, proof)
    key = (place, fingerprint(module))
    if key not in proofs:
        proofs[key] = _proof_or_reason(module, place, families)
    found = proofs[key]
    if isinstance(found, str):
        return Row(name, reason=found)
    patches.append(MethodPatch.install(module, place.method, found))
    return _row(name, found)


def _proof_or_reason(module, place, families) -> Proof | str:
    try:
        check_own(module, place.method)
        return place.prove(module, families)
    except Rejected as reason:
        return str(reason)


def _row(name: str, proof: Proof) -> Row:
    candidate = proof.candidate
    return Row(name, candidate.op, candidate.how, proof.error32, proof.error16)


def _replace_rotary(model: nn.Module, report: Report) -> None:
    for namespace, name in rotary_functions(model):
        label = f"{name}()"
        try:
            rotary = Rotary.find(namespace, name)
        except Rejected as reason:
            report.add(Row(label, reason=str(reason)))
            continue
        if model not in rotary.users:
            rotary.serve(model)
            report.patches.append(RotaryPatch(model, rotary))
        domain = rotary.domain
        report.add(Row(label, "rope", domain.how, domain.error32, domain.error16))


def _leave_out_masks(model: nn.Module, report: Report) -> None:
    for module in causal_mask.masked_models(model):
        name = f"{type(module).__name__}, {causal_mask.MAKER}()"
        proof = proof_of(module.__dict__.get(slot_of(module, "forward")))
        if proof is None:
            try:
                proof = causal_mask.prove_unmasked(module)
            except Rejected as reason:
                report.add(Row(name, reason=str(reason)))
                continue
            report.patches.append(MethodPatch.install(module, "forward", proof))
        report.add(_row(name, proof))


def _replace_loss(model: Any, mode: str, report: Report) -> None:
    has = model._liger_mode if isinstance(model, DeferringModel) else None
    if has not in (None, mode):
        raise ValueError(
            f"apply: `ops` must keep the model's {has}; got {mode} (undo the first report before)."
        )
    try:
        path = defer(model, mode)
    except Rejected as reason:
        report.add(Row("loss", reason=str(reason)))
        return
    if has is None:
        report.patches.append(LossPatch(model))
    note = IDLE_IN_TRL if "trl" in sys.modules else ""
    report.add(Row(f"loss ({path})", mode, mode, reason=note))


def _unwrapped(model: Any) -> Any:
    """The transformers model inside PEFT's wrapper; anything else as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _way_to_the_model(wrapper: Any) -> str:
    """Say where a pipeline, a compiled model or DDP has its model; nothing if there is none."""
    for name in ("_orig_mod", "module", "model"):
        if isinstance(getattr(wrapper, name, None), PreTrainedModel):
            return f" (pass its `.{name}`)"
    return ""


def _loss(model: Any, skip_logits: bool | None) -> str:
    """The loss of a small batch, without dropout; or why there is none."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        vocab = model.config.get_text_config().vocab_size
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocab, (2, 16), generator=g).to(model.device)
        extra = {"skip_logits": True} if skip_logits and isinstance(model, DeferringModel) else {}
        with torch.no_grad():
            return f"{model(input_ids=ids, labels=ids, **extra).loss.item():.6f}"
    except Exception as error:
        return f"none ({type(error).__name__}: {error})"
    finally:
        for module, mode in training.items():
            module.training = mode
