"""Compute the confusion matrix, and precision, recall and F1 of each class."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mope.data import Split
from mope.data.writing import record_of
from mope.files import write_text
from mope.finite import finite_or_none
from mope.fusion.predicting import Prediction
from mope.processes import is_distributed

from .report import table

PREDICTIONS, CONFUSION = "predictions.jsonl", "confusion.csv"
# Largest number of classes in the printed table.
SHOWN = 20


class Answers:
    """Logits of a split's examples, collected from all processes. Pass its `see` to `evaluate`."""

    def __init__(self) -> None:
        self._parts: list[tuple[list[int], Tensor]] = []

    def see(self, indices: list[int], logits: Tensor, labels: Tensor) -> None:
        """Keep the logits of a batch."""
        self._parts.append((indices, logits.float().cpu()))

    def all(self) -> Tensor:
        """Return the logits (N,K) of all processes, in the order of the split. Every process must call it."""
        mine = self._parts
        if is_distributed():
            found: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(found, mine)
            mine = [part for parts in found for part in parts]
        order = torch.tensor([index for indices, _ in mine for index in indices])
        return torch.cat([logits for _, logits in mine])[order.argsort()]


@dataclass(frozen=True)
class Confusion:
    """Confusion matrix of a split.

    Attributes:
        names: Names of the K classes.
        matrix: With one label per example, (K,K) counts of examples by true class (row) and predicted class (column). With several
            labels, (K,2,2): for each class, counts by whether the example has it (row) and whether it was predicted (column).
    """

    names: tuple[str, ...]
    matrix: Tensor

    @classmethod
    def of(cls, split: Split, found: Sequence[Prediction]) -> Confusion:
        """Count the predictions for a split's examples."""
        index = {name: k for k, name in enumerate(split.names)}
        count = len(split.names)
        if split.problem_type == "single_label":
            matrix = torch.zeros(count, count, dtype=torch.int64)
            for example, prediction in zip(split.examples, found, strict=True):
                matrix[example.labels[0], index[str(prediction.label)]] += 1
            return cls(split.names, matrix)
        present = _rows([example.labels for example in split.examples], count)
        chosen = _rows([[index[name] for name in prediction.labels] for prediction in found], count)
        cells = [[(there & said).sum(0) for said in (~chosen, chosen)] for there in (~present, present)]
        return cls(split.names, torch.stack([torch.stack(row) for row in cells]).permute(2, 0, 1))

    def classes(self) -> list[dict[str, Any]]:
        """Return precision, recall, F1 and the number of examples of each class.

        Precision and recall are 0 if the class was never predicted or never present.
        """
        if self.matrix.dim() == 2:
            right, predicted, present = self.matrix.diagonal(), self.matrix.sum(0), self.matrix.sum(1)
        else:
            right, predicted, present = self.matrix[:, 1, 1], self.matrix[:, :, 1].sum(1), self.matrix[:, 1].sum(1)
        rows = zip(self.names, right.tolist(), predicted.tolist(), present.tolist(), strict=True)
        return [
            {
                "class": name,
                "precision": found / max(said, 1),
                "recall": found / max(there, 1),
                "f1": 2 * found / max(said + there, 1),
                "examples": there,
            }
            for name, found, said, there in rows
        ]

    def table(self) -> str:
        """Format a Markdown table of the classes; if there are more than `SHOWN`, of those with the lowest F1."""
        rows = self.classes()
        few = sorted(rows, key=lambda row: row["f1"])[:SHOWN] if len(rows) > SHOWN else rows
        head = ["class", "precision", "recall", "F1", "examples"]
        numbers = [[f"{100 * row[name]:.2f}" for name in ("precision", "recall", "f1")] for row in few]
        cells = [[_cell(row["class"]), *three, str(row["examples"])] for row, three in zip(few, numbers, strict=True)]
        note = f"\nthe {SHOWN} of {len(rows)} classes with the lowest F1\n" if few is not rows else ""
        return table(head, cells) + note

    def write(self, file: Path) -> None:
        """Write the matrix as CSV. With several labels, each class has a line with its true and false negatives and positives."""
        with file.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            several = self.matrix.dim() == 3
            own = ["true_negatives", "false_positives", "false_negatives", "true_positives"]
            writer.writerow(["class", *own] if several else ["class\\predicted", *self.names])
            for name, row in zip(self.names, self.matrix.flatten(1).tolist(), strict=True):
                writer.writerow([name, *row])


def write_predictions(split: Split, found: Sequence[Prediction], file: Path) -> None:
    """Write id, label, scores and true classes of each example, as one JSON line per example."""
    several = split.problem_type == "multi_label"
    lines = []
    for example, prediction in zip(split.examples, found, strict=True):
        truth = [split.names[k] for k in example.labels]
        record = record_of(example.id, prediction, several=several) | {"truth": truth if several else truth[0]}
        lines.append(json.dumps(finite_or_none(record), ensure_ascii=False))
    write_text(file, "".join(f"{line}\n" for line in lines))


def _rows(indices: Sequence[Sequence[int]], count: int) -> Tensor:
    """Mark the classes of each item: indices -> (N,count) bool."""
    rows = torch.zeros(len(indices), count, dtype=torch.bool)
    for row, of_item in zip(rows, indices, strict=True):
        row[list(of_item)] = True
    return rows


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
