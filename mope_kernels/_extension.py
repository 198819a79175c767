"""Loads the C++ kernels once, when the package is imported, and remembers why if it cannot."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from .build import LIBRARY, cached_library


class ExtensionStatus(NamedTuple):
    """Whether the C++ kernels are loaded, from where, and if not, why; and for which instruction set they were chosen."""

    loaded: bool
    path: Path | None
    reason: str
    target: str = ""


# As csrc/targets.cpp names them, the least first.
TARGETS = ("portable", "avx2", "avx512", "avx512_bf16")


def _check_target() -> None:
    """ValueError if MOPE_CPU_TARGET names no instruction set: the C++ would take the best instead."""
    wish = os.environ.get("MOPE_CPU_TARGET", "")
    if wish and wish not in TARGETS:
        raise ValueError(f"MOPE_CPU_TARGET must be one of {', '.join(TARGETS)}, got {wish!r}")


def _candidates() -> Iterator[Path]:
    # Another build of the same sources, such as one with sanitizers.
    if chosen := os.environ.get("MOPE_EXTENSION"):
        yield Path(chosen)
        return
    # Looked for one after the other: the cache's name is a digest of the sources, which the bundled library makes superfluous.
    yield Path(__file__).with_name(LIBRARY)
    yield cached_library()


def _target(path: Path) -> str:
    name = ctypes.CDLL(str(path)).mope_cpu_target
    name.restype = ctypes.c_char_p
    return bytes(name()).decode()


def _load() -> ExtensionStatus:
    _check_target()
    if os.environ.get("MOPE_DISABLE_EXTENSION", "0") not in ("", "0"):
        return ExtensionStatus(False, None, "the C++ extension is switched off by MOPE_DISABLE_EXTENSION")
    failures = []
    # Whatever is wrong with the library, the package works without it: the reason is kept for whoever asks for the kernels.
    try:
        for path in _candidates():
            if path.is_file():
                try:
                    torch.ops.load_library(path)
                    return ExtensionStatus(True, path, "", _target(path))
                except (OSError, RuntimeError, AttributeError) as error:
                    failures.append(f"{path} does not load: {error}")
    except (OSError, RuntimeError) as error:
        failures.append(str(error))
    if not failures and (chosen := os.environ.get("MOPE_EXTENSION")):
        failures.append(f"MOPE_EXTENSION names {chosen}, which is no file")
    return ExtensionStatus(False, None, "; ".join(failures) or "the C++ extension is not built (mope build)")


STATUS = _load()


def status() -> ExtensionStatus:
    """Whether the C++ kernels are loaded, from where, and if not, why."""
    return STATUS
