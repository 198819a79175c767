"""Conversion of raw items to inputs of the encoders."""

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
    """Conversion of raw items by the readers of their modalities. It holds no weights, so workers may copy it.

    Args:
        model: Model with a processor, such as `image_processor` or `tokenizer`, for each encoder in `modalities` that needs one.
        modalities: Names of encoders of the model.

    Raises:
        ValueError: The model lacks a processor.
        ModuleNotFoundError: Pillow is not installed.
    """

    def __init__(self, model: FusionModel, modalities: Sequence[str]) -> None:
        self.modalities = tuple(modalities)
        self._readers = readers_of(model, self.modalities)

    def __call__(self, example: Example, *, augment: Callable[[Any], Any] | None = None) -> dict[str, Any]:
        """Convert an example to inputs of the encoders, by their names in a batch.

        `augment` maps the items of modalities that support augmentation, such as PIL images, to items of the same kind.

        Raises:
            DataError: An item cannot be read; the message names its file.
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
        """Collate items of `__call__` into a batch, by the names of inputs in a batch.

        Raises:
            DataError: Items do not fit together, such as images of different sizes.
        """
        batch: dict[str, Tensor] = {}
        for slot, reader in self._readers:
            # Inputs are absent if cached features replace them.
            if slot.required in items[0]:
                collated = reader.collate([slot.own(item) for item in items])
                batch |= {f"{slot.prefix}{name}": tensor for name, tensor in collated.items()}
        return batch

    def digest(self) -> str:
        """Return a digest of everything that affects the result for given items."""
        parts: dict[str, Any] = {"transformers": transformers.__version__}
        parts |= {slot.name: [slot.modality.name, reader.digest()] for slot, reader in self._readers}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
