"""Run a model over a split and collect the probabilities of its routers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mope import MoPEForClassification

if TYPE_CHECKING:
    from mope.data import Split


@dataclass(frozen=True)
class Routes:
    """Routing of N examples with C classes, in L blocks over K experts.

    Attributes:
        blocks: Names of the L blocks.
        classes: Names of the C classes.
        ids: Id of each example.
        texts: Text of each example.
        images: Image file of each example; None if it has none.
        labels: (N,C) bool. With single_label, each row has one True.
        predictions: (N,C) bool, likewise.
        probabilities: (N,L,K) float32, for all experts, selected or not. Each row sums to 1.
    """

    blocks: tuple[str, ...]
    classes: tuple[str, ...]
    ids: tuple[str, ...]
    texts: tuple[str, ...]
    images: tuple[Path | None, ...]
    labels: NDArray[np.bool_]
    predictions: NDArray[np.bool_]
    probabilities: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ids)


def collect(
    model: MoPEForClassification, loader: Iterable[dict[str, Tensor]], split: Split, *, storage: Path | None = None
) -> Routes:
    """Evaluate a model and collect the probabilities of its routers.

    Args:
        model: Model to evaluate. It runs in evaluation mode, without router noise, and is not changed.
        loader: Batches of the model's inputs, in the order of the split. If they contain `labels`, these must equal the split's.
        split: Examples, with their labels and the names of the classes.
        storage: `.npy` file for the probabilities, of 4 * N * L * K bytes, to save memory. None keeps them in memory.

    Returns:
        Routing of all examples.

    Raises:
        ValueError: The model has no routed blocks, the loader's examples differ from the split's, or a result is not finite.
    """
    blocks = routed_blocks(model)
    if not len(split):
        raise ValueError(f"the {split.name} split is empty: give a split with examples")
    shape = (len(split), len(blocks), model.config.num_experts)
    if storage is None:
        probabilities = np.empty(shape, np.float32)
    else:
        probabilities = np.lib.format.open_memmap(storage, mode="w+", dtype=np.float32, shape=shape)
    labels = np.zeros((len(split), len(split.names)), np.bool_)
    for row, example in enumerate(split.examples):
        labels[row, list(example.labels)] = True
    predictions = np.zeros_like(labels)
    multi_label = model.config.problem_type == "multi_label"

    start = 0
    with model.serving() as predict:
        for batch in loader:
            given = batch.get("labels")
            out: Any = predict(**model.on_device({name: tensor for name, tensor in batch.items() if name != "labels"}))
            part = slice(start, start := start + len(out.logits))
            if start > len(split) or (given is not None and not _same(given, labels[part])):
                raise ValueError(f"the loader must give the {len(split)} examples of the {split.name} split in their order")
            probs = torch.stack([routing.probs for routing in out.routing], dim=1).float().cpu().numpy()
            logits = out.logits.float().cpu()
            chosen = (logits.sigmoid() > model.config.threshold).numpy()
            logits = logits.numpy()
            broken = ~(np.isfinite(probs).all((1, 2)) & np.isfinite(logits).all(1))
            if broken.any():
                example = split.examples[part.start + int(broken.argmax())]
                raise ValueError(f"the model's output is not finite for example {example.id!r}")
            probabilities[part] = probs
            predictions[part] = chosen if multi_label else np.eye(labels.shape[1], dtype=bool)[logits.argmax(1)]
    if start != len(split):
        raise ValueError(f"the loader gave {start} of the {len(split)} examples of the {split.name} split")
    examples = split.examples
    return Routes(
        blocks,
        tuple(split.names),
        tuple(example.id for example in examples),
        tuple(_texts(split)),
        tuple(_pictures(split)),
        labels,
        predictions,
        probabilities,
    )


def routed_blocks(model: MoPEForClassification) -> tuple[str, ...]:
    """Return the names of a model's routed blocks.

    Raises:
        ValueError: The model has none.
    """
    blocks = model.routed_blocks()
    if not blocks:
        raise ValueError(f"this model routes nothing (method {model.config.method!r}): there are no experts to show")
    return blocks


def _texts(split: Split) -> list[str]:
    """Return the text of each example, from the first modality that is text, or else from the first that can be shown as text."""
    first = split.examples[0].inputs
    found = [slot for slot in split.slots if slot.modality.text_of(first[slot.name]) is not None]
    # The sort is stable, and False comes first.
    found.sort(key=lambda slot: not isinstance(first[slot.name], str))
    if not found:
        return [""] * len(split)
    return [found[0].modality.text_of(example.inputs[found[0].name]) or "" for example in split.examples]


def _pictures(split: Split) -> list[Path | None]:
    """Return the picture of each example, from the first modality that has any."""
    for slot in split.slots:
        pictures = [slot.modality.picture_of(example.inputs[slot.name]) for example in split.examples]
        if any(pictures):
            return pictures
    return [None] * len(split)


def _same(given: Tensor, labels: NDArray[np.bool_]) -> bool:
    """Return whether a batch's labels, (B,) or (B,C), equal the expected labels (B,C)."""
    values = given.cpu().numpy()
    return np.array_equal(values, labels.argmax(1)) if values.ndim == 1 else np.array_equal(values > 0.5, labels)
