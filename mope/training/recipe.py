"""Hyperparameters of training: the `Recipe`, and the published ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

METRICS = {"single_label": ("accuracy",), "multi_label": ("f1_micro", "f1_macro")}
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
BALANCED, AUTO = "balanced", "auto"


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of training, with the published values as defaults. Immutable; `replace` makes a changed copy.

    The optimizer is AdamW. Its learning rates are multiplied by `gamma` at each of the `milestones`.

    Args:
        epochs: the number of passes over the training split.
        batch_size: the number of items in one optimizer step, over all processes and accumulated parts.
        accumulation: the number of parts in which a process computes its share of a batch. More parts need less memory. The
            importance loss is the mean over the parts.
        vision_lr, text_lr: the learning rates of parameters in and around the encoders of images and texts. Mapper and head
            count as the main encoder's.
        other_lr: the learning rate of parameters in and around the encoders of any other modality.
        weight_decay: the weight decay of all trained parameters.
        milestones: the epochs after which the learning rates are multiplied by gamma.
        gamma: see milestones.
        clip: the largest norm of the gradient, 0 for no clipping.
        precision: "fp32", "bf16" or "fp16" (autocast; the weights keep their dtype). "auto" is fp16 on an accelerator, as
            published, and fp32 on a CPU.
        label_smoothing: the weight of the uniform distribution in the target, for data with one label per item.
        augment: the magnitude, from 1 to 30, of RandAugment with two operations on training images; 0 for none.
        metric: the metric that chooses the best checkpoint: "accuracy" for data with one label per item, "f1_micro" or
            "f1_macro" for data with several. None chooses the first that fits the data.
        class_weights: the weights of classes in the training loss: "balanced", or weights by class name, 1 for other classes; see
            `mope.training.metrics.class_weights`. None weights all classes equally.
        threshold: with several labels per item, the probability above which a class is predicted: a number between 0 and 1, or
            "auto" for the one with the best metric on the dev split. None keeps the model's, 0.5 for a new model.

    Raises:
        ValueError: a value is not allowed. The message names it and the allowed values.
    """

    epochs: int = 10
    batch_size: int = 16
    accumulation: int = 1
    vision_lr: float = 4e-4
    text_lr: float = 5e-4
    other_lr: float = 4e-4
    weight_decay: float = 1e-3
    milestones: Sequence[int] = (3, 6)
    gamma: float = 0.4
    clip: float = 1.0
    precision: str = "auto"
    label_smoothing: float = 0.0
    augment: int = 0
    metric: str | None = None
    class_weights: str | Mapping[str, float] | None = None
    threshold: float | str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(sorted(self.milestones)))
        for name in ("epochs", "batch_size", "accumulation"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Recipe: {name} must be an integer of at least 1, got {value!r}")
        for name in ("vision_lr", "text_lr", "other_lr", "weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"Recipe: {name} must be 0 or more, and finite, got {getattr(self, name)}")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"Recipe: gamma must be above 0 and at most 1, got {self.gamma}")
        if not all(isinstance(epoch, int) and epoch > 0 for epoch in self.milestones):
            raise ValueError(f"Recipe: milestones must be positive integers, got {list(self.milestones)}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"Recipe: label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if not isinstance(self.augment, int) or not 0 <= self.augment <= 30:
            raise ValueError(f"Recipe: augment must be an integer from 0 to 30, got {self.augment!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"Recipe: precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")

        self._check_classes()

    def _check_classes(self) -> None:
        weights, threshold = self.class_weights, self.threshold
        if isinstance(weights, str) and weights != BALANCED:
            raise ValueError(f"Recipe: class_weights must be {BALANCED!r}, or weights by the names of classes, got {weights!r}")
        if isinstance(weights, Mapping) and (wrong := {name: w for name, w in weights.items() if not (_is_real(w) and w > 0)}):
            name, value = next(iter(wrong.items()))
            raise ValueError(f"Recipe: class_weights must be positive numbers, got {value!r} for {name!r}")
        if threshold not in (None, AUTO) and not (_is_real(threshold) and 0 < float(threshold) < 1):
            raise ValueError(f"Recipe: threshold must be {AUTO!r} or between 0 and 1, got {threshold!r}")

    def replace(self, **changes: Any) -> Recipe:
        """Return a changed copy. Raise TypeError for names that are not fields."""
        return dataclasses.replace(self, **changes)

    @staticmethod
    def rate_of(modality: str) -> str:
        """Return the name of the field with the learning rate of a modality."""
        return f"{modality}_lr" if f"{modality}_lr" in Recipe.__dataclass_fields__ else "other_lr"

    def learning_rate(self, modality: str) -> float:
        """Return the learning rate in and around the encoders of a modality, given its name."""
        rate: float = getattr(self, self.rate_of(modality))
        return rate

    def for_problem(self, problem_type: str) -> Recipe:
        """Return a copy whose metric is set.

        Args:
            problem_type: "single_label" or "multi_label".

        Raises:
            ValueError: the metric or the label smoothing does not fit the problem type.
        """
        fitting = METRICS[problem_type]
        metric = self.metric or fitting[0]
        if metric not in fitting:
            raise ValueError(f"Recipe: metric must be one of {', '.join(fitting)} with {problem_type} data, got {metric!r}")
        if self.label_smoothing and problem_type == "multi_label":
            raise ValueError("Recipe: label_smoothing needs data with one label per item, and this data has several")
        if self.threshold is not None and problem_type != "multi_label":
            raise ValueError("Recipe: threshold needs data with several labels per item, and this data has one")
        return self.replace(metric=metric)


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# The published recipe of each data set; "jsonl" stands for any other data.
RECIPES = {
    "food101": Recipe(batch_size=38, metric="accuracy"),
    "mm-imdb": Recipe(batch_size=16, metric="f1_micro", augment=7),
    "snli-ve": Recipe(batch_size=64, metric="accuracy", augment=5),
    "jsonl": Recipe(),
}
