"""Many tasks on one pair of frozen encoders, each item of a batch with the prompts of its own task."""

from .server import MoPEServer, Prediction

__all__ = ["MoPEServer", "Prediction"]
