"""Accuracy and F1 from counts, which are summed over batches and processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mope.data import Split
from mope.hints import did_you_mean
from mope.printing import first_of
from mope.processes import is_distributed

# With several labels per item, a class is predicted if its probability is above this.
THRESHOLD = 0.5
# Candidate thresholds, from which the best is chosen.
THRESHOLDS = tuple(n / 100 for n in range(1, 100))


def loss_sum(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """Sum the task loss over all labels: logits (B,K), labels (B,) integer or (B,K) of 0 and 1 -> ().

    `weights` (K,) multiply the loss of the items of each class or, with several labels, its positive part.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weights = None if weights is None else weights.to(logits.dtype)
    if labels.dim() == 2:
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum", pos_weight=weights)
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="sum", weight=weights)


class Counts:
    """Running counts from which metrics are computed, in float64, and so exact up to 2^53 items.

    The columns of `table` count true positives, predicted and present items. With multi_label there is a row for each class. With
    single_label there is one row, which counts right answers and, in both other columns, all items.
    """

    def __init__(
        self, problem_type: str, num_labels: int, device: torch.device | str = "cpu", *, threshold: float = THRESHOLD
    ) -> None:
        self.problem_type, self.threshold = problem_type, threshold
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.labels = torch.zeros((), dtype=torch.float64, device=device)
        rows = 1 if problem_type == "single_label" else num_labels
        self.table = torch.zeros(rows, 3, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits (B,K), labels (B,) integer or (B,K) of 0 and 1. Does not synchronize with the device."""
        self.loss += loss_sum(logits, labels)
        self.labels += labels.numel()
        if self.problem_type == "single_label":
            # argmax returns the index of a NaN, so a row with a NaN counts as wrong.
            right = ((logits.argmax(-1) == labels) & ~logits.isnan().any(-1))[:, None]
            # A single row, in which every item counts as predicted and present.
            found, predicted, present = right, torch.ones_like(right), torch.ones_like(right)
        else:
            predicted, present = logits.float().sigmoid() > self.threshold, labels > THRESHOLD
            found = predicted & present
        self.table += torch.stack([found.sum(0), predicted.sum(0), present.sum(0)], dim=-1)

    def over_processes(self) -> Counts:
        """Add up the counts of all processes, in place. Every process must call it."""
        if is_distributed():
            for tensor in (self.loss, self.labels, self.table):
                dist.all_reduce(tensor)
        return self

    def metrics(self) -> dict[str, float]:
        """Return "loss" (the mean task loss), and "accuracy" or "f1_micro" and "f1_macro".

        A class that is neither predicted nor present has an F1 of 0.
        """
        values = {"loss": float(self.loss / self.labels)}
        table = self.table.cpu()
        if self.problem_type == "single_label":
            return {"accuracy": float(table[0, 0] / table[0, 1]), **values}
        return {"f1_micro": float(_f1(table.sum(0, keepdim=True))), "f1_macro": float(_f1(table).mean()), **values}


class ThresholdCounts:
    """Running counts for F1 at several thresholds: true positives, predicted and present items of each class."""

    def __init__(self, num_labels: int, device: torch.device | str = "cpu", *, thresholds: Sequence[float] = THRESHOLDS) -> None:
        self.thresholds = tuple(thresholds)
        self.table = torch.zeros(len(self.thresholds), num_labels, 3, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits (B,K), labels (B,K) of 0 and 1."""
        probabilities, present = logits.float().sigmoid(), labels > THRESHOLD
        # One threshold at a time, because all at once would need 99 times the memory by default.
        for row, threshold in zip(self.table, self.thresholds, strict=True):
            predicted = probabilities > threshold
            row += torch.stack([(predicted & present).sum(0), predicted.sum(0), present.sum(0)], dim=-1)

    def over_processes(self) -> ThresholdCounts:
        """Add up the counts of all processes, in place. Every process must call it."""
        if is_distributed():
            dist.all_reduce(self.table)
        return self

    def best(self, metric: str) -> float:
        """Find the threshold with the highest "f1_micro" or "f1_macro"; among equals, the one nearest to 0.5."""
        table = self.table.cpu()
        values = _f1(table.sum(1)) if metric == "f1_micro" else _f1(table).mean(1)
        return max(zip(values.tolist(), self.thresholds, strict=True), key=lambda each: (each[0], -abs(each[1] - THRESHOLD)))[1]


def class_weights(wanted: str | Mapping[str, float], split: Split) -> list[float]:
    """Return the weight of each class in the training loss.

    With "balanced", a class with n of the N examples has the weight N / (K n), where K is the number of classes, so that all
    classes count equally and the mean weight of an example is 1. With several labels per example, the weight is (N - n) / n, so
    that the examples with a class count as much as those without it. A class without examples has the weight 1.

    Args:
        wanted: "balanced", or weights by class name, with 1 for classes that are not named.
        split: Training data.

    Raises:
        ValueError: There is no such class.
    """
    names = split.names
    if not isinstance(wanted, str):
        if unknown := [name for name in wanted if name not in names]:
            hint = did_you_mean(unknown[0], names)
            raise ValueError(
                f"class weights: there is no class {unknown[0]!r}{hint and '; ' + hint}: choose from {first_of(names, 10, ', ')}"
            )
        return [float(wanted.get(name, 1.0)) for name in names]
    counts = Counter(label for example in split.examples for label in example.labels)
    size, several = len(split), split.problem_type == "multi_label"
    found = [(size - n) / n if several else size / (len(names) * n) for n in (max(counts[k], 1) for k in range(len(names)))]
    return [weight if counts[k] and weight else 1.0 for k, weight in enumerate(found)]


def _f1(table: Tensor) -> Tensor:
    found, predicted, present = table.unbind(-1)
    return 2 * found / (predicted + present).clamp_min(1)
