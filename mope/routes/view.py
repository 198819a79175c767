"""Prepare tables for the page. All text here is unescaped; the template escapes it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from .palette import step
from .pictures import FORMATS, file_name, shares, shown_classes, shown_experts, unused
from .routing import Routes
from .summary import Summary
from .thumbnails import data_uri, thumbnail

# Largest numbers of characters of a text and of a class name.
LONGEST_TEXT, LONGEST_NAME = 160, 60
# Number of words in an expert's row of the table. The expert's own section lists all of them.
WORDS_IN_A_ROW = 4


@dataclass(frozen=True)
class HeatMap:
    """A drawing of blocks x experts, with fixed sizes in pixels.

    Attributes:
        title: Title of the drawing.
        description: Description in words, for readers who cannot see it.
        names: Names of the rows.
        rows: Cells of each row.
        left: Width of the row names.
        wide: Width of a cell.
        high: Height of a cell.
    """

    title: str
    description: str
    names: list[str]
    rows: list[list[dict[str, Any]]]
    left: int
    wide: int
    high: int = 24

    @property
    def numbers(self) -> bool:
        """True if a cell has room for its number."""
        return self.wide >= 30

    @property
    def step(self) -> int:
        """Step between the experts that have a label on the axis."""
        return 1 if self.wide >= 20 else 4


def heat_map(title: str, values: NDArray[np.float64], summary: Summary) -> HeatMap:
    """Return the drawing of values (L,K). Cells of experts that are never taken are marked."""
    names, limit = [str(name) for name in summary.blocks], float(values.max()) or 1.0
    rows = [
        [cell(value, limit) | {"never": summary.never_taken(block, expert)} for expert, value in enumerate(row)]
        for block, row in enumerate(values)
    ]
    experts = values.shape[1]
    wide = 36 if experts <= 16 else 22 if experts <= 32 else 10
    return HeatMap(title, _in_words(title, values, summary), names, rows, 16 + 8 * max(map(len, names)), wide)


def cell(value: float, limit: float) -> dict[str, Any]:
    """Return a value, its fraction of the largest value, and the number of its color."""
    return {"value": float(value), "part": f"{value / limit:.3f}", "step": step(value / limit)}


def _in_words(title: str, values: NDArray[np.float64], summary: Summary) -> str:
    """Describe a heat map: its extremes, and the experts that are never taken."""

    def where(place: np.intp) -> str:
        block, expert = np.unravel_index(place, values.shape)
        return f"expert {expert} in {summary.blocks[block]} with {values[block, expert]:.3f}"

    blocks, experts = values.shape
    never = np.argwhere(summary.top1 == 0)
    said = (
        f"{title} of {experts} experts in {blocks} blocks. Largest: {where(values.argmax())}. Smallest: {where(values.argmin())}. "
    )
    if not len(never):
        return f"{said}Every expert is taken."
    listed = ", ".join(f"expert {expert} in {summary.blocks[block]}" for block, expert in never[:8])
    return f"{said}Never taken: {listed}{', and others' if len(never) > 8 else ''}."


def balance_rows(summary: Summary) -> list[dict[str, Any]]:
    """Return a row for each block, with its numbers and the experts that are never taken."""
    numbers = zip(*summary.balance.values(), strict=True)
    return [
        {"name": str(name), "numbers": [float(value) for value in row], "never": np.flatnonzero(summary.top1[block] == 0).tolist()}
        for block, (name, row) in enumerate(zip(summary.blocks, numbers, strict=True))
    ]


class Images:
    """Thumbnails of examples, by row. The page embeds each image file once, however many experts show it."""

    def __init__(self, routes: Routes, folder: Path) -> None:
        self.routes, self.folder = routes, folder
        self._numbers: dict[Path | None, int] = {}

    def number(self, row: int) -> int:
        """Return the number in the name of the CSS class for an example's image."""
        return self._numbers.setdefault(self.routes.images[row], len(self._numbers))

    def link(self, row: int) -> str | None:
        """Return the address of the image file relative to the page; None if the example has none."""
        path = self.routes.images[row]
        return None if path is None else address(path, self.folder)

    def style(self) -> str:
        """Return the style sheet with the images. It contains only base64, and no text from the data."""
        return "\n".join(f".i{i} {{ background-image: url({data_uri(thumbnail(path))}); }}" for path, i in self._numbers.items())


def address(path: Path, folder: Path) -> str:
    """Return the address of a file as seen from a folder.

    It is relative if possible, and quoted so that a file name cannot be parsed as a URL scheme.

    >>> address(Path("data/javascript:alert(1).png"), Path("data"))
    'javascript%3Aalert%281%29.png'
    """
    try:
        return quote(os.fsencode(os.path.relpath(path, folder)).replace(os.sep.encode(), b"/"))
    # The file is on another drive.
    except ValueError:
        return path.resolve().as_uri()


def block_view(summary: Summary, routes: Routes, block: int, images: Images) -> dict[str, Any]:
    """Return the contents of a block's section."""
    name, experts = str(summary.blocks[block]), shown_experts(summary, block)
    return {
        "name": name,
        "title": name[:1].upper() + name[1:],
        "number": block,
        "shown": len(experts),
        "all": summary.load.shape[1],
        "experts": [_expert(summary, routes, block, int(expert), images) for expert in experts],
        "classes": _classes(summary, block, experts),
        "left_out": len(summary.classes) - len(shown_classes(summary, block)),
        "files": (file_name("classes", name), file_name("experts", name)),
    }


def _classes(summary: Summary, block: int, experts: NDArray[np.int64]) -> list[dict[str, Any]]:
    rows = shown_classes(summary, block)
    values = summary.by_class[block][rows]
    limit = float(values.max()) or 1.0 if len(rows) else 1.0
    return [
        {
            "name": _short(str(summary.classes[i]), LONGEST_NAME),
            "count": int(summary.class_counts[i]),
            "cells": [cell(value, limit) for value in row[experts]],
        }
        for i, row in zip(rows, values, strict=True)
    ]


def _expert(summary: Summary, routes: Routes, block: int, expert: int, images: Images) -> dict[str, Any]:
    load, never = summary.load[block], summary.never_taken(block, expert)
    scored = zip(summary.words[block, expert], summary.word_scores[block, expert], strict=True)
    shown = [] if never else list(_examples(summary, routes, block, expert, images))
    return {
        "number": expert,
        "load": cell(load[expert], float(load.max()) or 1.0),
        "first": float(summary.top1[block, expert]),
        "count": int((summary.first[block] == expert).sum()),
        "shares": shares(summary, block, expert),
        "unused": unused(summary, block, expert) if never else "",
        "words": [(str(word), float(score)) for word, score in scored if word],
        "examples": shown,
    }


def _examples(summary: Summary, routes: Routes, block: int, expert: int, images: Images) -> Iterator[dict[str, Any]]:
    rows = zip(summary.top_examples[block, expert], summary.top_probabilities[block, expert], strict=True)
    for row, probability in ((int(row), float(probability)) for row, probability in rows if row >= 0):
        truth, said = _names(routes, routes.labels[row]), _names(routes, routes.predictions[row])
        name, link = routes.ids[row][:LONGEST_NAME], images.link(row)
        shown = f"image of {name}" if link is not None else f"no image of {name}"
        yield {
            "probability": probability,
            "names": truth,
            "taken_for": [] if np.array_equal(routes.labels[row], routes.predictions[row]) else said,
            "text": _short(routes.texts[row], LONGEST_TEXT),
            "number": images.number(row),
            "link": link,
            "description": f"{shown}: {', '.join(truth)} (expert {expert}: {probability:.2f})",
        }


def _names(routes: Routes, chosen: NDArray[np.bool_]) -> list[str]:
    return [_short(routes.classes[i], LONGEST_NAME) for i in np.flatnonzero(chosen)] or ["nothing"]


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def picture_links(pictures: Sequence[Path], folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Return for each picture, by name, its file formats and the addresses of the files relative to the page."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in pictures:
        if (kind := path.suffix.removeprefix(".")) in FORMATS:
            found.setdefault(path.stem, []).append((kind.upper(), address(path, folder)))
    return found
