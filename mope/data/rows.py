"""Stream the rows of a file, labeled or not, for prediction.

Rows are not kept in memory, so a file may be of any size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mope.modalities import DataError, Finder, Slot
from mope.modalities.reading import is_key

from . import tables
from .formats import _FORMATS, JSONL, _Columns, _columns, _in_table, _Labels, _renamed, _row, records

# Suffixes of images in a folder of images.
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Number of rows after which file lookups are no longer remembered.
FORGET = 10_000
# Number of bytes to hash at a time.
BLOCK = 2**20


@dataclass(frozen=True, slots=True)
class Row:
    """A row: its position, its raw items by their names in a model, and the indices of its classes (None if it has none).

    `line` is the line in the file, the number of the row in a table without lines, or the number of the image in a folder.
    """

    line: int
    id: str
    inputs: Mapping[str, Any]
    labels: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Unread:
    """A row that cannot be used, and the reason. `id` is the row's own id, or else "line N"."""

    line: int
    id: str
    error: str


class Rows:
    """Rows of a file, read for a model.

    Args:
        path: JSONL, CSV or parquet file, a folder saved by `datasets`, or a folder of images. Image paths are relative to the
            folder of the file.
        slots: Slots of the model.
        names: Class names of the model.
        several: Whether an item may have several classes.
        format: Format of the keys, as in `read_split`.
        columns: Other names of keys, as in `read_split`.
        separator: Separator of labels in a cell, as in `read_split`.
        on_missing_image: Treatment of missing images, as in `read_split`.

    Raises:
        DataError: There is nothing to read, or a column is missing.
        ValueError: `columns` renames an unknown column, or `path` is a folder of images but the model reads other modalities too.
    """

    def __init__(
        self,
        path: Path,
        slots: Sequence[Slot],
        names: Sequence[str],
        *,
        several: bool = False,
        format: str = "jsonl",
        columns: Mapping[str, str] | None = None,
        separator: str | None = None,
        on_missing_image: str = "error",
    ) -> None:
        self.path, self.slots, self.several = path, tuple(slots), several
        self.is_folder = path.is_dir() and not tables.is_table(path)
        # For one of several tables saved together, image paths are relative to their common folder, as in training.
        is_split = (path.parent / tables.SPLITS_OF).is_file()
        folder = path if path.is_dir() and not is_split else path.parent
        where = _columns(_renamed(_FORMATS[format], slots, columns or {}), slots, folder, on_missing_image)
        self._columns: _Columns = where._replace(separator=separator)
        self._labels = _Labels(names, cells=path.suffix == tables.CSV)
        if self.is_folder and (path / tables.SPLITS_OF).is_file():
            raise DataError(f"{path} contains several tables: choose one of {', '.join(map(str, _tables_in(path)))}")
        if self.is_folder:
            _check_images(path, self.slots)
            return
        if not (path.is_file() or tables.is_table(path)):
            raise DataError(f"there is no file {path}")
        if path.suffix not in (JSONL, tables.CSV, tables.PARQUET, "") or (path.suffix == "" and path.is_file()):
            raise DataError(
                f"{path} has an unknown suffix: it must end in {JSONL}, {tables.CSV} or {tables.PARQUET}, "
                "or be a folder of images or of datasets"
            )
        self._columns = _in_table(path, self._columns, labelled=False)

    def read(self, wanted: Callable[[int], bool] = lambda index: True) -> Iterator[tuple[int, Row | Unread]]:
        """Yield the index and contents of each row whose index (from 0) is wanted."""
        finders: dict[str, Finder] = {}
        for index, (line, record) in enumerate(self._records()):
            if index % FORGET == 0:
                finders = {slot.name: slot.modality.finder(source) for slot, source in self._columns.items}
            if not wanted(index):
                continue
            try:
                if isinstance(record, ValueError):
                    raise record
                yield index, self._row(line, record, finders)
            except ValueError as problem:
                own = record.get(self._columns.format.id) if isinstance(record, dict) else None
                yield index, Unread(line, str(own) if is_key(own) else f"line {line}", str(problem))

    def identity(self) -> str:
        """Return a hash of the contents; for a folder of images, of file names and sizes."""
        if not self.path.is_dir():
            return _digest(self.path)
        digest = hashlib.sha256()
        for file in _files(self.path):
            if not self.is_folder or file.suffix.lower() in IMAGES:
                own = file.stat().st_size if self.is_folder else _digest(file)
                digest.update(f"{file.relative_to(self.path).as_posix()}\n{own}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _records(self) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
        if not self.is_folder:
            return records(self.path, self._columns)
        return enumerate(self._images(), 1)

    def _images(self) -> Iterator[dict[str, Any] | ValueError]:
        key = self._columns.items[0][1].key
        for file in _files(self.path):
            if file.suffix.lower() in IMAGES:
                name = file.relative_to(self.path).as_posix()
                yield {key: name, self._columns.format.id: name}

    def _row(self, line: int, record: dict[str, Any], finders: Mapping[str, Finder]) -> Row:
        single, multi = self._columns.format.single, self._columns.format.multi
        # A file may use either key for its labels.
        label = next((key for key in ((multi, single) if self.several else (single, multi)) if key in record), None)
        given = record.get(label) if label is not None else None
        bare = {key: value for key, value in record.items() if key not in (single, multi)}
        own = multi if self.several and multi else single or multi
        read = _row(line, {**bare, str(own): [] if own == multi else ""}, self._columns, own == multi)
        inputs = {name: finder.find(read.items[name]) for name, finder in finders.items()}
        return Row(line, read.id, inputs, self._known(given))

    def _known(self, given: Any) -> tuple[int, ...] | None:
        """Return the class indices of a row's labels; None if it has none, or if the model does not know one of them."""
        values = given if isinstance(given, list) else [given]
        if given in (None, "") or not all(map(is_key, values)) or not (self.several or len(values) == 1):
            return None
        try:
            return self._labels.find(values)
        except ValueError:
            return None


def _check_images(folder: Path, slots: Sequence[Slot]) -> None:
    """Raise ValueError if the model reads anything but one image per item, and DataError if the folder has no images."""
    others = [slot.name for slot in slots if slot.modality.name != "vision"]
    if others or len(slots) != 1:
        raise ValueError(
            f"{folder} is a folder of images, but the model reads {' and '.join(slot.name for slot in slots)}: use a CSV file "
            f"with the columns {', '.join(slot.column for slot in slots)}"
        )
    if not any(file.suffix.lower() in IMAGES for file in _files(folder)):
        raise DataError(f"{folder} contains neither images ({', '.join(IMAGES)}) nor a table of datasets")


def _tables_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if tables.is_table(path))


def _files(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, sorted by name."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
