"""Triton's interpreter, without work that changes nothing and takes more than half of its time."""

import contextlib
import dataclasses
import functools

from liger_fn.functional.core.launch import interpreted


@functools.cache
def hasten() -> None:
    """Let kernels that are interpreted give the same bits sooner, in this process from now on.

    A launch replaces what is built in of `triton.language`, and puts it back at its end. So does
    each call of a device function inside of it, member by member, and finds nothing left to do.
    And of each sum and product of integers the interpreter works out whether it overflows, but
    tells only those who debug.
    """
    parts = (_replace_builtins_once_a_launch, _leave_overflows_alone) if interpreted() else ()
    for spare in parts:
        # A later Triton may have no such part.
        with contextlib.suppress(AttributeError, ImportError, TypeError):
            spare()


def _replace_builtins_once_a_launch() -> None:
    from triton import language as tl
    from triton.runtime import interpreter

    replace, scope = interpreter._patch_lang, interpreter._LangPatchScope

    def once(function):
        left = any(tl.core.is_builtin(module.load) for module in (tl, tl.core))
        return replace(function) if left else scope()

    interpreter._patch_lang = once


def _leave_overflows_alone() -> None:
    from triton.runtime.interpreter import interpreter_builder as builder

    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
