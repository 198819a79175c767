"""Make small copies of images."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image

from mope.modalities.vision import with_8_bits

SIZE, GAP = 96, 8
# The color of a missing image, as models see it.
GREY = (128, 128, 128)


def thumbnail(path: Path | None) -> Image.Image:
    """Scale an image to `SIZE` pixels on its longer side, in RGB. Smaller images are enlarged so that their pixels are visible."""
    if path is None:
        return Image.new("RGB", (SIZE, SIZE), GREY)
    with Image.open(path) as file:
        # Decode a large JPEG at a fraction of its size.
        file.draft("RGB", (2 * SIZE, 2 * SIZE))
        # Ignore the camera's orientation tag, as the models do.
        image = with_8_bits(file).convert("RGB")
    scale = SIZE / max(image.size)
    # A very thin image would otherwise be rounded to a width or height of 0.
    width, height = (max(1, round(scale * length)) for length in image.size)
    return image.resize((width, height), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def strip(paths: Sequence[Path | None]) -> Image.Image:
    """Arrange thumbnails in a row of squares, with gaps between them, on white."""
    row = Image.new("RGB", (len(paths) * (SIZE + GAP) - GAP, SIZE), "white")
    for place, path in enumerate(paths):
        image = thumbnail(path)
        row.paste(image, (place * (SIZE + GAP) + (SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return row


def data_uri(image: Image.Image) -> str:
    """Encode an image as a data URI. It is a JPEG of a few kilobytes."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
