"""Base classes for turning a value in a line of data into encoder inputs, with defaults that a modality may override."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mope.printing import first_of

if TYPE_CHECKING:
    from torch import Tensor

    from .registry import Modality

# Maximum number of problems listed in an error message.
SHOWN = 10


class DataError(ValueError):
    """Error for unusable data; the message names the file, the line and the fix."""


class UnreadableError(Exception):
    """Error for an item that cannot be read; `mope.data` adds the example it belongs to.

    Args:
        what: Description of the item, such as "FILE, the image" or "the sound".
        why: Reason why it cannot be read.
    """

    def __init__(self, what: str, why: object) -> None:
        super().__init__(what, str(why))
        self.what, self.why = what, str(why)


@dataclass(frozen=True)
class Source:
    """Location of a modality's raw items in a split.

    Args:
        key: Key of the item in each line.
        folder: Folder of the data.
        template: Format string for the value of the key; "{}" for the value itself.
        on_missing: "error", or "grey" to replace missing files with a neutral item.
    """

    key: str
    folder: Path
    template: str = "{}"
    on_missing: str = "error"


class Finder:
    """Finds raw items from the results of `Modality.parse`, after all lines have been parsed.

    By default, the parsed value already is the raw item.
    """

    def find(self, parsed: Any) -> Any:
        """Return the raw item.

        Raises:
            ValueError: If there is none. The message names the fix; the caller adds the line.
        """
        return parsed

    def warn(self, file: Path) -> None:
        """Warn about suspicious items of a data file, after all its lines have been looked up."""


@dataclass(frozen=True)
class Padding:
    """Padding of a modality's batches along the tokens, the second dimension.

    Args:
        values: Padding value of each input with one entry per token, and of the mask, by the modality's names.
        longest: Maximum number of tokens that the encoder accepts, None if unknown.
        left: Whether padding goes in front of the tokens.
    """

    values: Mapping[str, int]
    longest: int | None = None
    left: bool = False


class Reader:
    """Converter of raw items into encoder inputs. It holds no weights and can be pickled, because each worker has a copy.

    By default, the processor is called with the raw item and returns a tensor, or tensors by the modality's names. Without a
    processor, the item must be numbers, which become a float32 tensor. All items of a batch must have the same shape.

    Args:
        modality: Modality of the items.
        processor: Processor of the model, or None.
    """

    def __init__(self, modality: Modality, processor: Any = None) -> None:
        self.modality, self.processor = modality, processor

    def __call__(self, raw: Any, *, augment: Callable[[Any], Any] | None = None) -> dict[str, Any]:
        """Return the encoder inputs of a raw item, by the modality's own batch names.

        Args:
            raw: The item.
            augment: Augmentation of raw items, None for none.

        Raises:
            UnreadableError: If the item cannot be read.
        """
        import torch

        try:
            item = raw if augment is None else augment(raw)
            read = torch.tensor(item, dtype=torch.float32) if self.processor is None else self.processor(item)
        # In a worker, other errors would not tell which item failed.
        except Exception as error:
            raise UnreadableError(f"the {self.modality.name}", error) from error
        return dict(read) if isinstance(read, Mapping) else {self.modality.required: read}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate results of `__call__` into a batch.

        Raises:
            DataError: If the items have different shapes.
        """
        import torch

        batch = {}
        for name in items[0]:
            shapes = {tuple(item[name].shape) for item in items}
            if len(shapes) > 1:
                raise DataError(self.of_different_shapes(name, sorted(shapes)))
            batch[name] = torch.stack([item[name] for item in items])
        return batch

    def of_different_shapes(self, name: str, shapes: Sequence[tuple[int, ...]]) -> str:
        """Return the error message for inputs of different shapes in one batch."""
        return (
            f"{name} of one batch have different shapes, {', '.join(map(str, shapes))}: "
            f"make them equal in the data or a processor, or pad them in a reader of {self.modality.name!r}"
        )

    def digest(self) -> Any:
        """Return a JSON-compatible value that changes with everything that affects the result for an item."""
        if hasattr(self.processor, "to_json_string"):
            return [type(self.processor).__name__, self.processor.to_json_string()]
        return repr(self.processor)


def is_key(value: object) -> bool:
    """Return whether a value in a line is a string or an integer."""
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))


def listed(items: Sequence[str]) -> str:
    """Return the first few items as text, separated by commas."""
    return first_of(items, SHOWN, ", ")


def shown(value: object) -> str:
    """Return a value as JSON, truncated to 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str).encode(errors="backslashreplace").decode()
    return text if len(text) <= 60 else f"{text[:57]}..."
