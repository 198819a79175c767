"""Replacements of the torchvision transforms that the released code uses, for Pillow images.

They are used if torchvision is not installed, and have the same names, arguments, results and random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mope.data.augment import LEVELS, OPERATIONS

# Shears, translations, rotation and the four enhancements, by position in `OPERATIONS`.
SIGNED = range(1, 10)


class Compose:
    """Apply transforms in sequence."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class Resize:
    """Resize bilinearly to (height, width), or the shorter side to an int."""

    def __init__(self, size: int | Sequence[int]) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        if isinstance(self.size, int):
            width, height = (int(self.size * side / min(image.size)) for side in image.size)
        else:
            height, width = self.size
        return image.resize((width, height), Image.Resampling.BILINEAR)


class CenterCrop:
    """Crop a centered square of `size`, with black padding if the image is smaller."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top = (round((side - self.size) / 2) for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))


class ToTensor:
    """Convert a Pillow image to a tensor (C, H, W), float32 in [0, 1]."""

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image))
        return pixels.reshape(*pixels.shape[:2], -1).permute(2, 0, 1).contiguous() / 255


class Normalize:
    """Subtract the mean and divide by the standard deviation of each channel of (C, H, W)."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def __call__(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std


class RandAugment:
    """Apply `num_ops` random operations of the same strength (arXiv:1909.13719)."""

    def __init__(self, num_ops: int = 2, magnitude: int = 9) -> None:
        self.num_ops, self.magnitude = num_ops, magnitude

    def __call__(self, image: Image.Image) -> Image.Image:
        for _ in range(self.num_ops):
            drawn = int(torch.randint(len(OPERATIONS), (1,)))
            # Draw a direction only for operations that have one.
            is_reversed = drawn in SIGNED and bool(torch.randint(2, (1,)))
            image = OPERATIONS[drawn](image, (-1 if is_reversed else 1) * self.magnitude / LEVELS)
        return image
