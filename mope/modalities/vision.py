"""Images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from .registry import Modality, register_modality


class Vision(Modality):
    """Images, (B,channels,height,width) floating point."""

    name = "vision"
    inputs = {"pixel_values": "pixel_values"}  # noqa: RUF012
    flags = ("interpolate_pos_encoding",)

    def check(self, encoder: Any, given: Mapping[str, Tensor]) -> None:
        """Raise ValueError where pixels are no batch of images."""
        pixel_values = given.get("pixel_values")
        if pixel_values is not None and pixel_values.dim() != 4:
            raise ValueError(
                f"pixel_values must be (B,channels,height,width), got {tuple(pixel_values.shape)}"
                + (": give one image as a batch, pixel_values[None]" if pixel_values.dim() == 3 else "")
            )

    def doubts(self, encoder: Any, given: Mapping[str, Tensor]) -> Iterator[str]:
        """Yield what to say of pixels that are not floating point."""
        pixels = given.get("pixel_values")
        if pixels is not None and not pixels.is_floating_point():
            yield (
                f"pixel_values are {pixels.dtype}, as if no image processor had made them: encoders were trained on normalised "
                "floating point pixels, and see something else: model.image_processor(images, return_tensors='pt')"
            )

    def not_a_tensor(self, name: str, value: object) -> str | None:
        """Return what to do about images that are no tensor."""
        kind = type(value).__name__
        fix = f"torch.from_numpy({name})" if kind == "ndarray" else f"torch.tensor({name})"
        return f"must be a tensor, got {kind}: {fix}, or model.image_processor(images, return_tensors='pt') for images"


register_modality(Vision())
