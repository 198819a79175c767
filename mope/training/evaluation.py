"""Evaluate a trained model on a split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from mope.data import Collator, Examples, Split
from mope.fusion.base import FusionModel
from mope.processes import rank_and_world

from .batches import Batches, Loader
from .extensions import in_mode, modes
from .metrics import Counts, ThresholdCounts

# Gets indices of items, their logits (B,K) and labels.
See = Callable[[list[int], Tensor, Tensor], None]


def evaluate(
    model: FusionModel,
    split: Split,
    *,
    batch_size: int = 32,
    mode: str | None = None,
    features: Any = None,
    num_workers: int = 0,
    progress: bool = False,
    see: See | None = None,
) -> dict[str, float]:
    """Compute the metrics of a model on a split, on the model's device.

    Under torch.distributed, each process computes its share. Every item counts once, and all processes get the metrics of the
    whole split.

    Args:
        model: the model, with tokenizer and image processor.
        split: the data, with the same classes as the model.
        batch_size: the size of a batch over all processes.
        mode: a registered mode, see `mope.training.extensions`. For a Swin Transformer, "released" or "instance" chooses whose
            prompts a window gets. None keeps the model's mode.
        features: a `FeatureCache` of the split.
        num_workers: the number of processes that load images.
        progress: whether to show a progress bar.
        see: is called with the indices, logits and labels of each batch of this process, in order.

    Returns:
        "accuracy", or "f1_micro" and "f1_macro"; and "loss".

    Raises:
        ValueError: the classes differ from the model's, or the model does not have the mode.
    """
    with in_mode(model, mode):
        items = Examples(split, model, features=features)
        title = split.name if progress else None
        return measure(model, items, Collator(model), batch_size=batch_size, num_workers=num_workers, title=title, see=see)


def measure(
    model: FusionModel,
    items: Dataset[Any],
    collate: Callable[[list[Any]], dict[str, Tensor]],
    *,
    batch_size: int,
    num_workers: int = 0,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    title: str | None = None,
    see: See | None = None,
) -> dict[str, float]:
    """Do the work of `evaluate` for any items that `collate` turns into arguments of the model."""
    counts = Counts(model.config.problem_type, model.config.num_labels, model.device, threshold=model.config.threshold)

    def count(indices: list[int], logits: Tensor, labels: Tensor) -> None:
        counts.add(logits, labels)
        if see is not None:
            see(indices, logits, labels)

    run(model, items, collate, count, batch_size=batch_size, num_workers=num_workers, autocast=autocast, title=title)
    return counts.over_processes().metrics()


def choose_threshold(
    model: FusionModel, split: Split, metric: str, *, batch_size: int = 32, features: Any = None, num_workers: int = 0
) -> float:
    """Return the threshold at which "f1_micro" or "f1_macro" of a split is highest; all processes get the same."""
    counts = ThresholdCounts(model.config.num_labels, model.device)
    items = Examples(split, model, features=features)
    see: See = lambda indices, logits, labels: counts.add(logits, labels)  # noqa: E731
    run(model, items, Collator(model), see, batch_size=batch_size, num_workers=num_workers)
    return counts.over_processes().best(metric)


def run(
    model: FusionModel,
    items: Dataset[Any],
    collate: Callable[[list[Any]], dict[str, Tensor]],
    see: See,
    *,
    batch_size: int,
    num_workers: int = 0,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    title: str | None = None,
) -> None:
    """Show `see` the indices, logits and labels of each batch of this process, in order."""
    process, processes = rank_and_world()
    batches = Batches(items, batch_size, process=process, processes=processes)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), model.prepacked():
            loader = Loader(batches, collate, workers=num_workers, pin=model.device.type == "cuda")
            bar = tqdm(loader, desc=title, leave=False, disable=title is None or process > 0)
            for indices, batch in zip(batches, bar, strict=True):
                batch = model.on_device(batch)
                labels = batch.pop("labels")
                with autocast():
                    logits = model(**batch).logits
                see(indices, logits, labels)
    finally:
        model.train(was_training)


def compare_modes(
    model: FusionModel, split: Split, batch_sizes: Sequence[int] = (1, 8, 32), **options: Any
) -> list[dict[str, Any]]:
    """Compute the metrics in each mode at several batch sizes: one dict for each pair, with "batch_size" and "mode".

    In the "released" mode, the order of windows lets the prompts of one image reach other images of its batch, so the metrics
    depend on the batch size.

    Raises:
        ValueError: as in `evaluate`.
    """
    return [
        {"batch_size": size, "mode": mode, **evaluate(model, split, batch_size=size, mode=mode, **options)}
        for size in batch_sizes
        for mode in modes()
    ]
