"""Small copies of images."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image

from mope.modalities.vision import with_8_bits

SIZE, GAP = 96, 8
# In place of no image, as the models see it.
GREY = (128, 128, 128)


def thumbnail(path: Path | None) -> Image.Image:
    """An RGB image whose longer side has `SIZE` pixels; smaller ones are enlarged, with their pixels to be seen."""
    if path is None:
        return Image.new("RGB", (SIZE, SIZE), GREY)
    with Image.open(path) as file:
        # Reads a large JPEG at a fraction of its size.
        file.draft("RGB", (2 * SIZE, 2 * SIZE))
        # As models see it: not turned as a camera may have noted.
        image = with_8_bits(file).convert("RGB")
    scale = SIZE / max(image.size)
    # Of a line that is thin enough nothing else would be left.
    width, height = (max(1, round(scale * length)) for length in image.size)
    return image.resize((width, height), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def strip(paths: Sequence[Path | None]) -> Image.Image:
    """Thumbnails in a row of squares with gaps between them, on white."""
    row = Image.new("RGB", (len(paths) * (SIZE + GAP) - GAP, SIZE), "white")
    for place, path in enumerate(paths):
        image = thumbnail(path)
        row.paste(image, (place * (SIZE + GAP) + (SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return row


def data_uri(image: Image.Image) -> str:
    """The image itself in place of an address: JPEG, a few kilobytes."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
