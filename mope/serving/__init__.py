"""Serve many tasks on the same frozen encoders; each item of a batch uses the prompts of its own task."""

from .server import MoPEServer, Prediction

__all__ = ["MoPEServer", "Prediction"]
