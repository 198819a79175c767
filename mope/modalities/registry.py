"""The modalities that are known: how a batch names what an encoder reads, and where its padding is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor


class Modality:
    """One kind of input. Subclass it and `register_modality` an instance; all but `name` and `inputs` has a default.

    A model takes its encoder under the modality's name, `MoPEForClassification(config, audio=encoder)`, and what the encoder reads
    under the names of `inputs`. A modality may occur several times in a model; the inputs of one that has another name are
    prefixed by it, `hypothesis_input_ids`, see `Slot`.
    """

    name: ClassVar[str]
    # Name in a batch -> name that `BackboneAdapter.embed` gets; the first one is required.
    inputs: ClassVar[Mapping[str, str]]
    # Name in a batch of the (B,L) attention mask, 1 for tokens and 0 for padding; None: there is no padding.
    mask: ClassVar[str | None] = None
    # Whether each input has one entry for each token, (B,L) or (1,L), so that tokens may be put in another order.
    input_per_token: ClassVar[bool] = False
    # Switches of `embed`, by name in a call of the model; an adapter says with `takes` which ones it knows.
    flags: ClassVar[tuple[str, ...]] = ()

    @property
    def required(self) -> str:
        """Name of the input that an encoder cannot do without."""
        return next(iter(self.inputs))

    def check(self, encoder: Any, given: Mapping[str, Tensor]) -> None:
        """Raise ValueError where inputs, by their names in a batch, the mask among them, are not what the encoder can read."""

    def doubts(self, encoder: Any, given: Mapping[str, Tensor]) -> Iterator[str]:
        """Yield what is seldom meant about inputs that run; a model warns of each once."""
        yield from ()

    def not_a_tensor(self, name: str, value: object) -> str | None:
        """Return what is wrong with an input that is no tensor, and the fix, None for the general advice."""
        return None


@dataclass(frozen=True)
class Slot:
    """A modality in a model, under a name.

    Args:
        name: in the model: the keyword of the encoder, and the prefix of the inputs if it is not the modality's own name.
        modality: what it is.

    prefix: what stands in front of the modality's names in a batch.
    inputs: name in a batch -> name that the encoder knows.
    mask: name in a batch of the attention mask, None if there is no padding.
    flags: name in a call -> name that `embed` gets, of switches.
    names: of all tensors in a batch.
    """

    name: str
    modality: Modality

    # What follows, computed once: a call of a model reads it.
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

    def own(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a batch holds of this slot, under the modality's own names; what is None is left out."""
        start = len(self.prefix)
        return {name[start:]: given[name] for name in self.names if name in given and given[name] is not None}


_MODALITIES: dict[str, Modality] = {}


def register_modality(modality: Modality) -> None:
    """Teach the library a modality. A second registration of a name replaces the first.

    Raises:
        ValueError: it names no input, its name is no identifier, or one of its inputs names that of another modality.
    """
    if not modality.name.isidentifier() or not modality.inputs:
        raise ValueError(
            f"{type(modality).__name__}: a modality has a name that is an identifier, and inputs; got {modality.name!r}"
        )
    own = {*modality.inputs, modality.mask, *modality.flags} - {None}
    for other in _MODALITIES.values():
        if other.name != modality.name and (clash := own & {*other.inputs, other.mask, *other.flags}):
            raise ValueError(
                f"modality {modality.name!r}: {', '.join(sorted(map(str, clash)))} already name inputs of {other.name!r}"
            )
    _MODALITIES[modality.name] = modality


def unregister_modality(name: str) -> None:
    """Forget a modality; one that is not known is no error."""
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


def known() -> dict[str, Modality]:
    """Return the registered modalities by name."""
    return dict(_MODALITIES)
