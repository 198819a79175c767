"""Vision modality: images."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .reading import Finder, Reader, Source, UnreadableError, is_key, listed, shown
from .registry import Modality, register_modality

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPImageProcessorPil

# Name of an image processor that is not loaded from files: the one of the published training.
PUBLISHED = "published"
PUBLISHED_MEAN, PUBLISHED_STD = (0.46777044, 0.44531429, 0.40661017), (0.12221994, 0.12145835, 0.14380469)
GREY = 128


@dataclass(frozen=True)
class StoredImage:
    """An image that a table holds: the bytes of a file, and a name for messages."""

    name: str
    data: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name


class Vision(Modality):
    """Images: floating-point pixels (B,channels,height,width) from the encoder's image processor.

    With `interpolate_pos_encoding=True`, a call accepts images of another size than the encoder's, as in transformers: position
    embeddings are interpolated. Swin Transformers do not support it.
    """

    name = "vision"
    inputs = {"pixel_values": "pixel_values"}  # noqa: RUF012
    flags = ("interpolate_pos_encoding",)
    column = "image"
    processor = "image_processor"
    processor_hint = '"published": the one of the published training'
    augments = True
    plural = "images"

    def check(self, encoder: Any, given: Mapping[str, Tensor]) -> None:
        """Check that pixels are a batch of images.

        Raises:
            ValueError: If they are not.
        """
        pixel_values = given.get("pixel_values")
        if pixel_values is not None and pixel_values.dim() != 4:
            raise ValueError(
                f"pixel_values must be (B,channels,height,width), got {tuple(pixel_values.shape)}"
                + (": give one image as a batch, pixel_values[None]" if pixel_values.dim() == 3 else "")
            )

    def doubts(self, encoder: Any, given: Mapping[str, Tensor]) -> Iterator[str]:
        """Yield a warning about pixels that are not floating point."""
        pixels = given.get("pixel_values")
        if pixels is not None and not pixels.is_floating_point():
            yield (
                f"pixel_values are {pixels.dtype}, as if no image processor had been used, but encoders are trained on normalised "
                "floating-point pixels: use model.image_processor(images, return_tensors='pt')"
            )

    def not_a_tensor(self, name: str, value: object) -> str | None:
        """Return the advice for images that are not a tensor."""
        kind = type(value).__name__
        fix = f"torch.from_numpy({name})" if kind == "ndarray" else f"torch.tensor({name})"
        return f"must be a tensor, got {kind}: {fix}, or model.image_processor(images, return_tensors='pt') for images"

    def parse(self, value: Any, source: Source) -> str | StoredImage | None:
        """Return the path of an image, or an image stored in a table, None for no image.

        Raises:
            ValueError: If the value is neither.
        """
        # The form in which the library datasets stores images.
        if isinstance(value, Mapping) and value.keys() == {"bytes", "path"}:
            name, data = value["path"], value["bytes"]
            value = StoredImage(name or source.key, data) if isinstance(data, bytes) else name
        if isinstance(value, bytes):
            value = StoredImage(source.key, value)
        if isinstance(value, StoredImage):
            return value
        if not (value is None or isinstance(value, str) or (source.template != "{}" and is_key(value))):
            raise ValueError(f'"{source.key}" must be the path of an image, or null for none, got {shown(value)}')
        return None if value in (None, "") else source.template.format(value)

    def of_cell(self, cell: str) -> str:
        """Return the cell: the path of an image."""
        return cell.strip()

    def finder(self, source: Source) -> Finder:
        """Return a finder of image files in the data folder."""
        return ImageFiles(source)

    def reader(self, encoder: Any, processor: Any, config: Any) -> Images:
        """Return a reader that applies the image processor."""
        _require_pillow()
        return Images(self, processor, encoder.config)

    def load_processor(self, source: str | Path, encoder: Any = None, config: Any = None, format: str = "", **options: Any) -> Any:
        """Load an image processor from a folder or the hub; "published" is the one of the published training."""
        # Imported from its own module: in transformers 5.17, the top-level name requires torchvision without needing it.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        if source == PUBLISHED:
            size = encoder.config.image_size
            return published_image_processor(size if isinstance(size, int) else size[0], format=format)
        return AutoImageProcessor.from_pretrained(source, **options)

    def key(self, raw: Path | StoredImage | None) -> str:
        """Return the path, size and modification time of the file."""
        if raw is None:
            return ""
        if isinstance(raw, StoredImage):
            return hashlib.sha256(raw.data).hexdigest()
        stat = raw.stat()
        return f"{os.path.abspath(raw)}\n{stat.st_size} {stat.st_mtime_ns}"

    def identity(self, raw: Path | StoredImage | None) -> str | None:
        """Return the name of the file."""
        if isinstance(raw, StoredImage):
            return self.key(raw)
        return None if raw is None else raw.name

    def text_of(self, raw: Path | StoredImage | None) -> None:
        """Return None, because an image has no text."""

    def picture_of(self, raw: Path | StoredImage | None) -> Path | None:
        """Return the image file, None for an image stored in a table."""
        return None if isinstance(raw, StoredImage) else raw

    def describe(self, given: Mapping[str, Tensor]) -> str | None:
        """Return the size of an image after the image processor."""
        pixels = given.get("pixel_values")
        return None if pixels is None else f"its image {tuple(pixels.shape[1:])} after the image processor"


def published_image_processor(size: int = 224, *, format: str = "food101") -> CLIPImageProcessorPil:
    """Return the preprocessing of the published MoPE: resize to 256, crop the central 224, normalise as in the released code.

    Args:
        size: Size of the encoder's images; they are resized to 8/7 of it before the crop.
        format: Format of the data. MM-IMDB and SNLI-VE images are resized to a square; others keep their aspect ratio, and the
            crop removes more.
    """
    from transformers import CLIPImageProcessorPil

    before = round(size * 8 / 7)
    squeezed = format in ("mm-imdb", "snli-ve")
    return CLIPImageProcessorPil(
        size={"height": before, "width": before} if squeezed else {"shortest_edge": before},
        resample=2,
        crop_size={"height": size, "width": size},
        image_mean=list(PUBLISHED_MEAN),
        image_std=list(PUBLISHED_STD),
    )


class Images(Reader):
    """Reader that applies an image processor. An item of None becomes a grey image."""

    def __init__(self, modality: Modality, processor: Any, config: Any) -> None:
        super().__init__(modality, processor)
        self._mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"
        size = getattr(config, "image_size", None) or 224
        self._grey_size = (size, size) if isinstance(size, int) else tuple(reversed(size))

    def __call__(self, raw: Any, *, augment: Callable[[Any], Any] | None = None) -> dict[str, Any]:
        """Return `pixel_values`, float32 (channels,height,width). `augment` maps a PIL image to a PIL image."""
        image = self._read(raw)
        return {"pixel_values": self._pixel_values(augment(image) if augment else image)}

    def of_different_shapes(self, name: str, shapes: Sequence[tuple[int, ...]]) -> str:
        """Return the error message for images of different sizes."""
        return (
            f"the image processor returns images of different sizes, {', '.join(map(str, shapes))}: "
            "configure it to resize or crop them to the size of the vision backbone"
        )

    def digest(self) -> Any:
        """Return the state of the image processor, and the mode and grey size that images are converted to."""
        import PIL

        return [PIL.__version__, super().digest(), self._mode, self._grey_size]

    def _read(self, path: Any) -> Any:
        """Return a PIL image as the encoder reads it, from a path, a `StoredImage`, a PIL image or None."""
        from PIL import Image

        if path is None:
            return Image.new("RGB", self._grey_size, (GREY,) * 3).convert(self._mode)
        try:
            if isinstance(path, Image.Image):
                return with_8_bits(path).convert(self._mode)
            with Image.open(io.BytesIO(path.data) if isinstance(path, StoredImage) else path) as image:
                return with_8_bits(image).convert(self._mode)
        # Decoders may raise any error for a broken file, and in a worker it would not name the file.
        except Exception as error:
            raise UnreadableError(f"{path}, the image", error) from error

    def _pixel_values(self, image: Any) -> Tensor:
        import numpy as np

        if self._mode == "L":
            processed = self.processor(image, return_tensors="pt")
        else:
            # The layout is given explicitly, because an image 3 pixels high could be mistaken for channels-first. The image is
            # passed as an array, because processors with and without torchvision interpret the layout of a PIL image differently.
            processed = self.processor(np.array(image), return_tensors="pt", input_data_format="channels_last")
        pixels: Tensor = processed["pixel_values"][0]
        return pixels.float()


def with_8_bits(image: Any) -> Any:
    """Reduce a PIL image with 16 bits per channel to the 8 most significant bits; return other images unchanged.

    Pillow itself would clip values above 255, so that almost all of such an image would be white.

    Raises:
        ValueError: If the value of white is unknown (other images of mode "I" or "F").
    """
    import numpy as np
    from PIL import Image

    # Older versions of Pillow open a PNG file of 16 bits as "I".
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its value for white is unknown (mode {image.mode}): save it with 8 or 16 bits")
    return image


def _require_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError("reading images needs Pillow: pip install pillow") from None


class ImageFiles(Finder):
    """Finder of image files. It lists folders instead of checking each file, which is much faster over a network."""

    def __init__(self, source: Source) -> None:
        self._folder, self._key, self._grey = source.folder, source.key, source.on_missing == "grey"
        self._inside = os.path.join(os.path.abspath(source.folder), "")
        self._files: dict[str, set[str]] = {}
        self._found: dict[str, Path | None] = {}
        self._missing: list[str] = []

    def find(self, parsed: str | StoredImage | None) -> Path | StoredImage | None:
        """Return the image file, None for no image or a missing one that a grey image replaces.

        Raises:
            ValueError: If the file is missing, or outside the data folder.
        """
        if parsed is None or isinstance(parsed, StoredImage):
            return parsed
        if parsed not in self._found:
            self._found[parsed] = self._look(parsed)
        return self._found[parsed]

    def _look(self, name: str) -> Path | None:
        path = os.path.normpath(name)
        path = path.removeprefix(self._inside)
        if os.path.isabs(path) or path.split(os.sep, 1)[0] == os.pardir:
            raise ValueError(
                f'"{self._key}" points outside the data folder ({shown(name)}): put a link to the images into {self._folder}'
            )
        path = os.path.join(self._folder, path)
        if self._exists(path):
            return Path(path)
        if not self._grey:
            raise ValueError(f"no image {path}: put it there, or use grey images for missing ones (on_missing_image='grey')")
        self._missing.append(path)
        return None

    def _exists(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self._files:
            self._files[folder] = _files_in(folder)
        # Check files that are not listed individually: on some file systems, A.jpg and a.jpg are the same file.
        return name in self._files[folder] or os.path.isfile(path)

    def warn(self, file: Path) -> None:
        """Warn about missing images."""
        if self._missing:
            count = f"{len(self._missing)} of {len(self._found)}"
            warnings.warn(f"{file}: {count} images are missing and replaced with grey ones: {listed(self._missing)}", stacklevel=3)


def _files_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


register_modality(Vision())
