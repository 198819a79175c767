"""Write the tables, pictures and examples as one self-contained HTML page, without scripts, fonts or links."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .pictures import draw_classes, draw_load, png, shares, shown_experts
from .routing import Routes
from .summary import Summary
from .thumbnails import data_uri, thumbnail

# The largest number of characters to show of a text, and of a class name.
LONGEST_TEXT, LONGEST_NAME = 160, 60
# This policy keeps a text from loading or running anything, should it ever be parsed as markup.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1d2433; font: 15px/1.5 system-ui, sans-serif; }
h2 { margin-top: 3rem; } h3 { margin: 0; }
p.note, .shares, figcaption { color: #5b6478; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #e3e8ef; }
td:first-child, th:first-child { text-align: left; }
img { max-width: 100%; }
.expert { border-top: 1px solid #c9d1de; padding: 1rem 0; }
.words span { background: #e6f3f1; border-radius: .3rem; padding: .05rem .4rem; margin-right: .3rem; white-space: nowrap; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .8rem; margin-top: .7rem; }
figure { margin: 0; overflow-wrap: anywhere; } figcaption { font-size: 12px; line-height: 1.35; }
figcaption b { color: #1d2433; }
.thumbnail { width: 96px; height: 96px; background: center / contain no-repeat; }
"""


def write_html(summary: Summary, routes: Routes, path: str | Path, *, blocks: Sequence[int] | None = None) -> None:
    """Write the page to `path`.

    Only the blocks with the numbers in `blocks` are shown with their classes and experts; None shows the block whose routing
    depends most on the example.
    """
    chosen = [summary.most_decided] if blocks is None else list(blocks)
    # Characters that cannot be encoded, such as lone surrogates from a JSON file, become question marks.
    Path(path).write_text("\n".join(_page(summary, routes, chosen)), encoding="utf-8", errors="replace")


def _page(summary: Summary, routes: Routes, blocks: list[int]) -> Iterator[str]:
    images = _Images(routes)
    body = [part for block in blocks for part in _block(summary, routes, block, images)]
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8"><title>Routes</title>'
    yield f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<style>{STYLE}{images.style()}</style></head><body>"
    yield "<h1>Routes</h1>"
    yield (
        f'<p class="note">{len(routes):,} examples of {len(routes.classes)} classes in {len(routes.blocks)} routed blocks '
        f"with {summary.load.shape[1]} experts. Blocks and experts count from 0.</p>"
    )
    yield from _balance(summary)
    yield _picture(draw_load(summary), "Mean probability and share of first choices of each expert in each block")
    yield from body
    yield "</body></html>"


def _balance(summary: Summary) -> Iterator[str]:
    yield "<h2>Balance</h2>"
    yield (
        '<p class="note">The load of an expert is its mean probability, CV² its squared coefficient of variation: 0 is balanced. '
        "Entropies and information are shares of log K. Load entropy: 1 is balanced. Example entropy: 0 is one expert for each, 1 "
        "is all experts alike. Class information: what the class says about the expert.</p>"
    )
    yield f"<table><tr>{''.join(f'<th>{head}</th>' for head in ('block', *summary.balance))}</tr>"
    for block, row in zip(summary.blocks, zip(*summary.balance.values(), strict=True), strict=True):
        yield f"<tr><td>{_text(str(block))}</td>{''.join(f'<td>{value:.3f}</td>' for value in row)}</tr>"
    yield "</table>"


def _block(summary: Summary, routes: Routes, block: int, images: _Images) -> Iterator[str]:
    name = str(summary.blocks[block])
    yield f"<h2>{_text(name[:1].upper() + name[1:])}</h2>"
    yield _picture(draw_classes(summary, block), f"Mean probability of each expert for each class in {name}")
    experts = shown_experts(summary, block)
    if len(experts) < summary.load.shape[1]:
        yield f'<p class="note">The {len(experts)} of {summary.load.shape[1]} experts with the largest load.</p>'
    for expert in experts:
        yield f'<section class="expert"><h3>Expert {expert}</h3><div class="shares">{shares(summary, block, expert)}</div>'
        words = [
            f'<span title="z = {score:.1f}">{_text(str(word))}</span>'
            for word, score in zip(summary.words[block, expert], summary.word_scores[block, expert], strict=True)
            if word
        ]
        yield f'<div class="words">{"".join(words) or "no words stand out"}</div><div class="examples">'
        for row, probability in zip(summary.top_examples[block, expert], summary.top_probabilities[block, expert], strict=True):
            if row >= 0:
                yield _example(routes, int(row), float(probability), images)
        yield "</div></section>"


def _example(routes: Routes, row: int, probability: float, images: _Images) -> str:
    right = np.array_equal(routes.labels[row], routes.predictions[row])
    said = "" if right else f", taken for {_names(routes, routes.predictions[row])}"
    return (
        f"<figure>{images.of(row)}<figcaption><b>{probability:.2f}</b> {_names(routes, routes.labels[row])}{said}<br>"
        f"{_text(routes.texts[row], LONGEST_TEXT)}</figcaption></figure>"
    )


def _names(routes: Routes, chosen: NDArray[np.bool_]) -> str:
    return ", ".join(_text(routes.classes[i], LONGEST_NAME) for i in np.flatnonzero(chosen)) or "nothing"


def _text(text: str, length: int | None = None) -> str:
    """Format any text for HTML: shorten it, escape markup, and isolate changes of the writing direction."""
    shown = text if length is None or len(text) <= length else f"{text[: length - 1]}…"
    return f"<bdi>{escape(shown)}</bdi>"


def _picture(figure: Figure, description: str) -> str:
    return f'<p><img alt="{escape(description)}" src="data:image/png;base64,{base64.b64encode(png(figure)).decode()}"></p>'


class _Images:
    """Thumbnails by the row of an example. The page contains each image file once, even if several experts show it."""

    def __init__(self, routes: Routes) -> None:
        self.routes = routes
        self._numbers: dict[Path | None, int] = {}

    def of(self, row: int) -> str:
        number = self._numbers.setdefault(self.routes.images[row], len(self._numbers))
        name = escape(self.routes.ids[row][:LONGEST_NAME])
        return f'<div class="thumbnail i{number}" role="img" aria-label="image of {name}" title="{name}"></div>'

    def style(self) -> str:
        return "\n".join(f".i{i} {{ background-image: url({data_uri(thumbnail(path))}); }}" for path, i in self._numbers.items())
