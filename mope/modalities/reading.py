"""From a value in a line of data to what an encoder reads: what a modality may say of it, and defaults."""

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

# How many problems an error shows.
SHOWN = 10


class DataError(ValueError):
    """Data that cannot be used: names file, line and what to do."""


class UnreadableError(Exception):
    """Say that an item cannot be read; `mope.data` adds of which example it is.

    Args:
        what: "FILE, the image", "the sound".
        why: what is wrong with it.
    """

    def __init__(self, what: str, why: object) -> None:
        super().__init__(what, str(why))
        self.what, self.why = what, str(why)


@dataclass(frozen=True)
class Source:
    """Say where a split has the raw items of a modality.

    Args:
        key: in each line.
        folder: of the data.
        template: what the format makes of a value of the key, "{}" the value itself.
        on_missing: "error", or "grey" where something neutral may stand for a file that is named and not there.
    """

    key: str
    folder: Path
    template: str = "{}"
    on_missing: str = "error"


class Finder:
    """Looks up what `Modality.parse` returned, once all lines could be read. By default that is the raw item already."""

    def find(self, parsed: Any) -> Any:
        """Return the raw item. Raise ValueError where there is none; the message says what to do, and the line is added."""
        return parsed

    def warn(self, file: Path) -> None:
        """Warn of what was found in a file and may not be meant; every line has been looked up."""


@dataclass(frozen=True)
class Padding:
    """How batches of a modality are padded along the tokens, the second dimension.

    Args:
        values: of each input that has one entry for each token, and of the mask, by the names of a modality.
        longest: tokens of the longest item that the encoder takes, None if that is not known.
        left: whether padding stands in front.
    """

    values: Mapping[str, int]
    longest: int | None = None
    left: bool = False


class Reader:
    """Makes what an encoder reads of raw items. It holds no weights, and can be pickled: workers have copies.

    By default an item goes through the processor, a function of the raw item -> tensor, or tensors by the modality's names; without
    one it is numbers, which become a float32 tensor. Items of one shape make a batch.

    Args:
        modality: of the items.
        processor: of the model, or None.
    """

    def __init__(self, modality: Modality, processor: Any = None) -> None:
        self.modality, self.processor = modality, processor

    def __call__(self, raw: Any, *, augment: Callable[[Any], Any] | None = None) -> dict[str, Any]:
        """Return what the encoder reads of a raw item, by the modality's own names in a batch.

        Args:
            raw: the item.
            augment: distorts what the modality says that it distorts; None where nothing is to be.

        Raises:
            UnreadableError: the item cannot be read.
        """
        import torch

        try:
            item = raw if augment is None else augment(raw)
            read = torch.tensor(item, dtype=torch.float32) if self.processor is None else self.processor(item)
        # In a worker nothing else would say which item it was.
        except Exception as error:
            raise UnreadableError(f"the {self.modality.name}", error) from error
        return dict(read) if isinstance(read, Mapping) else {self.modality.required: read}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return a batch of what `__call__` returned.

        Raises:
            DataError: the items have different shapes.
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
        """Return what to say of inputs that do not fit into one batch."""
        return (
            f"{name} of one batch have different shapes, {', '.join(map(str, shapes))}: "
            f"make them equal in the data or a processor, or pad them in a reader of {self.modality.name!r}"
        )

    def digest(self) -> Any:
        """Return what JSON can hold, and changes with everything that changes the result for the same item."""
        if hasattr(self.processor, "to_json_string"):
            return [type(self.processor).__name__, self.processor.to_json_string()]
        return repr(self.processor)


def is_key(value: object) -> bool:
    """Whether a value of a line is a name or a number."""
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))


def listed(items: Sequence[str]) -> str:
    """Return the first few of some items in words."""
    return first_of(items, SHOWN, ", ")


def shown(value: object) -> str:
    """Return a value as JSON, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str).encode(errors="backslashreplace").decode()
    return text if len(text) <= 60 else f"{text[:57]}..."
