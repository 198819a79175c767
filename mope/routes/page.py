"""The tables, drawings and examples as one HTML page that needs no other file, no font and no network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from . import palette
from .about import About, quality
from .routing import Routes
from .summary import Summary
from .view import WORDS_IN_A_ROW, Images, balance_rows, block_view, heat_map, picture_links

TEMPLATES = Path(__file__).with_name("templates")
# The page's own, which sorts tables; without it all is shown, in the order in which it is written.
SCRIPT = (TEMPLATES / "page.js").read_text(encoding="utf-8")
STYLE = (TEMPLATES / "page.css").read_text(encoding="utf-8")
_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
# Should a text ever be taken for markup: nothing may be loaded or run.
POLICY = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'; base-uri 'none'"


def write_html(
    summary: Summary,
    routes: Routes,
    path: str | Path,
    *,
    blocks: Sequence[int] | None = None,
    about: About | None = None,
    pictures: Sequence[Path] = (),
) -> None:
    """Write the page.

    Args:
        blocks: numbers of the blocks whose classes and experts are shown; None: the one whose routing depends on the example most.
        about: where the routes come from. None: the page does not say.
        pictures: what `draw` wrote, for links to it.
    """
    chosen = [summary.most_decided] if blocks is None else list(blocks)
    path = Path(path)
    images = Images(routes, path.parent)
    views = [block_view(summary, routes, block, images) for block in chosen]
    text = (
        _environment()
        .get_template("page.html")
        .render(
            policy=POLICY,
            # Of this package alone, and base64.
            style=Markup(STYLE + palette.style() + images.style()),
            script=Markup(SCRIPT),
            facts=_facts(routes, about or About()),
            columns=list(summary.balance),
            balance=balance_rows(summary),
            maps=[heat_map("Mean probability", summary.load, summary), heat_map("Share of first choices", summary.top1, summary)],
            blocks=views,
            most_words=WORDS_IN_A_ROW,
            pictures=picture_links(pictures, path.parent),
        )
    )
    # What cannot be encoded, halves of a character that a JSON file may hold, becomes a question mark.
    path.write_text(text, encoding="utf-8", errors="replace")


def _environment() -> Environment:
    """Return a template engine that escapes everything, and refuses what nobody gave it."""
    return Environment(
        autoescape=True, loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _facts(routes: Routes, about: About) -> dict[str, str]:
    """Return what the head of the page says, by its name."""
    sizes = {
        "Examples": f"{len(routes):,}",
        "Classes": f"{len(routes.classes):,}",
        "Routed blocks": f"{len(routes.blocks):,}",
        "Experts": f"{routes.probabilities.shape[2]:,}",
    }
    metric = quality(routes)
    return {**about.facts, **sizes, **({} if metric is None else {metric[0]: f"{metric[1]:.1%}"})}
