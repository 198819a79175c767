"""How a fusion model is trained."""

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
    """How a fusion model is trained; the defaults are the published ones. Immutable; `replace` makes a changed copy.

    AdamW, whose learning rates fall by `gamma` at each of the `milestones`.

    Args:
        epochs: passes over the training split.
        batch_size: items of one optimizer step, over all processes and accumulated batches.
        accumulation: in how many parts a process goes through its share of a batch; more need less memory. The importance loss is
            the mean over the parts.
        vision_lr, text_lr: of what is trained in and around encoders of images and texts; mapper and head belong to the main one.
        other_lr: of what is trained in and around encoders of any other modality.
        weight_decay: of everything trained.
        milestones: epochs after which the learning rates are multiplied by gamma.
        gamma: see milestones.
        clip: largest norm of the gradient, 0 for no clipping.
        precision: "fp32", "bf16" or "fp16" (autocast; weights stay as they are), "auto": fp16, as published, on an accelerator and
            fp32 on a CPU.
        label_smoothing: weight of the uniform distribution in the target, with one label for each item.
        augment: magnitude from 1 to 30 of RandAugment with two operations on training images, 0 for none.
        metric: what the best checkpoint is chosen by: "accuracy" with one label for each item, "f1_micro" or "f1_macro" with
            several. None: the first that fits.
        class_weights: of the loss in training: "balanced", so that rare classes count as much as frequent ones, or weights by the
            names of classes, 1 for those that are not named; see `mope.training.metrics.class_weights`. None: all count the same.
        threshold: with several labels to an example, the probability above which a class is predicted: a number between 0 and 1, or
            "auto", the one with the best metric on the dev split. None: that of the model, 0.5 for a new one.

    Raises:
        ValueError: names the value and what is allowed.
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
        return dataclasses.replace(self, **changes)

    @staticmethod
    def rate_of(modality: str) -> str:
        """Return the name of the field with the learning rate of a modality."""
        return f"{modality}_lr" if f"{modality}_lr" in Recipe.__dataclass_fields__ else "other_lr"

    def learning_rate(self, modality: str) -> float:
        """Return the learning rate in and around encoders of a modality, by its name."""
        rate: float = getattr(self, self.rate_of(modality))
        return rate

    def for_problem(self, problem_type: str) -> Recipe:
        """The same with a metric; ValueError if a field does not go with "single_label" or "multi_label"."""
        fitting = METRICS[problem_type]
        metric = self.metric or fitting[0]
        if metric not in fitting:
            raise ValueError(f"Recipe: metric must be one of {', '.join(fitting)} with {problem_type} data, got {metric!r}")
        if self.label_smoothing and problem_type == "multi_label":
            raise ValueError("Recipe: label_smoothing needs data with one label for each item, these have several")
        if self.threshold is not None and problem_type != "multi_label":
            raise ValueError("Recipe: a threshold is for data with several labels for each item, these have one")
        return self.replace(metric=metric)


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# Published for each data set; "jsonl" is anything else.
RECIPES = {
    "food101": Recipe(batch_size=38, metric="accuracy"),
    "mm-imdb": Recipe(batch_size=16, metric="f1_micro", augment=7),
    "snli-ve": Recipe(batch_size=64, metric="accuracy", augment=5),
    "jsonl": Recipe(),
}
