"""Demos on real input, small enough for a CPU: handwritten digits and sentences about them."""

from __future__ import annotations

from pathlib import Path


def digit_model() -> Path:
    """Return the folder of a trained model of the digits task, for `mope.MoPEForClassification.from_pretrained`."""
    return Path(__file__).parent / "assets" / "digit_model"
