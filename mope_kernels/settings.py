"""Environment variables that the ops obey, read once: when an op first runs, and again by `reread_environment`."""

from __future__ import annotations

import os
import threading
from typing import NamedTuple

import torch

from . import plans


class Settings(NamedTuple):
    """impl: MOPE_IMPL, implementations in place of "auto"; debug: MOPE_DEBUG; autotune: MOPE_AUTOTUNE."""

    impl: str
    debug: bool
    autotune: bool


_settings: Settings | None = None
_lock = threading.Lock()


def _is_on(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def current() -> Settings:
    """Return the settings, read from the environment by the first call."""
    global _settings
    if torch.compiler.is_compiling():
        # What was read before would be compared in each call of what is compiled here.
        return _read()
    found = _settings
    if found is None:
        with _lock:
            found = _settings = _read()
    return found


def _read() -> Settings:
    return Settings(os.environ.get("MOPE_IMPL", ""), _is_on("MOPE_DEBUG"), _is_on("MOPE_AUTOTUNE"))


def reread_environment() -> None:
    """Read MOPE_IMPL, MOPE_DEBUG and MOPE_AUTOTUNE again, after they changed in a running process."""
    global _settings
    with _lock:
        _settings = None
    plans.forget()
