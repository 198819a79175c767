"""Rows of a file as batches that a model takes, read here or by workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from mope.data import DataError, Example
from mope.data.preprocessing import Preprocessing
from mope.data.rows import Row, Rows, Unread

from .parts import Parts


@dataclass
class Answered:
    """A row that was read, or why it was not. labels: of the file, indices of classes; None where it says none."""

    line: int
    id: str
    labels: tuple[int, ...] | None = None
    error: str | None = None


@dataclass
class Batch:
    """Rows, and the inputs of those without an error; None where all have one."""

    rows: list[Answered]
    inputs: dict[str, Tensor] | None = field(default=None)


class RowBatches(IterableDataset[Batch]):
    """Batches of the rows of one process, in their order.

    Args:
        rows: all rows.
        parts: say which are of this process.
        preprocessing: of the model.
        batch_size: rows of a batch.
        done: rows of this process that are left out, because they were written before.
    """

    def __init__(self, rows: Rows, parts: Parts, preprocessing: Preprocessing, *, batch_size: int, done: int = 0) -> None:
        self.rows, self.parts, self.preprocessing = rows, parts, preprocessing
        self.batch_size, self.done = batch_size, done

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)

        def wanted(index: int) -> bool:
            return self.parts.is_mine(index) and (batch := self._batch(index)) >= 0 and batch % workers == number

        for _, found in groupby(self.rows.read(wanted), lambda row: self._batch(row[0])):
            yield self._collated([self._read(row) for _, row in found])

    def _batch(self, index: int) -> int:
        """Return the number of a row's batch; negative if the row was written before."""
        return (self.parts.place(index) - self.done) // self.batch_size

    def _read(self, row: Row | Unread) -> tuple[Answered, dict[str, Any] | None]:
        if isinstance(row, Unread):
            return Answered(row.line, row.id, error=row.error), None
        try:
            return Answered(row.line, row.id, row.labels), self.preprocessing(Example(row.id, row.inputs, ()))
        except (TypeError, ValueError) as error:
            return Answered(row.line, row.id, error=str(error)), None

    def _collated(self, read: list[tuple[Answered, dict[str, Any] | None]]) -> Batch:
        items = [item for _, item in read if item is not None]
        rows = [row for row, _ in read]
        try:
            return Batch(rows, self.preprocessing.collate(items) if items else None)
        except DataError as error:
            for row in rows:
                row.error = row.error or str(error)
            return Batch(rows)
