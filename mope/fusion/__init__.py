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

# Loaded lazily, so that a configuration can be used without importing transformers.
_MODULES = {
    "PRESETS": ".presets",
    "MoPEConfig": ".config",
    "MoPEForClassification": ".model",
    "MoPEOutput": ".model",
    "Prediction": ".predicting",
}
__getattr__ = lazily(__name__, _MODULES)
