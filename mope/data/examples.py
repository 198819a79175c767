"""Dataset of the examples of a split, and collation into batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mope.modalities import complementary_of, slots_of

from .augment import RandAugment
from .features import FeatureCache, encoders
from .formats import Split
from .preprocessing import Preprocessing

if TYPE_CHECKING:
    from mope.fusion.base import FusionModel


class Examples(Dataset[dict[str, Any]]):
    """Dataset of model inputs: for each example, a dict of the encoders' inputs, `labels`, and `cross_features` if cached.

    Of the model, only its processors (tokenizer, image processor) are kept. Augmentation is determined by `seed`, the example and
    the epoch (`set_epoch`, which accelerate's data loaders and therefore transformers' Trainer call). It does not depend on the
    number of workers or on where a run was resumed.

    Args:
        split: Split to read.
        model: Model that the inputs are for.
        training: Whether to allow augmentation.
        augment: Augmentation of training images: a `RandAugment`, or True for the default one.
        features: Result of `cached_features` for this split, which replaces the inputs of the complementary encoders.
        seed: Seed of the augmentation.

    Raises:
        ValueError: Classes or problem type of the data differ from those of the model, the model has no tokenizer or image
            processor, the split was read without a modality that the model needs, or the features do not belong to the split and
            model.
    """

    def __init__(
        self,
        split: Split,
        model: FusionModel,
        *,
        training: bool = False,
        augment: bool | RandAugment = False,
        features: FeatureCache | None = None,
        seed: int = 0,
    ) -> None:
        check_classes(split, model)
        self.split, self._features, self._seed = split, features, seed
        self._augment = (augment if isinstance(augment, RandAugment) else RandAugment()) if training and augment else None
        modalities: Sequence[str] = model.config.modalities
        if features is not None:
            modalities = [m for m in modalities if m not in features.modalities]
            self._check_features(features, model)
        if lacking := [m for m in modalities if m not in {slot.name for slot in split.slots}]:
            raise ValueError(
                f"the {split.name} data has no {', '.join(lacking)}: read it with read_split(..., "
                f"modalities={list(model.config.modalities)})"
            )
        self._preprocessing = Preprocessing(model, modalities)
        # In shared memory, so that persistent workers see the epoch change.
        self._epoch = torch.zeros((), dtype=torch.int64)
        if self._augment:
            self._epoch.share_memory_()

    def _check_features(self, features: FeatureCache, model: FusionModel) -> None:
        complementary = complementary_of(model.config)
        if features.modalities != complementary:
            raise ValueError(f"{features.of} were given, but {' and '.join(complementary) or 'none'} is complementary")
        if not features.belong_to(self.split):
            raise ValueError(f"features of another split were given: these are {len(self.split)} examples of {self.split.name}")
        if any(model.trains(name) for name in complementary):
            raise ValueError(f"features change while the {encoders(complementary)} trains: leave features out")
        modalities = [slot.modality for name, slot in slots_of(model.config).items() if name in complementary]
        if self._augment and (augmented := [modality.plural for modality in modalities if modality.augments]):
            raise ValueError(f"features of {augmented[0]} do not change with augmentation: leave features or augment out")

    def __len__(self) -> int:
        return len(self.split)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, on which augmentation depends."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.split.examples[index]
        augment = None
        if self._augment:
            augment = partial(self._augment, rng=np.random.default_rng((self._seed, int(self._epoch), index)))
        item = self._preprocessing(example, augment=augment)
        if self._features is not None:
            item["cross_features"] = self._features[index]
        item["labels"] = example.labels
        return item


class Collator:
    """Collate items of `Examples` into the keyword arguments of a model; `labels` are (B,) int64 or (B,num_labels) float32."""

    def __init__(self, model: FusionModel) -> None:
        self._preprocessing = Preprocessing(model, model.config.modalities)
        self._num_labels = model.config.num_labels
        self._multi = model.config.problem_type == "multi_label"

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = self._preprocessing.collate(items)
        if "cross_features" in items[0]:
            batch["cross_features"] = torch.stack([item["cross_features"] for item in items])
        batch["labels"] = self._labels([item["labels"] for item in items])
        return batch

    def _labels(self, labels: Sequence[Sequence[int]]) -> Tensor:
        if not self._multi:
            return torch.tensor([label for (label,) in labels])
        rows = torch.zeros(len(labels), self._num_labels)
        for row, of_example in zip(rows, labels, strict=True):
            row[list(of_example)] = 1
        return rows


def check_classes(split: Split, model: FusionModel) -> None:
    """Check that the classes of the data are those of a model.

    Raises:
        ValueError: Their number, names, order or problem type differ.
    """
    config = model.config
    if split.problem_type != config.problem_type:
        raise ValueError(
            f"the {split.name} data is {split.problem_type}, the model {config.problem_type}: set problem_type in MoPEConfig"
        )
    names = [config.id2label[i] for i in range(config.num_labels)]  # type: ignore[index]
    # The classes of the model have only default names.
    unnamed = names == [f"LABEL_{i}" for i in range(config.num_labels)]
    if len(names) != len(split.names) or (list(split.names) != names and not unnamed):
        raise ValueError(
            f"the classes of the {split.name} data are not those of the model, or in another order: {_few(split.names)} and "
            f"{_few(names)}. Read the data with names=tuple(model.config.id2label.values()), "
            "or make the model with id2label=split.names"
        )


def _few(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''} ({len(names)})"
