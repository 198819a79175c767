"""Patches for Triton's interpreter: skip needless work, more than half of its time, and support any NumPy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any


def leave_out_needless_work() -> None:
    """Patch the interpreter once, before any kernel runs; a Triton with other internals is left unpatched, and slower."""
    from triton.runtime import interpreter

    with suppress(AttributeError, TypeError):
        options = interpreter.interpreter_builder.options
        # The interpreter would check integer sums and products for overflow, although assertions are off without `debug`.
        if not options.debug:
            interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
        _patch_once_per_launch(interpreter)


def take_loop_bounds_of_any_numpy() -> None:
    """Support loops with NumPy >= 2.4 in Triton 3.6, as later versions do; call it once, before any kernel runs.

    Loop bounds are arrays with one element, and since NumPy 2.4 `int` raises an error for arrays with a dimension.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_index


def _patch_once_per_launch(interpreter: Any) -> None:
    """Patch `triton.language` once per launch and module instead of in every call of a device function.

    A launch replaces the builtins of the modules that its kernel uses with interpreted ones, and restores them at the end. Device
    functions, including those of Triton's own library, do it again in each call, and replace what is already replaced.
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
