"""Triton's interpreter, without what takes more than half of its time and changes nothing, and with any NumPy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any


def leave_out_needless_work() -> None:
    """Call it once, before any kernel runs. With a Triton whose insides have other names, all is as it was, and slower."""
    from triton.runtime import interpreter

    with suppress(AttributeError, TypeError):
        options = interpreter.interpreter_builder.options
        # Whether a sum or product of integers overflows would be asserted, and without `debug` no assertion is.
        if not options.debug:
            interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
        _patch_once_per_launch(interpreter)


def take_loop_bounds_of_any_numpy() -> None:
    """Call it once, before any kernel runs: Triton 3.6 then interprets loops with NumPy >= 2.4 too, as later ones do unasked.

    A bound of a loop is an array of one number, and `int` of an array that has a dimension is an error since NumPy 2.4.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_index


def _patch_once_per_launch(interpreter: Any) -> None:
    """Have it look through `triton.language` once per launch and module, and not in every call of a device function.

    A launch swaps the builtins of the modules that its kernel sees for interpreted ones, and puts them back at its end. Device
    functions, those of Triton's own library among them, do it again in each call, and swap what has been swapped.
    """
    tl, patch, launch = interpreter.tl, interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    @cache
    def modules_seen_by(fn: Callable[..., Any]) -> frozenset[str]:
        return frozenset(m.__name__ for m in (tl, tl.core) if any(value is m for value in fn.__globals__.values()))

    def patch_what_is_new(fn: Callable[..., Any]) -> Any:
        if patched >= modules_seen_by(fn):
            return None
        patched.update(modules_seen_by(fn))
        return patch(fn)

    def launch_with_nothing_patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_what_is_new, launch_with_nothing_patched
