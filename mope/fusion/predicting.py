"""Classify raw items: read them for a model, and turn its logits into predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mope.hints import did_you_mean
from mope.modalities import Reader, Slot, UnreadableError, slots_of

if TYPE_CHECKING:
    from mope.fusion.base import FusionModel


@dataclass(frozen=True)
class Prediction:
    """Prediction of a model for one item.

    Attributes:
        labels: Names of its classes: one with problem type "single_label", otherwise those above the threshold, likeliest first.
        scores: Probability of each class by its name.
        experts: For each routed block, the weights of the experts that it used, largest first; None if they were not requested.
    """

    labels: tuple[str, ...]
    scores: dict[str, float]
    experts: dict[str, dict[int, float]] | None = None

    @property
    def label(self) -> str | None:
        """Most probable class; None if no class was predicted."""
        return self.labels[0] if self.labels else None


def readers_of(model: FusionModel, modalities: Sequence[str]) -> list[tuple[Slot, Reader]]:
    """Return the slot and the reader of raw items for each of the given encoders of a model.

    Raises:
        ValueError: The model lacks a processor.
        ModuleNotFoundError: Pillow is not installed.
    """
    slots = slots_of(model.config)
    readers = []
    for name in modalities:
        slot, processor = slots[name], model.processor(name)
        if slot.processor is not None and processor is None:
            how = f"model.{slot.processor}" if not slot.prefix else f"it with model.set_processor({name!r}, ...)"
            raise ValueError(f"the model has no {slot.processor}: set {how}, for example to that of its {name} backbone")
        readers.append((slot, slot.modality.reader(model.backbone(name), processor, model.config)))
    return readers


def predict(model: FusionModel, raw: Mapping[str, Any], *, batch_size: int = 32, experts: bool = False) -> list[Prediction]:
    """Classify raw items; see `FusionModel.predict`."""
    if batch_size < 1:
        raise ValueError(f"predict: batch_size must be at least 1, got {batch_size}")
    slots = slots_of(model.config)
    given = _checked(slots, raw)
    readers = readers_of(model, tuple(slots))
    rows = zip(*(given[slot.name] for slot, _ in readers), strict=True)
    found: list[Prediction] = []
    with model.answering(experts=experts) as answer:
        while chunk := list(islice(rows, batch_size)):
            batch: dict[str, Tensor] = {}
            for (slot, reader), items in zip(readers, zip(*chunk, strict=True), strict=True):
                read = list(_read(slot, reader, items, first=len(found)))
                batch |= {f"{slot.prefix}{name}": tensor for name, tensor in reader.collate(read).items()}
            found += predictions(model.config, *answer(**model.on_device(batch)), named=experts)
    return found


def predictions(config: Any, logits: Tensor, weights: Mapping[str, Tensor], *, named: bool = False) -> list[Prediction]:
    """Convert logits to predictions.

    Args:
        config: Configuration of the model.
        logits: Logits (B,num_labels).
        weights: Weights (B,K) of the experts, by the name of the block.
        named: Whether predictions include the experts.
    """
    names = [config.id2label[i] for i in range(config.num_labels)]
    logits = logits.float().cpu()
    several = config.problem_type == "multi_label"
    probabilities = logits.sigmoid() if several else logits.softmax(-1)
    tables = {name: table.float().cpu().tolist() for name, table in weights.items()}
    found = []
    for i, row in enumerate(probabilities.tolist()):
        order = sorted(range(len(row)), key=lambda k: -row[k])
        chosen = [k for k in order if row[k] > config.threshold] if several else order[:1]
        experts = {name: _taken(table[i]) for name, table in tables.items()} if named else None
        found.append(Prediction(tuple(names[k] for k in chosen), dict(zip(names, row, strict=True)), experts))
    return found


def _taken(weights: Sequence[float]) -> dict[int, float]:
    return {k: weights[k] for k in sorted(range(len(weights)), key=lambda k: -weights[k]) if weights[k] > 0}


def _checked(slots: Mapping[str, Slot], raw: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """Check raw items, and return them by the names of their encoders."""
    names = {slot.raw: name for name, slot in slots.items()}
    wanted = f"this model reads {', '.join(names)}"
    if unknown := [name for name in raw if name not in names]:
        hint = did_you_mean(unknown[0], names)
        raise TypeError(f"predict has no argument {', '.join(unknown)}{hint and '; ' + hint}: {wanted}")
    if missing := [name for name in names if name not in raw]:
        raise TypeError(f"predict needs {', '.join(f'{name}=[...]' for name in missing)}: {wanted}")
    for name, items in raw.items():
        if not isinstance(items, list | tuple):
            raise TypeError(f"{name} must be a list, got {type(items).__name__}: predict({name}=[...]), even for one item")
    if len({len(items) for items in raw.values()}) > 1:
        sizes = ", ".join(f"{len(items)} {name}" for name, items in raw.items())
        raise ValueError(f"predict needs the same number of items of each kind, got {sizes}")
    return {names[name]: items for name, items in raw.items()}


def _read(slot: Slot, reader: Reader, items: Sequence[Any], first: int) -> Iterator[dict[str, Any]]:
    for i, item in enumerate(items, first):
        try:
            yield reader(item)
        except UnreadableError as error:
            raise ValueError(f"{slot.raw}[{i}] cannot be read: {error.why}") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{slot.raw}[{i}] cannot be read ({type(item).__name__}): {error}") from error


def dense_weights(weights: Tensor, indices: Tensor, count: int) -> Tensor:
    """Expand weights (B,k) of the selected experts, whose indices are (B,k), to all experts (B,count), with 0 for the others."""
    return torch.zeros(len(weights), count, dtype=weights.dtype, device=weights.device).scatter_(1, indices, weights)
