"""Fusion models over frozen transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mope.lazy import lazily

if TYPE_CHECKING:
    from .config import MoPEConfig
    from .model import MoPEForClassification, MoPEOutput
    from .predicting import Prediction
    from .presets import PRESETS

__all__ = ["PRESETS", "MoPEConfig", "MoPEForClassification", "MoPEOutput", "Prediction"]

# A configuration needs no transformers.
_MODULES = {
    "PRESETS": ".presets",
    "MoPEConfig": ".config",
    "MoPEForClassification": ".model",
    "MoPEOutput": ".model",
    "Prediction": ".predicting",
}
__getattr__ = lazily(__name__, _MODULES)
