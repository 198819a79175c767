"""Mixture-of-Prompt-Experts fusion models over frozen transformers.

The names below are imported on first use: `import mope` is quick, and `mope.fused` needs no transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mope_kernels import __version__

    from .models import MoPEConfig, MoPEForClassification, register_backbone

__all__ = ["MoPEConfig", "MoPEForClassification", "__version__", "register_backbone"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("mope_kernels" if name == "__version__" else ".models", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
