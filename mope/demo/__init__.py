"""The main job on real input, small enough for a CPU: handwritten digits, sentences about them, does the sentence hold?"""

from __future__ import annotations

from pathlib import Path


def digit_model() -> Path:
    """The folder of a trained MoPE model of this task, for `mope.MoPEForClassification.from_pretrained`."""
    return Path(__file__).parent / "assets" / "digit_model"
