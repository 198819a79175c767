"""Fusion models over frozen transformers."""

from .config import MoPEConfig
from .model import MoPEForClassification, MoPEOutput
from .presets import PRESETS

__all__ = ["PRESETS", "MoPEConfig", "MoPEForClassification", "MoPEOutput"]
