"""Registry of modalities, and the base class that defines how their inputs are named, read and checked.

Neither this module nor `text` or `vision` imports torch before it is needed, because the command line has options for each
modality.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from keyword import iskeyword
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .reading import Finder, Padding, Reader, Source, shown

if TYPE_CHECKING:
    from torch import Tensor

# Maximum number of characters of an item shown on a page.
LONGEST_TEXT = 160


class Modality:
    """Base class of modalities.

    Subclass it and register an instance with `register_modality`. Everything except `name` and `inputs` has a default. By default,
    a raw item is numbers in a line of data, which become a float32 tensor, and batches are stacked.

    A model accepts its encoder under the modality's name, as in `MoPEForClassification(config, audio=encoder)`, and the encoder's
    inputs under the names in `inputs`. A modality may occur several times in a model. If an occurrence has a name other than the
    modality's, that name and an underscore prefix the names of its inputs; see `Slot`.
    """

    name: ClassVar[str]
    # Name in a batch -> name passed to `BackboneAdapter.embed`; the first input is required.
    inputs: ClassVar[Mapping[str, str]]
    # Batch name of the attention mask (B,L), 1 for tokens and 0 for padding; None for inputs without padding.
    mask: ClassVar[str | None] = None
    # Whether each input has one entry per token, (B,L) or (1,L), so that tokens may be reordered.
    input_per_token: ClassVar[bool] = False
    # Flags of `embed`, by their names in a call of the model; an adapter declares in `takes` which ones it supports.
    flags: ClassVar[tuple[str, ...]] = ()

    # Key of the raw items in lines of "jsonl" data; None for the modality's name.
    column: ClassVar[str | None] = None
    # Name of the processor of raw items: an attribute of a model, and a folder in a saved one; None if none is needed.
    processor: ClassVar[str | None] = None
    # Additional help for its command-line option, after "from the hub or a folder".
    processor_hint: ClassVar[str] = ""
    # Whether readers pass raw items through the augmentation of `mope.data.Examples`.
    augments: ClassVar[bool] = False
    # Plural noun for the items, used in messages.
    plural: ClassVar[str] = "items"

    @property
    def required(self) -> str:
        """Name of the input that an encoder requires."""
        return next(iter(self.inputs))

    def check(self, encoder: Any, given: Mapping[str, Tensor]) -> None:
        """Check that an encoder can read the given inputs and mask, by their batch names.

        By default, the mask and every input with one entry per token must be (B,L) if the required input is (B,L,...).

        Raises:
            ValueError: If it cannot.
        """
        if self.required not in given:
            return
        shape = tuple(given[self.required].shape[:2])
        if self.mask is not None and self.mask in given and tuple(given[self.mask].shape) != shape:
            raise ValueError(f"{self.mask} must be {shape}, to match {self.required}, got {tuple(given[self.mask].shape)}")
        for name in self.inputs if self.input_per_token else ():
            if name in given and tuple(given[name].shape[:2]) not in (shape, (1, *shape[1:])):
                raise ValueError(f"{name} must start with {shape}, like {self.required}, got {tuple(given[name].shape)}")

    def doubts(self, encoder: Any, given: Mapping[str, Tensor]) -> Iterator[str]:
        """Yield warnings about inputs that are valid but probably not intended; a model shows each warning once."""
        yield from ()

    def not_a_tensor(self, name: str, value: object) -> str | None:
        """Describe an input that is not a tensor, and the fix; return None for the general advice."""
        return None

    def parse(self, value: Any, source: Source) -> Any:
        """Parse a value of a line, without looking up files.

        Raises:
            ValueError: If the value is invalid.
        """
        import torch

        try:
            torch.tensor(value, dtype=torch.float32)
        except (OverflowError, RuntimeError, TypeError, ValueError):
            raise ValueError(f'"{source.key}" must be numbers, or lists of them of one length, got {shown(value)}') from None
        return value

    def of_cell(self, cell: str) -> Any:
        """Return what a cell of a CSV file says, as a line of JSON would: by default JSON, such as `[1, 2]`, else a text."""
        try:
            return json.loads(cell)
        except (RecursionError, ValueError):
            return cell

    def finder(self, source: Source) -> Finder:
        """Return a finder that turns results of `parse` into raw items, for all lines of a split."""
        return Finder()

    def reader(self, encoder: Any, processor: Any, config: Any) -> Reader:
        """Return a reader that turns raw items into inputs; it keeps only numbers from the encoder.

        Args:
            encoder: Encoder of the model.
            processor: The model's attribute named by `processor`; never None if `processor` names one.
            config: Configuration of the model.

        Raises:
            ValueError: If the processor is unsuitable.
            ModuleNotFoundError: If a package is missing.
        """
        return Reader(self, processor)

    def padding(self, encoder: Any, processor: Any, config: Any) -> Padding | None:
        """Return how batches may be padded further, None if they may not. `processor` may be None."""
        if self.mask is None or not self.input_per_token:
            return None
        return Padding(dict.fromkeys((*self.inputs, self.mask), 0))

    def load_processor(self, source: str | Path, encoder: Any = None, config: Any = None, format: str = "", **options: Any) -> Any:
        """Load a processor from a folder or the hub.

        Args:
            source: Name or folder.
            encoder: Encoder of the model that gets the processor, if known.
            config: Configuration of that model, if known.
            format: Format of the data, if known.
            options: Options of `from_pretrained`.

        Raises:
            OSError: If it cannot be loaded.
            ValueError: If it cannot be loaded.
        """
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(source, **options)

    def check_processor(self, processor: Any, config: Any) -> None:
        """Check that a processor fits the configuration of a model.

        Raises:
            ValueError: If it does not.
        """

    def key(self, raw: Any) -> str:
        """Return the cache key of an item's features, which changes whenever the item does."""
        return repr(raw)

    def identity(self, raw: Any) -> Any:
        """Return a JSON-compatible value that identifies the item in a resumed run, even if its files have moved."""
        return raw

    def size(self, raw: Any) -> int:
        """Return the size by which items are sorted to reduce padding in batches."""
        return 0

    def text_of(self, raw: Any) -> str | None:
        """Return an item's text, or other text to show on a page; None if there is none."""
        return str(raw)[:LONGEST_TEXT]

    def picture_of(self, raw: Any) -> Path | None:
        """Return an image file to show for an item, None if there is none."""
        return None

    def describe(self, given: Mapping[str, Tensor]) -> str | None:
        """Describe one item's inputs, by the modality's own names, in the error for an item on which the model fails."""
        return f"its {self.name} {tuple(given[self.required].shape[1:])}" if self.required in given else None


@dataclass(frozen=True)
class Slot:
    """Occurrence of a modality in a model, under a name.

    Attributes:
        name: Name in the model: the keyword of the encoder, and the prefix of the inputs if it is not the modality's own name.
        modality: The modality.
        prefix: Prefix of the modality's names in a batch.
        inputs: Name in a batch -> name that the encoder uses.
        mask: Batch name of the attention mask, None for an input without padding.
        flags: Name in a call of the model -> name passed to `embed`, for each flag.
        names: Batch names of all tensors.
    """

    name: str
    modality: Modality

    # Computed once, because every call of a model reads them.
    prefix: str = field(init=False)
    inputs: Mapping[str, str] = field(init=False)
    mask: str | None = field(init=False)
    flags: Mapping[str, str] = field(init=False)
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        modality = self.modality
        prefix = "" if self.name == modality.name else f"{self.name}_"
        inputs = {f"{prefix}{name}": own for name, own in modality.inputs.items()}
        mask = None if modality.mask is None else f"{prefix}{modality.mask}"
        flags = {f"{prefix}{name}": name for name in modality.flags}
        names = (*inputs, *(() if mask is None else (mask,)))
        for name, value in dict(prefix=prefix, inputs=inputs, mask=mask, flags=flags, names=names).items():
            object.__setattr__(self, name, value)

    @property
    def required(self) -> str:
        """Batch name of the input that the encoder requires."""
        return f"{self.prefix}{self.modality.required}"

    @property
    def column(self) -> str:
        """Key of the raw items in lines of "jsonl" data."""
        return (self.modality.column or self.name) if self.name == self.modality.name else self.name

    @property
    def raw(self) -> str:
        """Name of the raw items in a call of `predict`: several items in words, `images`, where the modality has a word for it."""
        own = self.name == self.modality.name and self.modality.plural != Modality.plural
        return self.modality.plural if own else self.name

    @property
    def processor(self) -> str | None:
        """Name of its processor in a model; if the model has none of that name, the modality's own is used."""
        return None if self.modality.processor is None else f"{self.prefix}{self.modality.processor}"

    def own(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch's tensors of this slot under the modality's own names, without those that are None."""
        start = len(self.prefix)
        return {name[start:]: given[name] for name in self.names if name in given and given[name] is not None}


_MODALITIES: dict[str, Modality] = {}


def is_argument(name: object) -> bool:
    """Return whether something is a valid, non-private name for a keyword argument of a method."""
    return isinstance(name, str) and name.isidentifier() and not (iskeyword(name) or name.startswith("_") or name == "self")


def register_modality(modality: Modality) -> None:
    """Register a modality. A second registration of a name replaces the first.

    Raises:
        ValueError: If it has no inputs, a name is not valid for an argument, or an input or the processor has the same name as in
            another modality.
    """
    kind, names = type(modality).__name__, [modality.name, *modality.inputs, *(n for n in (modality.mask, *modality.flags) if n)]
    if not modality.inputs:
        raise ValueError(f"{kind}: a modality needs inputs, a mapping of batch names to the encoder's names; got none")
    if wrong := [name for name in names if not is_argument(name)]:
        raise ValueError(f"{kind}: names must be valid, non-private argument names, got {wrong[0]!r}")
    own = {*modality.inputs, modality.mask, *modality.flags} - {None}
    for other in _MODALITIES.values():
        if other.name != modality.name and (clash := own & {*other.inputs, other.mask, *other.flags}):
            raise ValueError(
                f"modality {modality.name!r}: {', '.join(sorted(map(str, clash)))} already used by inputs of {other.name!r}"
            )
        if other.name != modality.name and modality.processor is not None and modality.processor == other.processor:
            raise ValueError(f"modality {modality.name!r}: {modality.processor} is already the processor of {other.name!r}")
    _MODALITIES[modality.name] = modality


def unregister_modality(name: str) -> None:
    """Undo `register_modality`. Do nothing if the modality is unknown."""
    _MODALITIES.pop(name, None)


def find_modality(name: str) -> Modality:
    """Return a modality by name.

    Raises:
        ValueError: If there is none; the message lists the known modalities and explains how to add one.
    """
    if name not in _MODALITIES:
        raise ValueError(
            f"modality {name!r} is not known; known are {', '.join(map(repr, _MODALITIES))}. "
            "Subclass mope.modalities.Modality and call mope.register_modality(YourModality()), "
            "or give its modality in MoPEConfig(named={...})"
        )
    return _MODALITIES[name]


def slots_of(config: Any) -> dict[str, Slot]:
    """Return the slots of a model configuration by name."""
    slots: dict[str, Slot] | None = getattr(config, "slots", None)
    return {name: Slot(name, find_modality(name)) for name in config.modalities} if slots is None else slots


def complementary_of(config: Any) -> tuple[str, ...]:
    """Return the names of the slots whose encoders run before the main one; () if there are none."""
    return tuple(name for name in config.modalities if name != config.main) if config.complementary else ()


def known() -> dict[str, Modality]:
    """Return the registered modalities by name."""
    return dict(_MODALITIES)
