"""From raw items to what the encoders read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import transformers
from torch import Tensor

from mope.fusion.predicting import readers_of
from mope.modalities import DataError, UnreadableError

from .formats import Example

if TYPE_CHECKING:
    from mope.fusion.base import FusionModel


class Preprocessing:
    """Raw items through the readers of their modalities. It holds no weights: workers may have copies.

    Args:
        model: with a processor, such as `image_processor` and `tokenizer`, for those of its encoders that are asked for.
        modalities: names of encoders of the model.

    Raises:
        ValueError: the model lacks a processor.
        ModuleNotFoundError: Pillow is not installed.
    """

    def __init__(self, model: FusionModel, modalities: Sequence[str]) -> None:
        self.modalities = tuple(modalities)
        self._readers = readers_of(model, self.modalities)

    def __call__(self, example: Example, *, augment: Callable[[Any], Any] | None = None) -> dict[str, Any]:
        """Make the inputs of the encoders from an example, by their names in a batch.

        `augment` gets and gives what the reader of a modality that can be augmented has in hand, a PIL image for images.

        Raises:
            DataError: an item cannot be read; names its file.
        """
        item: dict[str, Any] = {}
        for slot, reader in self._readers:
            try:
                read = reader(example.inputs[slot.name], augment=augment if slot.modality.augments else None)
            except UnreadableError as error:
                raise DataError(f"{error.what} of example {example.id!r}, cannot be read: {error.why}") from error.__cause__
            item |= {f"{slot.prefix}{name}": value for name, value in read.items()}
        return item

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Items of `__call__` -> a batch of what they have, by the names of a batch.

        Raises:
            DataError: items do not fit together, such as images of different sizes.
        """
        batch: dict[str, Tensor] = {}
        for slot, reader in self._readers:
            # Not where features take its place.
            if slot.required in items[0]:
                collated = reader.collate([slot.own(item) for item in items])
                batch |= {f"{slot.prefix}{name}": tensor for name, tensor in collated.items()}
        return batch

    def digest(self) -> str:
        """Changes with everything that changes what comes out for the same items."""
        parts: dict[str, Any] = {"transformers": transformers.__version__}
        parts |= {slot.name: [slot.modality.name, reader.digest()] for slot, reader in self._readers}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
