"""Read CSV, parquet and folders of the library `datasets` as records with the same values as JSON lines.

Pyarrow and `datasets` are imported only if a table needs them.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from mope.extras import missing
from mope.modalities import DataError, Modality

CSV, PARQUET = ".csv", ".parquet"
# Files that `datasets` writes into a folder for one table, and for several splits.
STATE, SPLITS_OF = "state.json", "dataset_dict.json"
# Separator between several class names in one cell.
SEPARATOR = "|"
# Number of rows to read at a time.
ROWS = 256

Record = dict[str, Any]


def is_table(path: Path) -> bool:
    """Return whether a path is an existing CSV or parquet file, or a folder with one table of `datasets`."""
    return path.is_file() if path.suffix in (CSV, PARQUET) else (path / STATE).is_file()


def rows(file: Path) -> Iterator[tuple[int, Record | ValueError]]:
    """Yield the number and record of each row; a ValueError takes the place of a row that cannot be read.

    The number counts from 1: lines in a CSV file, rows in other tables.

    Raises:
        DataError: A package is missing, or the file cannot be read at all.
    """
    return _csv_rows(file) if file.suffix == CSV else enumerate(map(_without_nan, _arrow_rows(file)), 1)


def header(file: Path) -> list[str]:
    """Return the names of the columns. Raises DataError as `rows` does."""
    if file.suffix != CSV:
        return list(_schema(file).names)
    with file.open("rb") as stream:
        reader = _csv_reader(stream)
        return _checked(file, next(filter(None, reader), []))


def holds_lists(file: Path, column: str) -> bool:
    """Return whether a column exists and holds lists. Raises DataError as `rows` does."""
    if file.suffix == CSV or column not in (schema := _schema(file)).names:
        return False
    from pyarrow import types

    kind = schema.field(column).type
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def class_names(file: Path, column: str) -> tuple[str, ...] | None:
    """Return the class names that a table of `datasets` gives to a column's integers; None if it gives none."""
    if file.suffix in (CSV, PARQUET):
        return None
    feature = _dataset(file).features.get(column)
    names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
    return None if names is None else tuple(names)


def as_line(
    record: Record, *, cells: Mapping[str, Modality] | None, id: str, label: str | None, labels: str | None, separator: str
) -> Record:
    """Convert a row to the values that a JSON line would hold.

    Args:
        record: The row.
        cells: Modality of each column that has one, for CSV files, whose cells are all text. None for other tables.
        id: Column of the id.
        label: Column of a single class.
        labels: Column of several classes.
        separator: Separator between several classes in one cell.
    """
    line = dict(record)
    if cells is not None:
        line |= {key: modality.of_cell(line[key]) for key, modality in cells.items() if key in line}
        line |= {key: line[key].strip() or None for key in (id, label) if key in line}
    if labels in line and isinstance(line[labels], str):
        line[labels] = several(line[labels], separator)
    return line


def several(cell: str, separator: str) -> list[Any]:
    """Parse the class names in a cell, which are either separated or a JSON list."""
    if cell.lstrip().startswith("["):
        try:
            return list(json.loads(cell))
        except ValueError:
            pass
    return [name for part in cell.split(separator) if (name := part.strip())]


def _csv_rows(file: Path) -> Iterator[tuple[int, Record | ValueError]]:
    with file.open("rb") as stream:
        reader = _csv_reader(stream)
        names: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, ValueError(f"not CSV ({error}): close each double quote, and double those within a field")
                continue
            if not cells:
                continue
            if names is None:
                names = _checked(file, cells)
            else:
                yield line, _csv_row(cells, names, reader.dialect.delimiter)


def _csv_reader(stream: Iterable[bytes]) -> Any:
    # Bytes that are not UTF-8 are reported with their row.
    lines = (line.decode(errors="surrogateescape") for line in stream)
    first = next(lines, "").removeprefix("\ufeff")
    return csv.reader(chain([first], lines), delimiter=max(",;\t", key=first.count), strict=True)


def _csv_row(cells: list[str], names: list[str], delimiter: str) -> Record | ValueError:
    if len(cells) != len(names):
        return ValueError(
            f"has {len(cells)} fields, but the header has {len(names)}: put fields that contain {delimiter!r} in double quotes"
        )
    if wrong := _not_utf8(cells):
        return ValueError(f"not UTF-8 ({wrong}): save the file as UTF-8")
    return dict(zip(names, cells, strict=True))


def _not_utf8(cells: Iterable[str]) -> str | None:
    """Return the first byte that could not be decoded, as text such as 0xe9."""
    strange = (ord(letter) for cell in cells for letter in cell if "\udc80" <= letter <= "\udcff")
    return next((f"0x{code - 0xDC00:02x}" for code in strange), None)


def _checked(file: Path, names: list[str]) -> list[str]:
    """Check the header of a CSV file; return its names without surrounding spaces."""
    names = [name.strip() for name in names]
    if wrong := _not_utf8(names):
        raise DataError(f"{file}:1: not UTF-8 ({wrong}): save the file as UTF-8")
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise DataError(f"{file}:1: the header has {twice[0]!r} more than once: give each column a name of its own")
    return names


def _arrow_rows(file: Path) -> Iterator[Record]:
    if file.suffix == PARQUET:
        for batch in _parquet(file).iter_batches(batch_size=ROWS):
            yield from batch.to_pylist()
    else:
        # Arrow does not decode: images stay files, classes stay integers.
        for table in _dataset(file).with_format("arrow").iter(ROWS):
            yield from table.to_pylist()


def _without_nan(record: Record) -> Record:
    """Replace NaN, which pandas writes for missing values, with None."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in record.items()}


def _schema(file: Path) -> Any:
    return _parquet(file).schema_arrow if file.suffix == PARQUET else _dataset(file).features.arrow_schema


def _parquet(file: Path) -> Any:
    _require(file, "pyarrow")
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(file)
    except (ArrowInvalid, OSError) as error:
        raise DataError(f"{file} cannot be read as parquet ({error}): write it again") from error


def _dataset(folder: Path) -> Any:
    _require(folder, "datasets")
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} cannot be read as a folder of datasets ({error}): write it again with save_to_disk") from error


def _require(file: Path, package: str) -> None:
    if (problem := missing(package, extras=("data",))) is not None:
        raise DataError(f'{file}: {problem} (the extra "data")')
