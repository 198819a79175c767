"""Name the packages that optional parts need, and how to install them. Nothing is imported here."""

from __future__ import annotations

import importlib

# As in pyproject.toml. Packages are named, because the library itself is in no registry that pip looks into.
EXTRAS = {
    "train": ("accelerate", "pillow", "scikit-learn", "tensorboard"),
    "plot": ("matplotlib",),
    "data": ("datasets", "pyarrow"),
}
_PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}


def install(*extras: str) -> str:
    """The command that installs what these extras need."""
    return "pip install " + " ".join(package for extra in extras for package in EXTRAS[extra])


def missing(*modules: str, extras: tuple[str, ...]) -> str | None:
    """Which of the modules cannot be imported, and what to do; None if all can."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            absent = str(error.name)
            return f"{_PACKAGES.get(absent, absent)} is needed: {install(*extras)}"
    return None
