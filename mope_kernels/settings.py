"""Environment variables for the ops. They are read when an op first runs, and again by `reread_environment`."""

from __future__ import annotations

import os
import threading
from typing import NamedTuple

import torch

from . import plans


class Settings(NamedTuple):
    """Values of MOPE_IMPL (the implementations to use for "auto"), MOPE_DEBUG and MOPE_AUTOTUNE."""

    impl: str
    debug: bool
    autotune: bool


_settings: Settings | None = None
_lock = threading.Lock()


def _is_on(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def current() -> Settings:
    """Return the settings. The first call reads them from the environment."""
    global _settings
    if torch.compiler.is_compiling():
        # With cached settings, compiled code would guard on them and compare them in every call.
        return _read()
    found = _settings
    if found is None:
        with _lock:
            found = _settings = _read()
    return found


def _read() -> Settings:
    return Settings(os.environ.get("MOPE_IMPL", ""), _is_on("MOPE_DEBUG"), _is_on("MOPE_AUTOTUNE"))


def reread_environment() -> None:
    """Reread MOPE_IMPL, MOPE_DEBUG and MOPE_AUTOTUNE after a change in the running process."""
    global _settings
    with _lock:
        _settings = None
    plans.forget()
