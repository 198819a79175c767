"""Accuracy and F1, from counts that can be added up over batches and processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mope.processes import is_distributed

# A class is predicted where its probability is above this.
THRESHOLD = 0.5


def loss_sum(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """The task loss before it is divided by the number of labels: logits (B,K), labels (B,) integer or (B,K) of 0 and 1 -> ()."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.dim() == 2:
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="sum")


class Counts:
    """What a metric needs of all batches so far, in a table of float64: exact up to 2^53 items.

    single_label: items, right ones. multi_label, for each class: true positives, predicted, present.
    """

    def __init__(self, problem_type: str, num_labels: int, device: torch.device | str = "cpu") -> None:
        self.problem_type = problem_type
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.labels = torch.zeros((), dtype=torch.float64, device=device)
        rows = 1 if problem_type == "single_label" else num_labels
        self.table = torch.zeros(rows, 3, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits (B,K), labels (B,) integer or (B,K) of 0 and 1. The host does not wait for the device."""
        self.loss += loss_sum(logits, labels)
        self.labels += labels.numel()
        if self.problem_type == "single_label":
            # argmax would name the place of a NaN, which is nobody's answer.
            right = ((logits.argmax(-1) == labels) & ~logits.isnan().any(-1))[:, None]
            # Of one "class", that of being right: every item is predicted and present.
            found, predicted, present = right, torch.ones_like(right), torch.ones_like(right)
        else:
            predicted, present = logits.float().sigmoid() > THRESHOLD, labels > THRESHOLD
            found = predicted & present
        self.table += torch.stack([found.sum(0), predicted.sum(0), present.sum(0)], dim=-1)

    def over_processes(self) -> Counts:
        """Of the items of all processes together. Every process has to call."""
        if is_distributed():
            for tensor in (self.loss, self.labels, self.table):
                dist.all_reduce(tensor)
        return self

    def metrics(self) -> dict[str, float]:
        """ "loss" (mean task loss), and "accuracy" or "f1_micro" and "f1_macro".

        A class that is neither predicted nor present has F1 0.
        """
        values = {"loss": float(self.loss / self.labels)}
        table = self.table.cpu()
        if self.problem_type == "single_label":
            return {"accuracy": float(table[0, 0] / table[0, 1]), **values}
        return {"f1_micro": float(_f1(table.sum(0, keepdim=True))), "f1_macro": float(_f1(table).mean()), **values}


def _f1(table: Tensor) -> Tensor:
    found, predicted, present = table.unbind(-1)
    return 2 * found / (predicted + present).clamp_min(1)
