"""Names of packages that optional parts need, and how to install them. This module imports none of them."""

from __future__ import annotations

import importlib

# As in pyproject.toml. The packages are listed by name, because the library itself is not on PyPI.
EXTRAS = {
    "train": ("accelerate", "pillow", "scikit-learn", "tensorboard"),
    "plot": ("jinja2", "matplotlib"),
    "demo": ("peft",),
    "data": ("datasets", "pyarrow"),
}
_PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}


def install(*extras: str) -> str:
    """Return the command that installs the packages of these extras."""
    return "pip install " + " ".join(package for extra in extras for package in EXTRAS[extra])


def missing(*modules: str, extras: tuple[str, ...]) -> str | None:
    """Return a message that names a module that cannot be imported and how to install it; None if all can be imported."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            absent = str(error.name)
            return f"{_PACKAGES.get(absent, absent)} is needed: {install(*extras)}"
    return None
