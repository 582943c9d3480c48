"""The output head and its model: what lets a loss be computed without logits, and takes it back.

While a model computes a loss, its head returns a `Deferred` (`deferred.py`); when that reaches
`F.cross_entropy`, the head is called again, with the targets, and runs the fused op on its weight.

Both the head and the model keep their object and only change class, to a subclass of the same name.
A copy (deepcopy) stays as it is; a pickle holds the original classes.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from liger_fn import functional
from liger_fn.hf.deferred import Deferred, DeferredSum, real_values
from liger_fn.hf.probe import Rejected, check_own, is_own, slot_of

FUSED, PLAIN = "fused_linear_cross_entropy", "cross_entropy"
# Whose hooks care for the weights of a module and not for what it returns.
SHARDING = ("torch.distributed.fsdp", "torch.distributed._composable", "deepspeed", "accelerate")


class Swapped:
    """What the two subclasses share: where they came from, how they are copied and pickled."""

    liger_original: type

    def __deepcopy__(self, memo):
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__dict__, memo))
        return new

    def __reduce_ex__(self, protocol):
        state = {k: v for k, v in self.__dict__.items() if not k.startswith("_liger")}
        return copyreg._reconstructor, (type(self).liger_original, object, None), state


class DeferringHead(Swapped):
    """An output head that returns a `Deferred` while its model computes a loss."""

    # The op, and the thread that computes the loss: written at once.
    _liger_loss: tuple[str, int] | None = None
    _liger_breaks = False

    def __call__(self, x, *args, **kwargs):
        if args or kwargs or not _computes_a_loss(self):
            return nn.Module.__call__(self, x, *args, **kwargs)
        # Asked here: the model's own forward may not be compiled, where it breaks by itself.
        if self._liger_breaks and torch.compiler.is_compiling():
            return nn.Module.__call__(self, x)
        if self._liger_loss[0] == PLAIN:
            logits = nn.Module.__call__(self, x)
            return Deferred(None, logits, logits.shape[-1])
        if _is_watched(self):
            return nn.Module.__call__(self, x)
        return Deferred(self, x, _width(self))

    def forward(self, x, *args, target=None, loss=None, **kwargs):
        if loss is None:
            return super().forward(x, *args, **kwargs)
        options = dict(loss)
        op, vocab = options.pop("op"), options.pop("vocab")
        chunk_size = options.pop("chunk_size", None)
        weight, bias = effective_weight(self)
        if weight is None:
            return _loss_of(op, super().forward(x)[..., :vocab], target, **options)
        if vocab != weight.shape[0]:
            weight, bias = weight[:vocab], None if bias is None else bias[:vocab]
        fused = getattr(functional, f"fused_linear_{op}")
        return fused(weight, x, target, chunk_size, bias=bias, **options)


def _is_watched(head: nn.Module) -> bool:
    """Say whether somebody's hooks read or change the logits, who would get a loss instead."""
    watched = (head._forward_hooks, head._backward_hooks, head._backward_pre_hooks)
    return any(
        not _module_of(hook).startswith(SHARDING) for hooks in watched for hook in hooks.values()
    )


def _module_of(hook: Any) -> str:
    # A partial does not say where its function is from.
    hook = getattr(hook, "func", hook)
    return getattr(hook, "__module__", None) or type(hook).__module__


def _loss_of(
    op: str, logits: torch.Tensor, target: torch.Tensor, num_items: Any = None, **options: Any
) -> torch.Tensor:
    """What the op says of logits that are there."""
    of_logits = getattr(functional, op)
    if num_items is None:
        return of_logits(logits, target, **options)
    return of_logits(logits, target, **{**options, "reduction": "sum"}) / num_items


class DeferringModel(Swapped):
    """A model whose head returns a `Deferred` while it computes a loss."""

    _liger_mode = None
    _liger_head = ""


@contextlib.contextmanager
def deferring(head: Any, mode: str) -> Iterator[None]:
    """Let the head return a `Deferred`, to this thread.

    Of several threads that compute a loss with one model at a time, one gets it, the others logits.
    """
    _set_loss(head, (mode, 0 if torch.compiler.is_compiling() else threading.get_ident()))
    try:
        yield
    finally:
        if _computes_a_loss(head):
            _set_loss(head, None)


def _set_loss(head: Any, loss: tuple[str, int] | None) -> None:
    # Setting an attribute of a module is slow; Dynamo takes it for nothing else.
    if torch.compiler.is_compiling():
        head._liger_loss = loss
    else:
        head.__dict__["_liger_loss"] = loss


class _Reading:
    """What somebody wants of the output of the next call of a model, made where logits are made.

    Args:
        head: the model's.
        read: makes it of the output.
    """

    def __init__(self, head: Any, read: Callable):
        self.head, self.read = head, read
        self.thread, self.is_done = threading.get_ident(), False

    def of(self, output: Any) -> Any:
        # The model's own code has ended: a loss is a tensor from here on.
        _set_loss(self.head, None)
        self.is_done = True
        return self.read(output)


def ask(wrapped: nn.Module, read: Callable, **inputs: Any) -> Any:
    """Call a model, wrapped or not, and return what `read` makes of its output.

    Logits are not computed yet when it reads, if the model was patched. It reads inside of all that
    wraps the model: there weights are whole, and DDP and FSDP find in the tensors that it returns
    what will have a gradient. Of compiled code it reads outside.
    """
    model = _deferring_model(wrapped)
    head = None if model is None else _head_at(model, model._liger_head)
    if model is None or head is None:
        return read(wrapped(**inputs))
    reading = _Reading(head, read)
    model.__dict__["_liger_reading"] = reading
    try:
        with deferring(head, FUSED):
            output = wrapped(**inputs)
    finally:
        model.__dict__.pop("_liger_reading", None)
    return output if reading.is_done else read(output)


def _deferring_model(wrapped: nn.Module) -> Any:
    """Find the patched model, itself or in its wrappers; None if its logits are real."""
    found = (module for module in wrapped.modules() if isinstance(module, DeferringModel))
    model = next(found, None)
    return model if model is not None and model._liger_mode == FUSED else None


def _reading_of(model: Any) -> _Reading | None:
    """What this thread has asked of the model, in code that is not compiled."""
    if torch.compiler.is_compiling():
        return None
    reading = model.__dict__.get("_liger_reading")
    return reading if reading is not None and reading.thread == threading.get_ident() else None


def _computes_a_loss(head: Any) -> bool:
    if head._liger_loss is None:
        return False
    # Compiled code runs in threads that its tracing does not know.
    return torch.compiler.is_compiling() or head._liger_loss[1] == threading.get_ident()


def _deferring(run: Callable) -> Callable:
    """The forward of a `DeferringModel`, around the forward `run`."""
    names = list(inspect.signature(run).parameters)[1:]
    position = names.index("labels") if "labels" in names else len(names)

    @functools.wraps(run)
    def forward(self, *args, skip_logits=None, **kwargs):
        reading = _reading_of(self)
        if reading is not None:
            return reading.of(run(self, *args, **kwargs))
        labels = args[position] if len(args) > position else kwargs.get("labels")
        has_labels = labels is not None or kwargs.get("shift_labels") is not None
        if skip_logits and not has_labels:
            raise ValueError("forward: `skip_logits` must come with `labels`; got no labels.")
        defers = self.training if skip_logits is None else skip_logits
        # None where another library still calls this after it was undone.
        mode = getattr(self, "_liger_mode", None)
        head = _head_at(self, self._liger_head) if mode and has_labels else None
        if head is None or not (defers or mode == PLAIN):
            return run(self, *args, **kwargs)
        with deferring(head, mode):
            output = run(self, *args, **kwargs)
        return _finished(output, skip_logits, mode)

    return forward


def _finished(output: Any, skip_logits: bool | None, mode: str) -> Any:
    """Take deferred logits out of an output (`skip_logits`), make them real, or leave them.

    A sum that nothing has divided becomes real.
    """
    if not isinstance(output, ModelOutput | tuple):
        return output
    leaves = mode == FUSED and not skip_logits
    values = output.values() if isinstance(output, ModelOutput) else output
    if not leaves:
        return with_real_logits(output, drop=bool(skip_logits))
    if not any(isinstance(value, DeferredSum) for value in values):
        return output
    return _mapped(output, lambda v: v if isinstance(v, Deferred) else real_values(v))


def with_real_logits(output: Any, drop: bool = False) -> Any:
    """Compute the deferred logits in a model's output, or drop them."""
    return _mapped(output, real_values, drop)


def _mapped(output: Any, finish: Callable, drop: bool = False) -> Any:
    def stays(value):
        return not (drop and isinstance(value, Deferred))

    if isinstance(output, ModelOutput):
        return type(output)(**{k: finish(v) for k, v in output.items() if stays(v)})
    if isinstance(output, tuple):
        return tuple(finish(v) for v in output if stays(v))
    return output


def _head_at(model: nn.Module, path: str) -> nn.Module | None:
    """The model's head; one that took the place of the old one (resized, LoRA) is changed too."""
    if getattr(model, "_is_replica", False):
        return None
    head = model
    for name in path.split("."):
        head = getattr(head, name)
    if isinstance(head, DeferringHead):
        # Tensor parallelism wraps the forward and expects logits of it.
        return head if is_own(head, "forward") else None
    with contextlib.suppress(Rejected):
        check_head(head)
        swap(head, DeferringHead)
        head.__dict__["_liger_breaks"] = _breaks_when_compiled(model, path)
        return head
    return None


# Installing and taking away.


def defer(model: nn.Module, mode: str) -> str:
    """Change the model and its head so that its loss is computed by our op; return the head's path.

    Raises:
        Rejected: the model takes no labels, or it has no head that we can see through.
    """
    if "labels" not in inspect.signature(type(model).forward).parameters:
        raise Rejected("takes no labels")
    if not isinstance(model, DeferringModel) and not _wraps_own(model):
        check_own(model, "forward")
    path, head = find_head(model)
    check_head(head)
    if not isinstance(head, DeferringHead):
        swap(head, DeferringHead)
    if not isinstance(model, DeferringModel):
        _swap_model(model)
    head.__dict__["_liger_breaks"] = _breaks_when_compiled(model, path)
    model.__dict__.update(_liger_mode=mode, _liger_head=path)
    return path


def _breaks_when_compiled(model: nn.Module, path: str) -> bool:
    """Say whether the code around the head does what Dynamo takes from real tensors only.

    It asks a `Deferred` about F.cross_entropy and torch.tanh, but not about the module
    CrossEntropyLoss, nor about F.tanh.
    """
    owners, module = [model], model
    for name in path.split(".")[:-1]:
        module = getattr(module, name)
        owners.append(module)
    forwards: list[Any] = [inspect.unwrap(type(owner).forward) for owner in owners]
    words = [set(getattr(getattr(f, "__code__", None), "co_names", ())) for f in forwards]
    return any("CrossEntropyLoss" in said or {"functional", "tanh"} <= said for said in words)


def _wraps_own(model: nn.Module) -> bool:
    """Say whether the instance's forward says of itself that it wraps the one of its class."""
    installed = model.__dict__.get(slot_of(model, "forward"))
    if not isinstance(installed, MethodType):
        return False
    return inspect.unwrap(installed.__func__) is inspect.unwrap(type(model).forward)


def _swap_model(model: nn.Module) -> None:
    """Change the model's class, and go around a forward on the instance (accelerate's autocast)."""
    slot = slot_of(model, "forward")
    wrapper = None if is_own(model, "forward") else model.__dict__[slot]
    swap(model, DeferringModel)
    if wrapper is not None:
        model.__dict__[slot] = MethodType(_deferring(wrapper.__func__), model)
        model.__dict__["_liger_wrapper"] = wrapper


def undefer(model: nn.Module) -> None:
    """Give the model and every head in it their own class back."""
    for module in model.modules():
        if isinstance(module, Swapped):
            _restore_wrapper(module)
            for name in [name for name in module.__dict__ if name.startswith("_liger")]:
                del module.__dict__[name]
            # FSDP may have made a subclass of ours since; then ours stays, and does nothing.
            if "liger_original" in type(module).__dict__:
                _change_class(module, type(module).liger_original)


def _restore_wrapper(module: nn.Module) -> None:
    """Give the instance the forward back that was on it; leave one that was put there since."""
    wrapper, slot = module.__dict__.get("_liger_wrapper"), slot_of(module, "forward")
    now = getattr(module.__dict__.get(slot), "__func__", None)
    if wrapper is not None and getattr(now, "__wrapped__", None) is wrapper.__func__:
        module.__dict__[slot] = wrapper


@functools.cache
def _subclass(original: Any, mixin: type) -> Any:
    members: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "liger_original": original,
    }
    if mixin is DeferringModel:
        members["forward"] = _deferring(original.forward)
    return type(original.__name__, (mixin, original), members)


def swap(module: nn.Module, mixin: type) -> None:
    """Change the module's class to a subclass of the same name with `mixin` in front."""
    original: Any = type(module)
    _change_class(module, _subclass(original, mixin))


def _change_class(module: nn.Module, new: Any) -> None:
    """Change the class, and the bound methods that accelerate's hooks keep of the old one."""
    old = type(module).forward
    module.__class__ = new
    for slot in ("forward", "_old_forward"):
        if getattr(module.__dict__.get(slot), "__func__", None) is old:
            module.__dict__[slot] = MethodType(new.forward, module)


def find_head(model: Any) -> tuple[str, nn.Module]:
    """Find the output head and its path: the model's own answer, or the only layer it can be."""
    with contextlib.suppress(Exception):
        head = model.get_output_embeddings()
        if head is not None:
            return next(path for path, module in model.named_modules() if module is head), head
    vocab = getattr(model.config.get_text_config(), "vocab_size", None)
    words = ("head", "decoder", "output", "predictions", "loss")
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == vocab != module.in_features
        and any(word in path for word in words)
    ]
    if len(found) != 1:
        raise Rejected(f"has {len(found)} layers that could be its output head")
    return found[0]


def check_head(head: nn.Module) -> None:
    """Raise `Rejected` unless the head is a plain linear layer, or PEFT's wrapping of one."""
    cls = type(head)
    name = f"its output head ({cls.__name__})"
    if not _is_peft(head) and not (
        isinstance(head, nn.Linear)
        and inspect.unwrap(cls.forward) in (nn.Linear.forward, DeferringHead.forward)
    ):
        raise Rejected(f"{name} is not a plain linear layer")
    check_own(head, "forward", name)


# What the head multiplies by. Read inside its own forward, where the weight is whole.

Weight = tuple[torch.Tensor, torch.Tensor | None] | tuple[None, None]


def effective_weight(head: Any) -> Weight:
    """The weight and bias with which `head(x)` equals `x @ weight.T + bias`, or (None, None)."""
    if isinstance(head, nn.Linear):
        return _whole(head)
    if _is_a(head, "ModulesToSaveWrapper"):
        if head.disable_adapters:
            return effective_weight(head.original_module)
        return effective_weight(head.modules_to_save[head.active_adapters[0]])
    if not isinstance(getattr(head, "base_layer", None), nn.Linear):
        return None, None
    weight, bias = _whole(head.base_layer)
    if weight is None:
        return None, None
    if head.disable_adapters or head.merged:
        return weight, bias
    for adapter in head.active_adapters:
        if adapter not in head.lora_A:
            continue
        drops = head.training and not isinstance(head.lora_dropout[adapter], nn.Identity)
        if head.use_dora.get(adapter) or head.lora_bias.get(adapter) or drops:
            return None, None
        change = head.lora_B[adapter].weight @ head.lora_A[adapter].weight
        weight = weight + head.scaling[adapter] * change.to(weight.dtype)
    return weight, bias


def _whole(linear: Any) -> Weight:
    weight = linear.weight
    if type(weight).__name__ == "DTensor":
        return None, None
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise RuntimeError(
            "fused_linear_cross_entropy: the head's weight must be whole in the head's forward; "
            f"got shape {tuple(weight.shape)} (wrap the head with the model, not by itself)."
        )
    return weight, linear.bias


def _width(head: Any) -> int:
    # Not from the weight: outside the head's own call it may be empty (ZeRO-3) or sharded (FSDP).
    while not hasattr(head, "out_features"):
        head = head.original_module
    return head.out_features


def _is_peft(head: nn.Module) -> bool:
    if _is_a(head, "ModulesToSaveWrapper"):
        return True
    return _is_a(head, "LoraLayer") and isinstance(head.base_layer, nn.Linear)


def _is_a(module: nn.Module, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(module).__mro__)
