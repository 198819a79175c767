"""Predictions as JSONL, CSV or parquet, by the suffix of the file.

A record has "id", "label" or "labels", "scores" by class, "experts" by block where they were asked for, and "error" where a row
could not be read.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mope.extras import missing
from mope.files import disk_error
from mope.fusion.predicting import Prediction

from .tables import CSV, PARQUET, SEPARATOR

JSONL = ".jsonl"
SUFFIXES = (JSONL, CSV, PARQUET)
# Rows of a group in parquet, and digits of a probability.
ROWS, DIGITS = 1000, 6

Records = Iterable[dict[str, Any]]


def check_suffix(file: Path) -> None:
    """Raise ValueError where predictions cannot be written into a file of this name."""
    if file.suffix not in SUFFIXES:
        raise ValueError(f"--out {file} must end in {', '.join(SUFFIXES)}")
    if file.suffix == PARQUET and (problem := missing("pyarrow", extras=("data",))) is not None:
        raise ValueError(f'--out {file}: {problem} (the extra "data")')


def record_of(id: str, prediction: Prediction, *, several: bool) -> dict[str, Any]:
    """Return the record of a row."""
    label = {"labels": list(prediction.labels)} if several else {"label": prediction.label}
    record: dict[str, Any] = {"id": id, **label, "scores": _rounded(prediction.scores)}
    if prediction.experts is not None:
        record["experts"] = {block: _rounded(taken) for block, taken in prediction.experts.items()}
    return record


def _rounded(values: Mapping[Any, float]) -> dict[str, float]:
    return {str(name): round(value, DIGITS) for name, value in values.items()}


def write(records: Records, file: Path, names: Sequence[str], fields: Sequence[str]) -> None:
    """Write all records or none.

    Args:
        records: as above.
        file: its suffix says how.
        names: of the classes.
        fields: of the records that may be there, in their order.

    Raises:
        OSError: says which file, and whether no space is left.
    """
    unfinished = file.with_name(f"{file.name}.unfinished")
    writer: Callable[[Records, Path, Sequence[str], Sequence[str]], None]
    writer = {JSONL: _write_jsonl, CSV: _write_csv, PARQUET: _write_parquet}[file.suffix]
    try:
        writer(records, unfinished, names, fields)
        unfinished.replace(file)
    except OSError as error:
        raise disk_error(f"{file} cannot be written", file.parent, error) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _write_jsonl(records: Records, file: Path, names: Sequence[str], fields: Sequence[str]) -> None:
    with file.open("w", encoding="utf-8", newline="\n") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def _write_csv(records: Records, file: Path, names: Sequence[str], fields: Sequence[str]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([cell for field in fields for cell in (_columns_of(names) if field == "scores" else [field])])
        for record in records:
            writer.writerow([cell for field in fields for cell in _cells(field, record.get(field), names)])


def _columns_of(names: Sequence[str]) -> list[str]:
    return [f"score:{name}" for name in names]


def _cells(field: str, value: Any, names: Sequence[str]) -> list[Any]:
    if field == "scores":
        return [value[name] for name in names] if value else [""] * len(names)
    if value is None:
        return [""]
    if field == "labels":
        # A name with a separator in it needs a list.
        return [json.dumps(value, ensure_ascii=False) if any(SEPARATOR in name for name in value) else SEPARATOR.join(value)]
    return [json.dumps(value, ensure_ascii=False) if field == "experts" else value]


def _write_parquet(records: Records, file: Path, names: Sequence[str], fields: Sequence[str]) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    text = pyarrow.string()
    kinds = {"labels": pyarrow.list_(text), "scores": pyarrow.struct([(name, pyarrow.float64()) for name in names])}
    schema = pyarrow.schema([(field, kinds.get(field, text)) for field in fields])
    with ParquetWriter(file, schema) as writer:
        for group in _groups(records):
            writer.write_table(pyarrow.Table.from_pylist([_flat(record) for record in group], schema))


def _groups(records: Records) -> Iterator[list[dict[str, Any]]]:
    rest = iter(records)
    while group := list(islice(rest, ROWS)):
        yield group


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"experts": json.dumps(record["experts"])} if "experts" in record else record
