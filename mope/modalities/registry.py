"""The modalities that are known: what a batch names, how raw items are read, and how both are checked.

Nothing here, in `text` or in `vision` imports torch before it is needed: the command line has options for each modality.
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

# Characters that pages show of an item.
LONGEST_TEXT = 160


class Modality:
    """One kind of input. Subclass it and `register_modality` an instance; all but `name` and `inputs` has a default.

    By default a raw item is numbers in a line of data, which become a float32 tensor; batches are stacked.

    A model takes its encoder under the modality's name, `MoPEForClassification(config, audio=encoder)`, and what the encoder reads
    under the names of `inputs`. A modality may occur several times in a model; the inputs of one that has another name are
    prefixed by it and an underscore, see `Slot`.
    """

    name: ClassVar[str]
    # Name in a batch -> name that `BackboneAdapter.embed` gets; the first one is required.
    inputs: ClassVar[Mapping[str, str]]
    # Name in a batch of the (B,L) attention mask, 1 for tokens and 0 for padding; None for an input without padding.
    mask: ClassVar[str | None] = None
    # Whether each input has one entry for each token, (B,L) or (1,L), so that tokens may be put in another order.
    input_per_token: ClassVar[bool] = False
    # Switches of `embed`, by name in a call of the model; an adapter says with `takes` which ones it knows.
    flags: ClassVar[tuple[str, ...]] = ()

    # Key of the raw items in lines of "jsonl" data; None: the modality's name.
    column: ClassVar[str | None] = None
    # Attribute of a model, and folder in a saved one, with what makes inputs of raw items; None: none is needed.
    processor: ClassVar[str | None] = None
    # Further help for its option of the command line, after "from the hub or a folder".
    processor_hint: ClassVar[str] = ""
    # Whether readers pass raw items through the augmentation of `mope.data.Examples`.
    augments: ClassVar[bool] = False
    # Several items, in messages.
    plural: ClassVar[str] = "items"

    @property
    def required(self) -> str:
        """Name of the input that an encoder cannot do without."""
        return next(iter(self.inputs))

    def check(self, encoder: Any, given: Mapping[str, Tensor]) -> None:
        """Raise ValueError where inputs, by their names in a batch, the mask among them, are not what the encoder can read.

        By default the mask is (B,L) where the required input is (B,L,...), and so is every input that has an entry for each token.
        """
        if self.required not in given:
            return
        shape = tuple(given[self.required].shape[:2])
        if self.mask is not None and self.mask in given and tuple(given[self.mask].shape) != shape:
            raise ValueError(f"{self.mask} must be {shape}, as {self.required} begins, got {tuple(given[self.mask].shape)}")
        for name in self.inputs if self.input_per_token else ():
            if name in given and tuple(given[name].shape[:2]) not in (shape, (1, *shape[1:])):
                raise ValueError(f"{name} must begin with {shape}, as {self.required} does, got {tuple(given[name].shape)}")

    def doubts(self, encoder: Any, given: Mapping[str, Tensor]) -> Iterator[str]:
        """Yield what is seldom meant about inputs that run; a model warns of each once."""
        yield from ()

    def not_a_tensor(self, name: str, value: object) -> str | None:
        """Describe the fault of an input that is not a tensor, and its fix; None for the general advice."""
        return None

    def parse(self, value: Any, source: Source) -> Any:
        """Return what a value of a line says, nothing looked up yet. Raise ValueError where it is wrong."""
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
        """Return what makes raw items of what `parse` returned, for all lines of a split."""
        return Finder()

    def reader(self, encoder: Any, processor: Any, config: Any) -> Reader:
        """Return what makes inputs of raw items; it keeps nothing of the encoder but numbers.

        Args:
            encoder: of the model.
            processor: what the model holds under the name of `processor`, never None if there is such a name.
            config: of the model.

        Raises:
            ValueError: the processor does not do.
            ModuleNotFoundError: a package is missing.
        """
        return Reader(self, processor)

    def padding(self, encoder: Any, processor: Any, config: Any) -> Padding | None:
        """Return how batches may be padded further; None: they may not. `processor` may be None."""
        if self.mask is None or not self.input_per_token:
            return None
        return Padding(dict.fromkeys((*self.inputs, self.mask), 0))

    def load_processor(self, source: str | Path, encoder: Any = None, config: Any = None, format: str = "", **options: Any) -> Any:
        """Return the processor in a folder or on the hub.

        Args:
            source: name or folder.
            encoder, config: of the model that gets it, and
            format: of the data, where they are known.
            options: of `from_pretrained`.

        Raises:
            OSError, ValueError: it cannot be loaded.
        """
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(source, **options)

    def check_processor(self, processor: Any, config: Any) -> None:
        """Raise ValueError where a processor does not fit the configuration of a model."""

    def key(self, raw: Any) -> str:
        """Return what the features of an item are kept under: it changes whenever the item does."""
        return repr(raw)

    def identity(self, raw: Any) -> Any:
        """Return what JSON can hold, and a resumed run compares: the item, wherever its files lie now."""
        return raw

    def size(self, raw: Any) -> int:
        """Return what items are sorted by, so that a batch needs little padding."""
        return 0

    def text_of(self, raw: Any) -> str | None:
        """Return the words of an item, or whatever a page may show; None: there is nothing to read."""
        return str(raw)[:LONGEST_TEXT]

    def picture_of(self, raw: Any) -> Path | None:
        """Return the image file that shows an item, None if there is none."""
        return None

    def describe(self, given: Mapping[str, Tensor]) -> str | None:
        """Return what to say of the inputs of one item, by the modality's own names, that do not go through a model."""
        return f"its {self.name} {tuple(given[self.required].shape[1:])}" if self.required in given else None


@dataclass(frozen=True)
class Slot:
    """A modality in a model, under a name.

    Args:
        name: in the model: the keyword of the encoder, and the prefix of the inputs if it is not the modality's own name.
        modality: what it is.

    prefix: what stands in front of the modality's names in a batch.
    inputs: name in a batch -> name that the encoder knows.
    mask: name in a batch of the attention mask, None for an input without padding.
    flags: name in a call -> name that `embed` gets, of switches.
    names: of all tensors in a batch.
    """

    name: str
    modality: Modality

    # Computed once, since every call of a model reads them.
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
        """Name in a batch of the input that the encoder cannot do without."""
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
        """Name of its processor in a model; without one of that name the modality's serves."""
        return None if self.modality.processor is None else f"{self.prefix}{self.modality.processor}"

    def own(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a batch holds of this slot, under the modality's own names; what is None is left out."""
        start = len(self.prefix)
        return {name[start:]: given[name] for name in self.names if name in given and given[name] is not None}


_MODALITIES: dict[str, Modality] = {}


def is_argument(name: object) -> bool:
    """Return whether something can be the name of a keyword argument of a method, and no private one."""
    return isinstance(name, str) and name.isidentifier() and not (iskeyword(name) or name.startswith("_") or name == "self")


def register_modality(modality: Modality) -> None:
    """Teach the library a modality. A second registration of a name replaces the first.

    Raises:
        ValueError: it names no input, a name cannot be that of an argument, or an input or the processor has the name of that of
            another modality.
    """
    kind, names = type(modality).__name__, [modality.name, *modality.inputs, *(n for n in (modality.mask, *modality.flags) if n)]
    if not modality.inputs:
        raise ValueError(f"{kind}: a modality has inputs, name in a batch -> name that the encoder knows; got none")
    if wrong := [name for name in names if not is_argument(name)]:
        raise ValueError(f"{kind}: a name must do for an argument of a call, got {wrong[0]!r}")
    own = {*modality.inputs, modality.mask, *modality.flags} - {None}
    for other in _MODALITIES.values():
        if other.name != modality.name and (clash := own & {*other.inputs, other.mask, *other.flags}):
            raise ValueError(
                f"modality {modality.name!r}: {', '.join(sorted(map(str, clash)))} already name inputs of {other.name!r}"
            )
        if other.name != modality.name and modality.processor is not None and modality.processor == other.processor:
            raise ValueError(f"modality {modality.name!r}: {modality.processor} is already the processor of {other.name!r}")
    _MODALITIES[modality.name] = modality


def unregister_modality(name: str) -> None:
    """Undo `register_modality`. Do nothing if the modality is unknown."""
    _MODALITIES.pop(name, None)


def find_modality(name: str) -> Modality:
    """Return a modality by its name.

    Raises:
        ValueError: there is none; the message says which there are, and how to add one.
    """
    if name not in _MODALITIES:
        raise ValueError(
            f"modality {name!r} is not known; known are {', '.join(map(repr, _MODALITIES))}. "
            "Subclass mope.modalities.Modality and call mope.register_modality(YourModality()), "
            "or say what it is, MoPEConfig(named={...})"
        )
    return _MODALITIES[name]


def slots_of(config: Any) -> dict[str, Slot]:
    """Return the modalities of the model of a configuration by their names in it."""
    slots: dict[str, Slot] | None = getattr(config, "slots", None)
    return {name: Slot(name, find_modality(name)) for name in config.modalities} if slots is None else slots


def complementary_of(config: Any) -> tuple[str, ...]:
    """Return the names of those slots whose encoders run first; () where there are none."""
    return tuple(name for name in config.modalities if name != config.main) if config.complementary else ()


def known() -> dict[str, Modality]:
    """Return the registered modalities by name."""
    return dict(_MODALITIES)
