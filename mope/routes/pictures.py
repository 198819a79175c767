"""Draw the tables as pictures."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .routing import Routes
from .summary import Summary
from .thumbnails import GAP, SIZE, strip

# Largest numbers of experts (by load) and classes (by number of examples) to draw. The tables contain all.
MOST_EXPERTS, MOST_CLASSES = 32, 128
INK, MUTED, PALE = "#1d2433", "#7a8499", "#c9d1de"
# Lightness decreases monotonically, so that the map is also readable in grayscale.
HEAT = LinearSegmentedColormap.from_list("heat", ["#f7f9fb", "#9fd5cc", "#0f766e", "#0b3b38"])
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    # Do not treat dollar signs in labels as math.
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": PALE,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 160,
    # For papers: embed fonts so that text stays editable, and do not generate random ids.
    "pdf.fonttype": 42,
    "svg.hashsalt": "mope",
}
# File formats of each picture, with their metadata: without a date, so that files are reproducible.
FORMATS: dict[str, dict[str, Any]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


def draw(summary: Summary, routes: Routes, out: str | Path, *, blocks: Sequence[int] | None = None) -> list[Path]:
    """Write `load` and, for each chosen block, `classes_<block>` and `experts_<block>`, as PNG, SVG and PDF; return their paths.

    `blocks` are the numbers of the chosen blocks; None chooses the one whose routing depends most on the example.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    paths = _write(draw_load(summary), folder / "load")
    for block in (summary.most_decided,) if blocks is None else blocks:
        name = str(summary.blocks[block])
        paths += _write(draw_classes(summary, block), folder / file_name("classes", name))
        paths += _write(draw_experts(summary, routes, block), folder / file_name("experts", name))
    return paths


def _write(figure: Figure, path: Path) -> list[Path]:
    """Write a figure in each format. `path` has no suffix."""
    paths = [path.with_name(f"{path.name}.{kind}") for kind in FORMATS]
    for kind, each in zip(FORMATS, paths, strict=True):
        each.write_bytes(render(figure, kind))
    return paths


def file_name(picture: str, block: str) -> str:
    """Return the file name of a block's picture.

    >>> file_name("classes", "stage 2, block 1")
    'classes_stage_2_block_1'
    """
    return f"{picture}_{re.sub(r'[^A-Za-z0-9]+', '_', block)}"


@contextmanager
def _style() -> Iterator[None]:
    # Ignore the user's own style, and do not warn about scripts in labels that the font lacks.
    with matplotlib.style.context("default"), matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


@_style()
def render(figure: Figure, kind: str) -> bytes:
    """Render a figure in one of `FORMATS`; return the contents of the file."""
    buffer = BytesIO()
    figure.savefig(buffer, format=kind, metadata=FORMATS[kind])
    return buffer.getvalue()


class _Page:
    """A figure with positions in inches from its upper left corner."""

    def __init__(self, width: float, height: float, title: str, note: str) -> None:
        self.width, self.height = width, height
        # Without pyplot, no display is needed and no figure stays open.
        self.figure = Figure(figsize=(width, height))
        self.write(0.3, 0.22, title, fontsize=14, fontweight="bold")
        self.write(0.3, 0.53, note, color=MUTED)

    def axes(self, left: float, top: float, wide: float, high: float) -> Axes:
        place = (left / self.width, 1 - (top + high) / self.height, wide / self.width, high / self.height)
        axes = self.figure.add_axes(place)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return axes

    def write(self, left: float, top: float, text: str, **style: Any) -> None:
        self.figure.text(left / self.width, 1 - top / self.height, text, **{"va": "top", **style})


@_style()
def draw_load(summary: Summary) -> Figure:
    """Draw two heat maps of blocks x experts, mean probability and share of first choices, and each block's balance."""
    blocks, experts = summary.load.shape
    wide, row = max(2.4, min(4.8, 0.42 * experts)), 0.27
    names = [str(name) for name in summary.blocks]
    left, high = _beside(names), max(0.5, row * blocks)
    page = _Page(
        left + 2 * wide + 3.6,
        high + 2.05,
        "How much each expert is used",
        f"{_count(len(summary.ids), 'example')}, {_count(experts, 'expert')}",
    )
    limit = max(float(summary.load.max()), float(summary.top1.max()))
    for place, (title, values) in enumerate((("mean probability", summary.load), ("share of first choices", summary.top1))):
        axes = page.axes(left + place * (wide + 0.35), 1.2, wide, high)
        image = _heat_map(axes, values, names if place == 0 else [], limit)
        axes.set_title(title, fontsize=9, loc="left")
    bar = page.figure.colorbar(image, cax=page.axes(left, high + 1.2 + 0.5, wide, 0.09), orientation="horizontal")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=7)
    start = left + 2 * wide + 0.65
    for place, (title, numbers) in enumerate(summary.balance.items()):
        right = start + 0.5 + 0.72 * place
        page.write(right, 1.14, title.replace(" ", "\n"), ha="right", va="bottom", fontsize=7.5, color=MUTED)
        for block, value in enumerate(numbers):
            page.write(right, 1.2 + high * (block + 0.5) / blocks, f"{value:.3f}", ha="right", va="center", fontsize=8.5)
    return page.figure


def shown_experts(summary: Summary, block: int) -> NDArray[np.int64]:
    """Return the numbers of at most `MOST_EXPERTS` experts, those with the largest load, in ascending order."""
    return np.sort(np.argsort(-summary.load[block], kind="stable")[:MOST_EXPERTS])


def shown_classes(summary: Summary, block: int) -> NDArray[np.int64]:
    """Return at most `MOST_CLASSES` classes, those with most examples, ordered by their most probable expert to show diagonals."""
    most = np.argsort(-summary.class_counts, kind="stable")[:MOST_CLASSES]
    rows = most[summary.class_counts[most] > 0]
    values = summary.by_class[block, rows]
    return rows[np.lexsort((rows, -values.max(-1), values.argmax(-1)))]


@_style()
def draw_classes(summary: Summary, block: int) -> Figure:
    """Draw a heat map of classes x experts with the mean probability over the examples of a class."""
    rows = shown_classes(summary, block)
    values = summary.by_class[block, rows]
    experts = values.shape[1]
    names = [f"{_line(str(summary.classes[i]), 28)}  ({summary.class_counts[i]})" for i in rows]
    left, wide, high = _beside(names), max(3.2, min(8.0, 0.46 * experts)), max(0.6, len(rows) * (0.27 if len(rows) <= 40 else 0.16))
    note = f"{summary.blocks[block]}: mean probability of each expert over the examples of a class"
    missing = len(summary.classes) - len(rows)
    if missing:
        note += f"; the {len(rows)} of {len(summary.classes)} classes with most examples"
    page = _Page(max(left + wide + 1.0, 7.6), high + 1.75, "Which classes take which expert", note)
    # With multi_label, there may be no example that has a class.
    if not len(rows):
        return page.figure
    axes = page.axes(left, 1.0, wide, high)
    image = _heat_map(axes, values, names, float(values.max()))
    bar = page.figure.colorbar(image, cax=page.axes(left + wide + 0.18, 1.0, 0.11, min(high, 1.8)))
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=7)
    return page.figure


@_style()
def draw_experts(summary: Summary, routes: Routes, block: int) -> Figure:
    """Draw for each expert its load, its words, and the images of the examples that give it the largest probabilities."""
    experts, top = shown_experts(summary, block), summary.top_examples.shape[-1]
    # In inches: left edge of the images, width of an image with its gap, and height of an expert.
    left, each, card = 3.35, 0.86, 1.18
    note = f"{summary.blocks[block]}: words of the texts whose first choice it is, images that give it most"
    if len(experts) < summary.load.shape[1]:
        note += f"; the {len(experts)} of {summary.load.shape[1]} experts with the largest load"
    page = _Page(max(left + each * top + 0.3, 8.4), 0.95 + card * len(experts), "What each expert takes", note)
    for place, expert in enumerate(experts):
        high = 0.95 + card * place
        page.write(0.3, high, f"expert {expert}", fontsize=11, fontweight="bold")
        page.write(0.3, high + 0.23, shares(summary, block, int(expert)), fontsize=7.5, color=MUTED)
        if summary.never_taken(block, int(expert)):
            page.write(left, high + 0.02, unused(summary, block, int(expert)), fontsize=8.5, color=MUTED)
            continue
        words = [str(word) for word in summary.words[block, expert] if word]
        page.write(0.3, high + 0.42, _wrap(words, 44, 4), fontsize=8, linespacing=1.3)
        rows = summary.top_examples[block, expert]
        images = strip([routes.images[row] for row in rows if row >= 0])
        axes = page.axes(left, high, *(each * size / (SIZE + GAP) for size in images.size))
        axes.imshow(images)
        axes.set_xticks([])
        axes.set_yticks([])
    return page.figure


def _beside(names: list[str]) -> float:
    """Return the inches needed for names to the left of a heat map."""
    return 0.5 + 0.072 * max(map(len, names), default=0)


def shares(summary: Summary, block: int, expert: int) -> str:
    """Describe how much an expert is used."""
    return f"mean probability {summary.load[block, expert]:.1%}, first choice of {summary.top1[block, expert]:.1%}"


def unused(summary: Summary, block: int, expert: int) -> str:
    """Describe an expert that is never the first choice, with its largest probability."""
    return f"never taken: first choice of no example, largest probability {summary.top_probabilities[block, expert, 0]:.2f}"


def _heat_map(axes: Axes, values: NDArray[np.float64], names: list[str], limit: float) -> Any:
    """Draw rows x experts, from white at 0 to dark at `limit`. If there is room, write the numbers into the cells."""
    rows, experts = values.shape
    image = axes.imshow(values, cmap=HEAT, vmin=0, vmax=limit, aspect="auto", interpolation="nearest")
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256, experts) if experts / step <= 20)
    axes.set_xticks(range(0, experts, step), [str(i) for i in range(0, experts, step)], fontsize=8)
    axes.set_xlabel("expert", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8 if rows <= 40 else 6.5)
    if experts <= 32:
        for column in range(1, experts):
            axes.axvline(column - 0.5, color="white", linewidth=0.8)
    if rows <= 40:
        for row in range(1, rows):
            axes.axhline(row - 0.5, color="white", linewidth=0.8)
    if experts <= 16 and rows <= 40:
        for row, column in np.argwhere(values >= 0.005):
            dark = values[row, column] > 0.45 * limit
            number = f"{values[row, column]:.2f}"
            axes.text(column, row, number, ha="center", va="center", fontsize=6.5, color="white" if dark else INK)
    return image


def _line(text: str, length: int) -> str:
    """Put a text on one line of printable characters, and shorten it."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _wrap(words: list[str], width: int, lines: int) -> str:
    """Join words with commas on at most `lines` lines, and drop those that do not fit."""
    rows = [""]
    for word in words:
        word = _line(word, width)
        if len(rows[-1]) + len(word) + 2 > width:
            rows.append("")
        rows[-1] += f"{word}, "
    return "\n".join(rows[:lines]).rstrip(", ") or "no words stand out"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if number != 1 else ''}"
