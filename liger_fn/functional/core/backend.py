"""Where values come from: Triton kernels, the same kernels interpreted, or the reference.

| backend   | on CUDA tensors | on CPU tensors                          |
| --------- | --------------- | --------------------------------------- |
| auto      | kernels         | reference                               |
| kernels   | kernels         | kernels (needs Triton's interpreter)    |
| interpret | kernels, interpreted | kernels, interpreted               |
| reference | reference       | reference                               |

On meta tensors `auto` means kernels, whose shapes and strides the launchers tell without Triton.
It is the default; with `TRITON_INTERPRET=1` in the environment when Triton is imported, every
kernel of the process is interpreted and the default is `kernels`.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from liger_fn.functional.core.launch import TRITON_MISSING, interpreted

BACKENDS = ("auto", "kernels", "interpret", "reference")
_backend = "kernels" if interpreted() else "auto"
_interpreting = interpreted()
_current_device: Callable[[], int] | None = getattr(torch._C, "_cuda_getDevice", None)


def kernels_on(t: torch.Tensor) -> bool:
    """Say whether the kernels, rather than the reference, give the values for `t`."""
    if _backend == "auto":
        return (t.is_cuda or t.is_meta) and not TRITON_MISSING
    return _backend == "kernels"


def chosen() -> str:
    """Name the backend in force."""
    return _backend


def interpreting() -> bool:
    """Say whether a kernel that is launched now is interpreted."""
    return _interpreting


def why(device: torch.device) -> tuple[str, str]:
    """Name the backend that will run on `device`, and the reason in one sentence."""
    if TRITON_MISSING and _backend != "reference":
        return "reference", f"Triton cannot be imported ({TRITON_MISSING})"
    if _backend == "reference":
        return "reference", 'using("reference") is in force'
    if interpreted():
        return "interpreter", "TRITON_INTERPRET=1 was set when Triton was imported"
    if _backend == "kernels" or device.type == "cuda":
        return "kernels", f"Triton compiles for {device.type} tensors"
    return "reference", f"Triton has no compiler for {device.type} tensors"


@contextlib.contextmanager
def using(backend: str) -> Iterator[None]:
    """Choose the backend within the block; code that is already compiled keeps its own.

    The choice is the whole process's, for autograd runs backward passes in threads of its own: two
    threads must not be in such blocks at once.
    """
    global _backend
    if backend not in BACKENDS:
        raise ValueError(f"using: `backend` must be one of {', '.join(BACKENDS)}; got {backend!r}.")
    if TRITON_MISSING and backend in ("kernels", "interpret"):
        raise RuntimeError(f"using: {backend!r} needs Triton, which cannot be imported.")
    old, _backend = _backend, "kernels" if backend == "interpret" else backend
    try:
        with _interpreter() if backend == "interpret" else contextlib.nullcontext():
            yield
    finally:
        _backend = old


def first(args: Sequence[Any]) -> torch.Tensor:
    """The first tensor of a call: it says where the call runs."""
    return next(t for t in args if isinstance(t, torch.Tensor))


def on_device(launch: Callable) -> Callable:
    """Launch on the device of the first tensor: Triton by itself launches on the current one."""
    if _current_device is None:
        return launch

    def launch_there(*args):
        t = args[0] if args[0] is not None else first(args)
        if t.is_cuda and t.get_device() != _current_device():
            with torch.cuda.device(t.device):
                return launch(*args)
        return launch(*args)

    return launch_there


@contextlib.contextmanager
def _interpreter() -> Iterator[None]:
    """Run every kernel in the interpreter, in a process whose kernels are otherwise compiled.

    Not thread safe: it redirects Triton's `JITFunction` for the whole process while it lasts.
    """
    global _interpreting
    if interpreted():
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction, _patch_lang
    from triton.runtime.jit import JITFunction

    known: dict = {}

    def interpreted_twin(jit):
        if jit.fn not in known:
            known[jit.fn] = InterpretedFunction(jit.fn)
        return known[jit.fn]

    def run(self, *args, **kwargs):
        return interpreted_twin(self).run(*args, **kwargs)

    def call(self, *args, **kwargs):
        # A kernel calls another @triton.jit function, tl.sum say: its own patches must be undone
        # afterwards, or later compilation sees an interpreted language.
        scope = _patch_lang(self.fn)
        try:
            return interpreted_twin(self).rewrite()(*args, **kwargs)
        finally:
            scope.restore()

    old = JITFunction.run, JITFunction.__call__
    JITFunction.run, JITFunction.__call__ = run, call
    _interpreting = True
    try:
        yield
    finally:
        JITFunction.run, JITFunction.__call__ = old
        _interpreting = False
