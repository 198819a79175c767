"""Environment variables that the ops read once."""

from __future__ import annotations

import pytest

import mope_kernels


def setenv(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """Set a variable and make the ops read it."""
    monkeypatch.setenv(name, value)
    mope_kernels.reread_environment()
