"""Load the C++ kernels once, when the package is imported. If that fails, keep the reason."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from .build import LIBRARY, cached_library


class ExtensionStatus(NamedTuple):
    """Status of the C++ kernels: whether they are loaded, their path, the reason if not, and the instruction set in use."""

    loaded: bool
    path: Path | None
    reason: str
    target: str = ""


# In ascending order, named as in csrc/targets.cpp.
TARGETS = ("portable", "avx2", "avx512", "avx512_bf16")


def _check_target() -> None:
    """Raise ValueError if MOPE_CPU_TARGET is not a known instruction set: the C++ code would silently use the best one."""
    wish = os.environ.get("MOPE_CPU_TARGET", "")
    if wish and wish not in TARGETS:
        raise ValueError(f"MOPE_CPU_TARGET must be one of {', '.join(TARGETS)}, got {wish!r}")


def _candidates() -> Iterator[Path]:
    # MOPE_EXTENSION selects another build of the same sources, such as one with sanitizers.
    if chosen := os.environ.get("MOPE_EXTENSION"):
        yield Path(chosen)
        return
    # Lazily: the cache path needs a digest of the sources, which is wasted work if the bundled library loads.
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
    # The package works without the library, so keep the reason; it is reported when the kernels are requested.
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
        failures.append(f"MOPE_EXTENSION names {chosen}, which is not a file")
    return ExtensionStatus(False, None, "; ".join(failures) or "the C++ extension is not built (mope build)")


STATUS = _load()


def status() -> ExtensionStatus:
    """Return whether the C++ kernels are loaded, their path, and the reason if they are not."""
    return STATUS
