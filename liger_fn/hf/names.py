"""`apply_to_llama` and its siblings, one for each model type of transformers, and the Auto classes.

Nothing here is written by model: names come from transformers' auto mappings, flags from a look at
an empty (meta) model of the type.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import Any, ClassVar

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from liger_fn.hf.install import Report, apply, op_names, patched, undo
from liger_fn.hf.output_head import FUSED, PLAIN

MAPPINGS = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
OFF_BY_DEFAULT = (PLAIN,)


class ClassReport:
    """What was done to a family of classes: every model of it that is made afterwards is patched.

    `undo()` restores the classes, and the models made in the meantime that still live.
    """

    installed: ClassVar[dict[type, ClassReport]] = {}

    def __init__(self, base: Any, ops: tuple[str, ...]):
        self.base, self.ops = base, ops
        self.models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.own = base.__dict__.get("post_init")

    def install(self) -> ClassReport:
        """Make the constructor of every model of the family end with `apply`."""
        report, call_own = self, self.base.post_init

        @functools.wraps(call_own)
        def post_init(self):
            call_own(self)
            apply(self, ops=report.ops)
            report.models.add(self)

        self.base.post_init = post_init
        self.installed[self.base] = self
        return self

    def release(self) -> None:
        """Restore the class; leave the models as they are."""
        if self.installed.get(self.base) is not self:
            return
        del self.installed[self.base]
        if self.own is None:
            del self.base.post_init
        else:
            self.base.post_init = self.own

    def undo(self) -> None:
        """Restore the class and every live model that was made since."""
        self.release()
        for model in list(self.models):
            undo(model)
        self.models.clear()

    def __str__(self) -> str:
        return f"{self.base.__name__}: new models get {', '.join(self.ops)}"

    __repr__ = __str__


class ClassReports(list):
    """The reports of several families of classes."""

    def undo(self) -> None:
        """Undo all of them."""
        for report in self:
            report.undo()

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    __repr__ = __str__


class ApplyTo:
    """Use liger_fn's ops in {} models.

    Each flag is an op: True puts it wherever it is proved to compute the same. With `model`, that
    model is changed; without, every model of the type that is made afterwards.

    Args:
        fused_linear_cross_entropy: while the model trains, its logits are never made.
        cross_entropy: logits are made and our op computes their loss, instead of the above.
        model: the model to change, or None.

    Returns:
        A report: print it for a table, call its `undo()` to restore everything.

    Raises:
        TypeError: a flag is not one of the above, or not True or False.
        ValueError: both losses are asked for.
    """

    def __init__(self, model_type: str):
        self.model_type = model_type
        self.__name__ = self.__qualname__ = function_name(model_type)
        self.__module__ = "liger_fn.hf"
        self.__doc__ = (ApplyTo.__doc__ or "").format(model_type)

    @functools.cached_property
    def __signature__(self) -> inspect.Signature:
        defaults = {name: name not in OFF_BY_DEFAULT for name in _flags(self.model_type)}
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [
            *(
                inspect.Parameter(n, kind, default=d, annotation="bool")
                for n, d in defaults.items()
            ),
            inspect.Parameter("model", kind, default=None, annotation="PreTrainedModel | None"),
        ]
        return inspect.Signature(parameters, return_annotation="Report | ClassReports")

    def __call__(self, *args: Any, **kwargs: Any) -> Report | ClassReports:
        unknown = [name for name in kwargs if name not in self.__signature__.parameters]
        if unknown:
            known = ", ".join(self.__signature__.parameters)
            raise TypeError(f"{self.__name__}: a flag must be one of {known}; got {unknown[0]!r}.")
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        flags = dict(bound.arguments)
        model = flags.pop("model")
        ops = chosen_ops(flags, self.__name__)
        if model is not None:
            return apply(model, ops=ops)
        return ClassReports(_apply_to_classes(base, ops) for base in _bases(self.model_type))

    def __repr__(self) -> str:
        return f"<function liger_fn.hf.{self.__name__}{self.__signature__}>"


def chosen_ops(flags: dict[str, bool], caller: str) -> tuple[str, ...]:
    """Turn flags into names of ops."""
    for name, value in flags.items():
        # A model in the place of the first flag would change every model of its type.
        if not isinstance(value, bool):
            got = f"{type(value).__name__} (a model is passed as `model=`)"
            raise TypeError(f"{caller}: `{name}` must be True or False; got {got}.")
    if flags.get(FUSED) and flags.get(PLAIN):
        raise ValueError(f"{caller}: `{PLAIN}` must be False if {FUSED} is True; got both.")
    return tuple(name for name, value in flags.items() if value)


def function_name(model_type: str) -> str:
    """The name of the function for a model type."""
    return "apply_to_" + model_type.replace("-", "_").replace(".", "_")


@functools.cache
def functions() -> dict[str, str]:
    """The name of every `apply_to_...` function, and the model type it is for."""
    types = dict.fromkeys(model_type for mapping in MAPPINGS for model_type in mapping)
    return {function_name(model_type): model_type for model_type in types}


@functools.cache
def apply_to(model_type: str) -> ApplyTo:
    """The `apply_to_...` function for a model type."""
    return ApplyTo(model_type)


def _classes(model_type: str) -> list[type[PreTrainedModel]]:
    names = [mapping[model_type] for mapping in MAPPINGS if model_type in mapping]
    first = [name if isinstance(name, str) else name[0] for name in names]
    return [getattr(transformers, name) for name in dict.fromkeys(first)]


def _bases(model_type: str) -> list[type]:
    """The classes whose `post_init` ends every constructor: LlamaPreTrainedModel for llama."""
    mros = (model_class.__mro__ for model_class in _classes(model_type))
    families = ([cls for cls in mro if issubclass(cls, PreTrainedModel)] for mro in mros)
    return list(dict.fromkeys(family[-2] for family in families))


def _apply_to_classes(base: type, ops: tuple[str, ...]) -> ClassReport:
    before = ClassReport.installed.get(base)
    if before is not None and before.ops == ops:
        return before
    report = ClassReport(base, ops)
    if before is not None:
        before.release()
        report.models, report.own = before.models, before.own
    return report.install()


def _flags(model_type: str) -> list[str]:
    """The ops that have something to replace in a model of the type, in their usual order."""
    found: set[str] = set()
    for model_class in _classes(model_type):
        try:
            found |= set(_replaced_in(model_class, CONFIG_MAPPING[model_type]()))
        except Exception:
            # Some need a package that is not installed, or a configuration that is not the default.
            found |= set(op_names())
    if FUSED in found:
        found.add(PLAIN)
    order = ("rope", "swiglu", "geglu", PLAIN, FUSED, "rms_norm")
    return [op for op in (*order, *(op for op in op_names() if op not in order)) if op in found]


def _replaced_in(model_class: Any, config: Any) -> dict[str, int]:
    wanted = model_class.config_class
    # A composite configuration for a class for text only, as AutoModel allows.
    parts = (part for part in (config, *vars(config).values()) if isinstance(part, wanted))
    with torch.device("meta"):
        model = model_class(next(parts, config))
    with patched(model) as report:
        return report.replaced()


class _Patches:
    """What the Auto classes add: our flags are taken out of the arguments, the model is patched."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model and use liger_fn's ops in it; the flags are the names of the ops."""
        parent: Any = super()
        ops = cls._take_ops(kwargs)
        return cls._patch(parent.from_pretrained(*args, **kwargs), ops)

    @classmethod
    def from_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a model and use liger_fn's ops in it; the flags are the names of the ops."""
        parent: Any = super()
        ops = cls._take_ops(kwargs)
        return cls._patch(parent.from_config(*args, **kwargs), ops)

    @classmethod
    def _take_ops(cls, kwargs: dict[str, Any]) -> tuple[str, ...]:
        flags = {op: kwargs.pop(op, op not in OFF_BY_DEFAULT) for op in op_names()}
        return chosen_ops(flags, cls.__name__)

    @staticmethod
    def _patch(model: PreTrainedModel, ops: tuple[str, ...]) -> PreTrainedModel:
        apply(model, ops=ops)
        return model


class AutoLigerKernelForCausalLM(_Patches, AutoModelForCausalLM):
    """`AutoModelForCausalLM` with liger_fn's ops; also takes the flags of `apply_to_...`."""


class AutoLigerKernelForImageTextToText(_Patches, AutoModelForImageTextToText):
    """`AutoModelForImageTextToText` with liger_fn's ops; also takes the flags of `apply_to_...`."""
