"""Random augmentation of training images, as in the released code for MM-IMDB and SNLI-VE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVELS = 30


@dataclass(frozen=True)
class RandAugment:
    """RandAugment (Cubuk et al. 2020, arXiv 1909.13719): a sequence of random operations, each drawn from 14.

    Args:
        operations: Number of operations.
        magnitude: Strength of the operations, from 0 to 30. Published values are 7 for MM-IMDB and 5 for SNLI-VE.

    Raises:
        ValueError: An argument is out of range.
    """

    operations: int = 2
    magnitude: int = 7

    def __post_init__(self) -> None:
        if self.operations < 0 or not 0 <= self.magnitude <= LEVELS:
            raise ValueError(
                f"RandAugment: operations must be 0 or more and magnitude between 0 and {LEVELS}, "
                f"got {self.operations} and {self.magnitude}"
            )

    def __call__(self, image: Any, rng: np.random.Generator) -> Any:
        """Augment a grayscale or RGB PIL image, and return one of the same size and mode."""
        for _ in range(self.operations):
            operation = OPERATIONS[rng.integers(len(OPERATIONS))]
            # The sign is random, for operations that have a direction.
            image = operation(image, self.magnitude / LEVELS * rng.choice((-1, 1)))
        return image


def _affine(image: Any, a: float, b: float, c: float, d: float, e: float, f: float) -> Any:
    """Set the pixel at (x, y) to the one at (a x + b y + c, d x + e y + f), or to black outside the image."""
    from PIL import Image

    return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f))


def _enhance(name: str) -> Callable[[Any, float], Any]:
    def enhance(image: Any, strength: float) -> Any:
        from PIL import ImageEnhance

        return getattr(ImageEnhance, name)(image).enhance(1 + 0.9 * strength)

    return enhance


def _apply(name: str, *parameters: Callable[[float], float]) -> Callable[[Any, float], Any]:
    def apply(image: Any, strength: float) -> Any:
        from PIL import ImageOps

        return getattr(ImageOps, name)(image, *(parameter(abs(strength)) for parameter in parameters))

    return apply


# Functions of an image and a strength from -1 to 1; the ranges are those of the paper.
OPERATIONS: tuple[Callable[[Any, float], Any], ...] = (
    lambda image, strength: image,
    lambda image, strength: _affine(image, 1, 0.3 * strength, 0, 0, 1, 0),
    lambda image, strength: _affine(image, 1, 0, 0, 0.3 * strength, 1, 0),
    lambda image, strength: _affine(image, 1, 0, -int(150 / 331 * image.width * strength), 0, 1, 0),
    lambda image, strength: _affine(image, 1, 0, 0, 0, 1, -int(150 / 331 * image.height * strength)),
    lambda image, strength: image.rotate(30 * strength),
    _enhance("Brightness"),
    _enhance("Color"),
    _enhance("Contrast"),
    _enhance("Sharpness"),
    _apply("posterize", lambda strength: 8 - round(4 * strength)),
    _apply("solarize", lambda strength: 255 * (1 - strength)),
    _apply("autocontrast"),
    _apply("equalize"),
)
