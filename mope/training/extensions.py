"""Let other packages extend training: files to open as models, and modes in which a model can be evaluated.

Nothing here imports torch: the command line has options for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import mope

if TYPE_CHECKING:
    from mope.fusion.base import FusionModel

_OPENERS: dict[str, Callable[..., FusionModel]] = {}
_MODES: dict[str, Callable[[Any, str], str]] = {}


def register_opener(suffix: str, opener: Callable[..., FusionModel]) -> None:
    """Teach `mope.training.loading.open_model` a kind of file.

    Args:
        suffix: of the files, such as ".ckpt".
        opener: called as opener(path, sources, mode=..., processors=..., format=...), with the arguments of `open_model`.
    """
    _OPENERS[suffix] = opener


@cache
def _load() -> None:
    """Import what registers something. By name: nothing here depends on it."""
    for name in mope.EXTENSIONS:
        importlib.import_module(name)


def opener_for(suffix: str) -> Callable[..., FusionModel] | None:
    """Return what opens files of a suffix, None if nobody has registered it."""
    _load()
    return _OPENERS.get(suffix)


def register_modes(names: Iterable[str], set_mode: Callable[[Any, str], str]) -> None:
    """Teach `evaluate` modes.

    Args:
        names: of the modes.
        set_mode: puts a model into one of them and returns the one before; ValueError where the model has no modes.
    """
    for name in names:
        _MODES[name] = set_mode


def modes() -> tuple[str, ...]:
    """Return the names of the registered modes."""
    _load()
    return tuple(_MODES)


def set_mode(model: FusionModel, mode: str) -> str:
    """Put a model into a mode and return the one before.

    Raises:
        ValueError: the mode is unknown, or the model has none.
    """
    if mode not in modes():
        raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}")
    return _MODES[mode](model, mode)


@contextmanager
def in_mode(model: FusionModel, mode: str | None) -> Iterator[None]:
    """`set_mode` for a while; None changes nothing."""
    if mode is None:
        yield
        return
    before = set_mode(model, mode)
    try:
        yield
    finally:
        set_mode(model, before)
