"""Demo of MoPE: decide whether a sentence about one of four handwritten digits in a grid is true."""

from __future__ import annotations

from pathlib import Path


def encoders() -> Path:
    """Return the folder with the frozen encoders of seed 0: `vision` with an image processor, `text` with a tokenizer."""
    return Path(__file__).parents[1] / "assets" / "scene_encoders"
