"""Create routes, images and splits for tests, without a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mope.data import Example, Split
from mope.routes import Routes


def routes(
    count: int = 60,
    blocks: int = 2,
    experts: int = 4,
    *,
    classes: tuple[str, ...] = ("cat", "dog", "bird"),
    images: tuple[Path | None, ...] = (None,),
    texts: tuple[str, ...] = ("a text",),
    seed: int = 0,
) -> Routes:
    """Return random routes. Images and texts repeat cyclically, and the last class has no examples."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, blocks, experts)) * 3
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    labels = np.eye(len(classes), dtype=bool)[rng.integers(max(1, len(classes) - 1), size=count)]
    return Routes(
        blocks=tuple(f"layer {i}" for i in range(blocks)),
        classes=classes,
        ids=tuple(f"id{i}" for i in range(count)),
        texts=tuple(texts[i % len(texts)] for i in range(count)),
        images=tuple(images[i % len(images)] for i in range(count)),
        labels=labels,
        predictions=np.roll(labels, 1, axis=0),
        probabilities=probabilities.astype(np.float32),
    )


def pictures(folder: Path, count: int) -> tuple[Path, ...]:
    """Write image files, each of a single color."""
    paths = tuple(folder / f"{i}.png" for i in range(count))
    for i, path in enumerate(paths):
        Image.new("RGB", (10 + i, 7), (20 * i % 256, 100, 200)).save(path)
    return paths


def split(count: int, *, names: tuple[str, ...], problem_type: str = "single_label") -> Split:
    """Return a split whose labels repeat cyclically."""
    examples = tuple(Example(f"id{i}", {"text": f"text {i}", "vision": None}, (i % len(names),)) for i in range(count))
    return Split("test", examples, names, problem_type)
