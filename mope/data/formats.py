"""Data on disk: one JSON object per line of train.jsonl, dev.jsonl (or val.jsonl) and test.jsonl, class names in labels.txt.

    food101     {"id", "label", "text", "img"}
    mm-imdb     {"id", "label": [...], "text", "img"}                 several classes per example
    snli-ve     {"gold_label", "sentence2", "Flickr30K_ID"}           images in Flickr30K/flickr30k_images/<id>.jpg
    jsonl       {"label" | "labels": [...], "text", "image"}

The same keys can be the columns of a table (see `tables`): train.csv, train.parquet, or a folder of the library `datasets`.

Text and image are read by default. Other modalities have their own keys, and are read if requested.

All lines are read and checked at the start, so that training does not fail after hours because of a bad line.
"""

from __future__ import annotations

import codecs
import dataclasses
import difflib
import filecmp
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from mope.hints import did_you_mean
from mope.modalities import DataError, Slot, Source, find_modality, slots_of
from mope.modalities.reading import SHOWN, is_key, listed, shown

from . import tables

SPLITS = {"train": ("train",), "dev": ("dev", "val", "validation"), "test": ("test",)}
JSONL = ".jsonl"
# Names that can be renamed, in addition to those of the raw items.
COLUMNS = ("id", "label", "labels")
LABELS = "labels.txt"
# Modalities that are read by default.
READ = ("text", "vision")


class NoLabelsError(DataError):
    """Error that no line of a split has a label, as is the case if the labels of a test split are not published."""


@dataclass(frozen=True, slots=True)
class Example:
    """Raw items of an example, and the indices of its classes: exactly one with problem type "single_label".

    `inputs` holds the raw item of each modality by its name in the model: a text under "text", and the path of an image under
    "vision", or None for a gray placeholder.
    """

    id: str
    # Not part of the hash, because raw items may be lists.
    inputs: Mapping[str, Any] = dataclasses.field(hash=False)
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Split:
    """Examples of one split. `names` holds the names of the classes, in the order of their indices.

    `problem_type` is "single_label" or "multi_label", as in `MoPEConfig`. `slots` describes the raw items; by default each slot has
    the name of its modality.
    """

    name: str
    examples: tuple[Example, ...]
    names: tuple[str, ...]
    problem_type: str
    slots: tuple[Slot, ...] = ()

    def __post_init__(self) -> None:
        if not self.slots:
            object.__setattr__(self, "slots", slots_named(self.examples[0].inputs if self.examples else READ))

    def __len__(self) -> int:
        return len(self.examples)

    def subset(self, shots: int, seed: int = 0) -> Split:
        """Return few-shot data: `shots` random examples of each class, in the order of the file.

        Examples are visited in a random order, and an example is selected if any of its classes has fewer than `shots` so far. With
        one label per example, this selects exactly `shots` of each class, and fewer shots with the same seed select a subset of the
        same examples. With several labels, a frequent class may get more because it occurs together with rarer ones. If a class has
        fewer examples than `shots`, all of them are selected, with a warning.

        Raises:
            ValueError: `shots` is less than 1.
        """
        if shots < 1:
            raise ValueError(f"subset: shots must be at least 1, got {shots}")
        counts: Counter[int] = Counter()
        taken = []
        for i in np.random.default_rng(seed).permutation(len(self.examples)):
            labels = self.examples[i].labels
            if any(counts[label] < shots for label in labels):
                counts.update(labels)
                taken.append(i)
        if few := [f"{name!r} ({counts[i]})" for i, name in enumerate(self.names) if counts[i] < shots]:
            warnings.warn(f"{self.name}: fewer than {shots} examples of {listed(few)}: all are taken", stacklevel=2)
        return dataclasses.replace(self, examples=tuple(self.examples[i] for i in sorted(taken)))


def slots_named(wanted: Iterable[str | Slot]) -> tuple[Slot, ...]:
    """Return slots unchanged, and a new slot for each name of a modality. ValueError if there is no such modality."""
    return tuple(each if isinstance(each, Slot) else Slot(each, find_modality(each)) for each in wanted)


def slots_to_read(config: Any) -> tuple[Slot, ...] | None:
    """Return the `modalities` argument of `read_split` for a configuration: None if it reads only text and image."""
    slots = slots_of(config)
    return tuple(slots.values()) if set(slots) - set(READ) else None


class _Format(NamedTuple):
    """Keys of a format. If there are two keys for labels, the first line decides which one is used.

    `keys` maps the names of raw items in a model to keys; other items use the key of their modality. `templates` maps them to
    format strings for the value, in which "{}" is the value itself.
    """

    id: str
    single: str | None
    multi: str | None
    keys: Mapping[str, str] = MappingProxyType({})
    templates: Mapping[str, str] = MappingProxyType({})


_IMG = {"vision": "img"}
_FORMATS = {
    "food101": _Format("id", "label", None, _IMG),
    "mm-imdb": _Format("id", None, "label", _IMG),
    "snli-ve": _Format(
        "pairID",
        "gold_label",
        None,
        {"text": "sentence2", "vision": "Flickr30K_ID"},
        {"vision": "Flickr30K/flickr30k_images/{}.jpg"},
    ),
    "jsonl": _Format("id", "label", "labels"),
}
FORMATS = tuple(_FORMATS)


class _Columns(NamedTuple):
    """Keys of ids, labels and raw items of each slot in the lines of a split.

    `separator` separates labels in a cell of a table; None means the default, and only in a column of several labels.
    """

    format: _Format
    items: tuple[tuple[Slot, Source], ...]
    separator: str | None = None


class _Row(NamedTuple):
    """Parsed line, before labels and files are looked up."""

    line: int
    id: str
    items: dict[str, Any]
    labels: Sequence[str | int]


class _Problem(ValueError):
    """Problem with a line."""


class _Problems:
    """Problems of one file, which shows the first few and counts the others."""

    def __init__(self, file: Path) -> None:
        self.file, self.found = file, list[tuple[int, str]]()

    def add(self, line: int, problem: object) -> None:
        self.found.append((line, str(problem)))

    def raise_if_any(self, error: type[DataError] | None = None) -> None:
        if not self.found:
            return
        self.found.sort()
        shown = [f"{self.file}:{line}: {problem}" for line, problem in self.found[:SHOWN]]
        if (hidden := len(self.found) - SHOWN) > 0:
            shown.append(f"and {hidden} more")
        raise (error or DataError)("\n".join(shown))


def read_split(
    folder: str | Path,
    format: str,
    split: str,
    *,
    names: Sequence[str] | None = None,
    on_missing_image: str = "error",
    modalities: Iterable[str | Slot] | None = None,
    columns: Mapping[str, str] | None = None,
    separator: str | None = None,
) -> Split:
    """Read and check one split.

    Args:
        folder: Folder with {train,dev|val,test}.jsonl and labels.txt; paths of images are relative to it. Absolute paths and paths
            with ".." must be inside the folder too; use a symbolic link in the folder for images that are elsewhere.
            Instead of .jsonl, files can be .csv or .parquet, or the folder can be one that `datasets` saved.
        format: "food101", "mm-imdb", "snli-ve" or "jsonl".
        split: "train", "dev" (dev.jsonl or val.jsonl) or "test".
        names: Names of the classes, such as those of a trained model. The default is the lines of labels.txt, or without that file
            the sorted names in train.jsonl, or "0", "1", ... up to the highest index there.
        on_missing_image: Treatment of images that are named but do not exist: "error", or "grey" to replace them with a gray image
            and warn. Images that are null or "" are always gray.
        modalities: Names of the modalities to read, or the slots of a model, `model.config.slots.values()`. The default is text and
            image. The key of an item is that of the format, else that of the modality, else its name in the model.
        columns: Other names of keys, such as {"text": "sentence", "label": "genre"}. The keys are names of modalities or of their
            keys, "id", "label" (one class) and "labels" (several).
        separator: Separator of labels in a cell of a table. If given, the column "label" also holds several labels. The default is
            "|", in a column "labels".

    Raises:
        DataError: A file is missing, empty or ambiguous, or some of its lines cannot be used; the first ten are listed as
            file:line. If no line has a label, the error is a `NoLabelsError`.
        ValueError: There is no such format, split, `on_missing_image` or modality.

    Warns:
        UserWarning: Several lines have the same id.
    """
    for what, value, allowed in (
        ("format", format, FORMATS),
        ("split", split, tuple(SPLITS)),
        ("on_missing_image", on_missing_image, ("error", "grey")),
    ):
        if value not in allowed:
            raise ValueError(f"read_split: {what} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    place = Path(folder)
    file = _find(place, split)
    slots = slots_named(READ if modalities is None else modalities)
    where = _columns(_renamed(_FORMATS[format], slots, columns or {}), slots, place, on_missing_image)._replace(separator=separator)
    rows, multi, problems, labelled = _read(file, where)
    if names is None:
        names = _read_names(place / LABELS) or _names_in_table(file, where)
    if names is None:
        names = _names_in(file, rows) if split == "train" else _training_names(place, where)
    labels = _Labels(names, cells=file.suffix == tables.CSV)
    finders = {slot.name: slot.modality.finder(source) for slot, source in where.items}
    examples = []
    for row in rows:
        try:
            inputs = {name: finder.find(row.items[name]) for name, finder in finders.items()}
            examples.append(Example(row.id, inputs, labels.find(row.labels)))
        except ValueError as problem:
            problems.add(row.line, problem)
    problems.raise_if_any(DataError if labelled else NoLabelsError)
    if not examples:
        raise DataError(f"{file} holds no examples: write one JSON object in each line, or one row in a table")
    _warn_of_duplicates(file, rows)
    if file.suffix == tables.CSV and not multi and separator is None:
        _warn_of_separators(file, rows)
    for finder in finders.values():
        finder.warn(file)
    return Split(split, tuple(examples), tuple(names), "multi_label" if multi else "single_label", slots)


def _columns(format: _Format, slots: Sequence[Slot], folder: Path, on_missing: str) -> _Columns:
    sources = []
    for slot in slots:
        key, template = format.keys.get(slot.name, slot.column), format.templates.get(slot.name, "{}")
        sources.append((slot, Source(key, folder, template, on_missing)))
    return _Columns(format, tuple(sources))


def _renamed(format: _Format, slots: Sequence[Slot], columns: Mapping[str, str]) -> _Format:
    """Return the format with renamed keys. Raises ValueError if there is no such key."""
    if not columns:
        return format
    own = {name: slot.name for slot in slots for name in (slot.column, slot.name)}
    if unknown := [name for name in columns if name not in (*COLUMNS, *own)]:
        known = (*COLUMNS, *own)
        raise ValueError(f"columns: there is no {unknown[0]!r}; {did_you_mean(unknown[0], known) or 'there are ' + listed(known)}")
    keys = dict(format.keys) | {own[name]: column for name, column in columns.items() if name in own}
    format = format._replace(id=columns.get("id", format.id), keys=keys)
    if not columns.keys() & {"label", "labels"}:
        return format
    single, multi = columns.get("label"), columns.get("labels")
    if format.single is None:
        # In this format each example has several labels, so "label" renames their column too.
        single, multi = None, multi or single
    return format._replace(single=single, multi=multi)


def files_of(folder: Path, split: str) -> list[Path]:
    """Return the files or `datasets` folders that may hold a split. If there is JSONL, tables are ignored."""
    names = SPLITS[split]
    if lines := [file for name in names if (file := folder / f"{name}{JSONL}").is_file()]:
        return lines
    found = [folder / f"{name}{suffix}" for name in names for suffix in (tables.CSV, tables.PARQUET, "")]
    return [path for path in (*found, *([folder] if split == "train" else [])) if tables.is_table(path)]


def _find(folder: Path, split: str) -> Path:
    if folder.is_file():
        raise DataError(f"{folder} is a file: pass its folder, and name the file {split}{folder.suffix}")
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    found = files_of(folder, split)
    if not found:
        wanted = [f"{name}{JSONL}" for name in SPLITS[split][:2]]
        others = sorted(path.name for path in folder.iterdir() if path.suffix == JSONL or tables.is_table(path))
        raise DataError(
            f"{folder} has no {' or '.join(wanted)}; it has {', '.join(others) or 'no .jsonl file at all'} "
            f"(data may also be {SPLITS[split][0]}.csv, {SPLITS[split][0]}.parquet, or a folder of datasets)"
        )
    for other in found[1:]:
        if not (other.is_file() and found[0].is_file() and filecmp.cmp(found[0], other, shallow=False)):
            raise DataError(f"{found[0]} and {other} differ, but both are the {split} split: keep one of them")
    return found[0]


def _read(file: Path, columns: _Columns) -> tuple[list[_Row], bool, _Problems, bool]:
    """Read all lines of a file.

    Returns the rows, whether examples have several labels, the problems found so far, and whether any line has a label.
    """
    columns = _in_table(file, columns)
    rows, problems, labelled, format = [], _Problems(file), False, columns.format
    # If None, the first readable line decides.
    multi = None if format.single and format.multi else format.multi is not None
    for number, record in records(file, columns):
        try:
            if isinstance(record, ValueError):
                raise record
            labelled |= any(record.get(key) not in (None, "") for key in (format.single, format.multi) if key)
            if multi is None and (format.single in record or format.multi in record):
                multi = format.multi in record
            rows.append(_row(number, record, columns, bool(multi)))
        except ValueError as problem:
            problems.add(number, problem)
    return rows, bool(multi), problems, labelled


def records(file: Path, columns: _Columns) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Yield the number and record of each line or row; a ValueError takes the place of one that cannot be read."""
    if not tables.is_table(file):
        yield from _lines(file)
        return
    format = columns.format
    cells = {source.key: slot.modality for slot, source in columns.items} if file.suffix == tables.CSV else None
    names: dict[str, Any] = {"id": format.id, "label": format.single, "labels": format.multi}
    for number, record in tables.rows(file):
        if isinstance(record, ValueError):
            yield number, record
        else:
            yield number, tables.as_line(record, cells=cells, **names, separator=columns.separator or tables.SEPARATOR)


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            line = line.strip()
            if not line:
                continue
            try:
                yield number, _parse(line)
            except ValueError as problem:
                yield number, problem


def _in_table(file: Path, columns: _Columns, *, labelled: bool = True) -> _Columns:
    """Adapt the columns to those of a table. Raises DataError if one is missing; labels may be missing unless `labelled`."""
    if not tables.is_table(file):
        return columns
    format, names = columns.format, tables.header(file)
    single = format.single if format.multi not in names else None
    if single in names and (columns.separator is not None or tables.holds_lists(file, str(single))):
        format = format._replace(single=None, multi=single)
    lacking = {slot.column: source.key for slot, source in columns.items if source.key not in names}
    unlabelled = labelled and not {format.single, format.multi} & {*names}
    if unlabelled and not lacking:
        lacking["label"] = str(format.single or format.multi)
    if names and lacking:
        options = " ".join(f"{name}=COLUMN" for name in lacking)
        raise (NoLabelsError if "label" in lacking else DataError)(
            f"{file} lacks the column {_quoted(lacking.values())}; its columns are {_quoted(names)}: name it with "
            f"--columns {options}"
        )
    return columns._replace(format=format)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _Problem(f"not UTF-8 (0x{line[error.start]:02x} as byte {error.start + 1}): save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise _Problem(
            f"not JSON ({error.msg.removesuffix(' at')} at column {error.colno}): each line must be one JSON object"
        ) from None
    except (RecursionError, ValueError) as error:
        # Brackets are nested too deeply, or a number has more than 4300 digits.
        raise _Problem(f"not JSON that can be read ({error})") from None
    if not isinstance(record, dict):
        raise _Problem(f"must be a JSON object with keys, got {shown(record)}")
    return record


def _row(number: int, record: dict[str, Any], columns: _Columns, multi: bool) -> _Row:
    format, items = columns.format, columns.items
    label = (format.multi if multi else format.single) or ""
    other = format.single if multi else format.multi
    if other in record:
        raise _Problem(f'"{other}": the first line has "{label}", and all lines must use the same key')
    if missing := [key for key in (*(source.key for _, source in items), label) if key not in record]:
        raise _Problem(f"lacks the key {_quoted(missing)}; its keys are {_quoted(record) or 'none'}")
    identity = record.get(format.id)
    if identity is None:
        identity = f"line {number}"
    if not is_key(identity):
        raise _Problem(f'"{format.id}" must be a text or an integer, got {shown(identity)}')
    parsed = {slot.name: slot.modality.parse(record[source.key], source) for slot, source in items}
    labels = record[label] if multi else [record[label]]
    if not isinstance(labels, list) or not all(is_key(value) for value in labels):
        what = "a list of names or indices of classes" if multi else "the name of a class or its index"
        raise _Problem(f'"{label}" must be {what}, got {shown(record[label])}')
    values = ((source.key, record[source.key]) for _, source in items)
    for key, value in ((format.id, identity), *values, *((label, name) for name in labels)):
        if isinstance(value, str) and not _encodable(value):
            raise _Problem(f'"{key}" holds half of a character (a lone surrogate such as \\ud83d), which cannot be encoded')
    return _Row(number, str(identity), parsed, labels)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _names_in_table(file: Path, columns: _Columns) -> tuple[str, ...] | None:
    """Return the class names that a folder of `datasets` defines; None if it defines none."""
    if not tables.is_table(file):
        return None
    found = (tables.class_names(file, key) for key in (columns.format.single, columns.format.multi) if key)
    return next(filter(None, found), None)


def _read_names(file: Path) -> tuple[str, ...] | None:
    if not file.is_file():
        return None
    try:
        lines = file.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 ({error.reason} at byte {error.start + 1}): save it as UTF-8") from None
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise DataError(f"{file} is empty: write the name of a class in each line, or remove it")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{file} has {listed([repr(name) for name in twice])} more than once")
    return tuple(names)


def _names_in(file: Path, rows: Sequence[_Row]) -> tuple[str, ...]:
    """Return the names of the classes that occur in training examples."""
    known: dict[str | int, int] = {}
    for row in rows:
        for label in row.labels:
            known.setdefault(label, row.line)
    numbers, names = [k for k in known if isinstance(k, int)], sorted(k for k in known if isinstance(k, str))
    write = f"write {LABELS}, a name in each line, beside it"
    if numbers and names:
        line = max(known[numbers[0]], known[names[0]])
        raise DataError(f"{file}:{line}: some labels are names ({names[0]!r}) and some are indices ({numbers[0]}): {write}")
    if rows and not known:
        raise DataError(f"{file}: no example has a class: {write}")
    if not numbers:
        return tuple(names)
    # Otherwise a mistaken index of a billion would create a billion classes.
    if max(numbers) > len(known) + 1000:
        raise DataError(f"{file}:{known[max(numbers)]}: {max(numbers)} is not an index of {len(known)} classes: {write}")
    return tuple(map(str, range(max(numbers) + 1)))


def _training_names(folder: Path, columns: _Columns) -> tuple[str, ...]:
    if not files_of(folder, "train"):
        raise DataError(f"{folder} has neither {LABELS} nor train.jsonl, so the names of the classes are unknown")
    file = _find(folder, "train")
    rows, _, problems, _ = _read(file, columns)
    problems.raise_if_any()
    return _names_in(file, rows)


class _Labels:
    """Lookup of class indices by name."""

    def __init__(self, names: Sequence[str], *, cells: bool = False) -> None:
        self._names, self._cells = names, cells
        self._index = {name: i for i, name in enumerate(names)}
        self._unknown = 0

    def find(self, labels: Iterable[str | int]) -> tuple[int, ...]:
        return tuple(sorted({self._find(label) for label in labels}))

    def _find(self, label: str | int) -> int:
        if self._cells and isinstance(label, str) and label not in self._index and label.isdecimal():
            # Cells of a CSV file are text, so a number that is not a name is an index.
            label = int(label)
        if isinstance(label, int):
            if 0 <= label < len(self._names):
                return label
            raise _Problem(f"unknown label {label}: indices of the {len(self._names)} classes go from 0 to {len(self._names) - 1}")
        # Names in labels.txt are stripped too.
        index = self._index.get(label)
        index = self._index.get(label.strip()) if index is None else index
        if index is None:
            raise _Problem(f"unknown label {label!r}{self._suggestion(label)}")
        return index

    def _suggestion(self, label: str) -> str:
        """Suggest a label, only for the problems that are shown, because it is slow and every label of a file may be wrong."""
        self._unknown += 1
        if self._unknown > SHOWN:
            return ""
        close = difflib.get_close_matches(label, self._names, 1)
        return f": did you mean {close[0]!r}?" if close else f": the classes are {listed([repr(name) for name in self._names])}"


def _warn_of_duplicates(file: Path, rows: Sequence[_Row]) -> None:
    lines: dict[str, int] = {}
    twice = [
        f"{row.id!r} (lines {first} and {row.line})" for row in rows if (first := lines.setdefault(row.id, row.line)) != row.line
    ]
    if twice:
        warnings.warn(f"{file}: {len(twice)} of its lines repeat an id: {listed(twice)}", stacklevel=3)


def _warn_of_separators(file: Path, rows: Sequence[_Row]) -> None:
    count = sum(tables.SEPARATOR in str(label) for row in rows for label in row.labels)
    if count:
        warnings.warn(
            f"{file}: {count} labels contain {tables.SEPARATOR!r}, but each counts as one class: if they are several classes, call "
            f'the column "labels", or pass --label-separator "{tables.SEPARATOR}"',
            stacklevel=3,
        )


def _quoted(keys: Iterable[str]) -> str:
    return ", ".join(f'"{key}"' for key in keys)
