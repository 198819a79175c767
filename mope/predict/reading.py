"""Read the rows of a file as batches of model inputs, in this process or in workers."""

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
    """A row that was read, or the error that prevented it. `labels`: indices of its classes; None if it has none."""

    line: int
    id: str
    labels: tuple[int, ...] | None = None
    error: str | None = None


@dataclass
class Batch:
    """Rows, and the inputs of those without an error; None if all rows have errors."""

    rows: list[Answered]
    inputs: dict[str, Tensor] | None = field(default=None)


class RowBatches(IterableDataset[Batch]):
    """Batches of one process's rows, in order.

    Args:
        rows: Rows of the whole file.
        parts: Assignment of the rows to processes.
        preprocessing: Preprocessing of the model.
        batch_size: Number of rows in a batch.
        done: Number of this process's rows to skip because they are already written.
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
        """Return the number of a row's batch; negative if the row is already written."""
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
