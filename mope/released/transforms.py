"""The transforms of torchvision that the released code uses, for Pillow images, where torchvision is not installed.

With the same names, arguments, results and random numbers as torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mope.data.augment import LEVELS, OPERATIONS

# Shears, translations, rotation and the four that enhance, in the order of `OPERATIONS`.
SIGNED = range(1, 10)


class Compose:
    """One transform after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class Resize:
    """Bilinear; to (height, width), or the shorter side to a number."""

    def __init__(self, size: int | Sequence[int]) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        if isinstance(self.size, int):
            width, height = (int(self.size * side / min(image.size)) for side in image.size)
        else:
            height, width = self.size
        return image.resize((width, height), Image.Resampling.BILINEAR)


class CenterCrop:
    """A square of `size`, black where the image ends before."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top = (round((side - self.size) / 2) for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))


class ToTensor:
    """A Pillow image -> (C, H, W) float32 in [0, 1]."""

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image))
        return pixels.reshape(*pixels.shape[:2], -1).permute(2, 0, 1).contiguous() / 255


class Normalize:
    """Subtract a mean and divide by a deviation, for each channel of (C, H, W)."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def __call__(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std


class RandAugment:
    """`num_ops` random operations of one strength (arXiv:1909.13719)."""

    def __init__(self, num_ops: int = 2, magnitude: int = 9) -> None:
        self.num_ops, self.magnitude = num_ops, magnitude

    def __call__(self, image: Image.Image) -> Image.Image:
        for _ in range(self.num_ops):
            drawn = int(torch.randint(len(OPERATIONS), (1,)))
            # A direction is drawn for those alone that have one.
            is_reversed = drawn in SIGNED and bool(torch.randint(2, (1,)))
            image = OPERATIONS[drawn](image, (-1 if is_reversed else 1) * self.magnitude / LEVELS)
        return image
