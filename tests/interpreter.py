"""Triton's interpreter, without what takes half of its time and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


def patch_once_per_launch() -> None:
    """Have the interpreter look through `triton.language` once per launch and module, and not in every call of a device function.

    A launch swaps the builtins of the modules that its kernel sees for interpreted ones, and puts them back at its end. Device
    functions, those of Triton's own library among them, do it again in each call, and swap what has been swapped.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
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
