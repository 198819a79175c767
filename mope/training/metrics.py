"""Accuracy and F1 from counts, which are summed over batches and processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mope.processes import is_distributed

# With several labels per item, a class is predicted if its probability is above this.
THRESHOLD = 0.5


def loss_sum(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Sum the task loss over all labels: logits (B,K), labels (B,) integer or (B,K) of 0 and 1 -> ()."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.dim() == 2:
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="sum")


class Counts:
    """Running counts from which metrics are computed, in float64, and so exact up to 2^53 items.

    The columns of `table` count true positives, predicted and present items. With multi_label there is a row for each class. With
    single_label there is one row, which counts right answers and, in both other columns, all items.
    """

    def __init__(self, problem_type: str, num_labels: int, device: torch.device | str = "cpu") -> None:
        self.problem_type = problem_type
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
            predicted, present = logits.float().sigmoid() > THRESHOLD, labels > THRESHOLD
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


def _f1(table: Tensor) -> Tensor:
    found, predicted, present = table.unbind(-1)
    return 2 * found / (predicted + present).clamp_min(1)
