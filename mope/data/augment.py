"""Random distortions of training images, as the released code has them for MM-IMDB and SNLI-VE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVELS = 30


@dataclass(frozen=True)
class RandAugment:
    """`operations` distortions one after another, each drawn from 14 (Cubuk et al. 2020, arXiv 1909.13719).

    Args:
        operations: how many.
        magnitude: how strong, from 0 to 30. Published: 7 for MM-IMDB, 5 for SNLI-VE.

    Raises:
        ValueError: out of range.
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
        """A PIL image, grey or RGB -> one of the same size and mode."""
        for _ in range(self.operations):
            operation = OPERATIONS[rng.integers(len(OPERATIONS))]
            # Signed operations go either way.
            image = operation(image, self.magnitude / LEVELS * rng.choice((-1, 1)))
        return image


def _affine(image: Any, a: float, b: float, c: float, d: float, e: float, f: float) -> Any:
    """The pixel at (x, y) comes from (a x + b y + c, d x + e y + f), black where there is nothing."""
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


# Each takes an image and a strength from -1 to 1; the ranges are those of the paper.
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
