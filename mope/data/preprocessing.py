"""From a line of text and an image file to what the encoders read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil

from .formats import DataError, Example

if TYPE_CHECKING:
    from mope.fusion.base import FusionModel

GREY = 128
# Larger than any text: tokenizers that know no limit say 1e30.
NO_LIMIT = 2**31
PUBLISHED_MEAN, PUBLISHED_STD = (0.46777044, 0.44531429, 0.40661017), (0.12221994, 0.12145835, 0.14380469)


def published_image_processor(size: int = 224, *, format: str = "food101") -> CLIPImageProcessorPil:
    """The preprocessing with which MoPE was published: 256 pixels, the 224 in the middle, mean and deviation of the released code.

    Args:
        size: of the images that the encoder reads; before the crop they are 8/7 of it.
        format: of the data. MM-IMDB and SNLI-VE are squeezed into a square, the others keep their proportions and lose more at the
            crop.
    """
    before = round(size * 8 / 7)
    squeezed = format in ("mm-imdb", "snli-ve")
    return CLIPImageProcessorPil(
        size={"height": before, "width": before} if squeezed else {"shortest_edge": before},
        resample=2,
        crop_size={"height": size, "width": size},
        image_mean=list(PUBLISHED_MEAN),
        image_std=list(PUBLISHED_STD),
    )


class Preprocessing:
    """Images through a model's image processor, texts through its tokenizer. It holds no weights: workers may have copies.

    Args:
        model: with `image_processor` and `tokenizer`, for those of its encoders that are asked for.
        modalities: "vision", "text" or both.

    Raises:
        ValueError: the model lacks one of the two.
        ModuleNotFoundError: Pillow is not installed.
    """

    def __init__(self, model: FusionModel, modalities: Sequence[str]) -> None:
        self.modalities = tuple(modalities)
        for modality, name in (("vision", "image_processor"), ("text", "tokenizer")):
            if modality in self.modalities and getattr(model, name) is None:
                raise ValueError(f"the model has no {name}: set model.{name}, for example to the one of its {modality} backbone")
        if "vision" in self.modalities:
            _require_pillow()
            config: Any = model.backbone("vision").config
            self._processor = model.image_processor
            self._mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"
            size = getattr(config, "image_size", None) or 224
            self._grey_size = (size, size) if isinstance(size, int) else tuple(reversed(size))
        if "text" in self.modalities:
            self._tokenizer = model.tokenizer
            if self._tokenizer.pad_token_id is None:
                raise ValueError("the tokenizer has no padding token: set model.tokenizer.pad_token")
            self._pads_left = model.config.padding_side == "left"
            self._max_tokens = max_tokens(self._tokenizer, model.backbone("text"))

    def __call__(self, example: Example, *, augment: Callable[[Any], Any] | None = None) -> dict[str, Any]:
        """`pixel_values` (channels,height,width) float32; `input_ids` and, if the tokenizer has them, `token_type_ids`, lists.

        `augment` gets and gives a PIL image.

        Raises:
            DataError: the image cannot be read; names its file.
        """
        item: dict[str, Any] = {}
        if "vision" in self.modalities:
            image = self._read(example)
            item["pixel_values"] = self._pixel_values(augment(image) if augment else image)
        if "text" in self.modalities:
            encoded = self._tokenizer(example.text, truncation=self._max_tokens is not None, max_length=self._max_tokens)
            item |= {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
        return item

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Items of `__call__` -> a batch of what they have.

        `pixel_values` (B,channels,height,width); `input_ids`, `attention_mask`, `token_type_ids` (B,L) int64.

        Raises:
            DataError: images have different sizes.
        """
        batch = {}
        if "pixel_values" in items[0]:
            sizes = {tuple(item["pixel_values"].shape) for item in items}
            if len(sizes) > 1:
                raise DataError(
                    f"the image processor gives images of different sizes, {', '.join(map(str, sorted(sizes)))}: "
                    "let it resize or crop them to that of the vision backbone"
                )
            batch["pixel_values"] = torch.stack([item["pixel_values"] for item in items])
        if "input_ids" in items[0]:
            batch["input_ids"] = self._pad([item["input_ids"] for item in items], self._tokenizer.pad_token_id)
            batch["attention_mask"] = self._pad([[1] * len(item["input_ids"]) for item in items], 0)
            if "token_type_ids" in items[0]:
                batch["token_type_ids"] = self._pad([item["token_type_ids"] for item in items], self._tokenizer.pad_token_type_id)
        return batch

    def digest(self) -> str:
        """Changes with everything that changes what comes out for the same text or file."""
        parts: dict[str, Any] = {"transformers": transformers.__version__}
        if "vision" in self.modalities:
            import PIL

            parts["image_processor"] = [
                PIL.__version__,
                type(self._processor).__name__,
                self._processor.to_json_string(),
                self._mode,
            ]
            parts["grey"] = self._grey_size
        if "text" in self.modalities:
            parts["tokenizer"] = [_tokenizer_state(self._tokenizer), self._max_tokens, self._pads_left]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _read(self, example: Example) -> Any:
        from PIL import Image

        if example.image is None:
            return Image.new("RGB", self._grey_size, (GREY,) * 3).convert(self._mode)
        try:
            with Image.open(example.image) as image:
                return with_8_bits(image).convert(self._mode)
        # A broken file makes decoders raise anything; in a worker none of it would say which file.
        except Exception as error:
            raise DataError(f"{example.image}, the image of example {example.id!r}, cannot be read: {error}") from error

    def _pixel_values(self, image: Any) -> Tensor:
        if self._mode == "L":
            processed = self._processor(image, return_tensors="pt")
        else:
            # The layout is said, for an image that is 3 pixels high would pass for one with channels first. With it goes an array:
            # of a PIL image, transformers' processors with torchvision and those without take it to mean different things.
            processed = self._processor(np.array(image), return_tensors="pt", input_data_format="channels_last")
        return processed["pixel_values"][0].float()

    def _pad(self, rows: Sequence[Sequence[int]], value: int) -> Tensor:
        length = max(map(len, rows))
        padding = [[value] * (length - len(row)) for row in rows]
        return torch.tensor([[*p, *row] if self._pads_left else [*row, *p] for row, p in zip(rows, padding, strict=True)])


def with_8_bits(image: Any) -> Any:
    """A PIL image with 16 or more bits in a pixel -> the 8 that count the most; any other image as it is.

    Pillow would cut off what is above 255, so that nearly all of such an image is white.

    Raises:
        ValueError: nothing says which value is white.
    """
    from PIL import Image

    # Older versions of Pillow open a PNG file of 16 bits as "I".
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"which of its values is white is not known (mode {image.mode}): save it with 8 or 16 bits")
    return image


def _require_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError("reading images needs Pillow: pip install pillow") from None


def max_tokens(tokenizer: Any, text: nn.Module) -> int | None:
    """How long a text may be, with its special tokens; None: as long as it likes."""
    limits = [tokenizer.model_max_length]
    config: Any = text.config
    if (positions := getattr(config, "max_position_embeddings", None)) is not None:
        # RoBERTa counts positions from the number after the padding token's.
        first = getattr(getattr(text, "embeddings", None), "padding_idx", None)
        limits.append(positions if first is None else positions - first - 1)
    limit = min(limits)
    return limit if limit < NO_LIMIT else None


def _tokenizer_state(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [type(tokenizer).__name__, tokenizer.get_vocab(), repr(tokenizer.init_kwargs)]
    state = json.loads(backend.to_str())
    # These two remember the last call.
    return {name: value for name, value in state.items() if name not in ("truncation", "padding")}
