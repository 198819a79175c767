"""Registries through which other packages add file types that open as models, and modes of evaluation.

This module does not import torch, because the command line builds its options from it.
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
    """Register a function with which `mope.training.loading.open_model` opens files of a type.

    Args:
        suffix: the suffix of the files, such as ".ckpt".
        opener: called as opener(path, sources, mode=..., processors=..., format=...), with the arguments of `open_model`.
    """
    _OPENERS[suffix] = opener


@cache
def _load() -> None:
    """Import the packages that register extensions. They are imported by name, so that this module does not depend on them."""
    for name in mope.EXTENSIONS:
        importlib.import_module(name)


def opener_for(suffix: str) -> Callable[..., FusionModel] | None:
    """Return the function that opens files with a suffix, or None if none is registered."""
    _load()
    return _OPENERS.get(suffix)


def register_modes(names: Iterable[str], set_mode: Callable[[Any, str], str]) -> None:
    """Register modes for `evaluate`.

    Args:
        names: the names of the modes.
        set_mode: a function of model and mode that puts the model into the mode and returns the previous one. It raises
            ValueError if the model has no modes.
    """
    for name in names:
        _MODES[name] = set_mode


def modes() -> tuple[str, ...]:
    """Return the names of the registered modes."""
    _load()
    return tuple(_MODES)


def set_mode(model: FusionModel, mode: str) -> str:
    """Put a model into a mode and return the previous one.

    Raises:
        ValueError: the mode is unknown, or the model has no modes.
    """
    if mode not in modes():
        raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}")
    return _MODES[mode](model, mode)


@contextmanager
def in_mode(model: FusionModel, mode: str | None) -> Iterator[None]:
    """Put a model into a mode within the context. None changes nothing."""
    if mode is None:
        yield
        return
    before = set_mode(model, mode)
    try:
        yield
    finally:
        set_mode(model, before)
