"""Write tables, drawings and examples as one self-contained HTML page, without external files, fonts or network access."""

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
# This script sorts tables. Without it, the page shows the same contents, unsorted.
SCRIPT = (TEMPLATES / "page.js").read_text(encoding="utf-8")
STYLE = (TEMPLATES / "page.css").read_text(encoding="utf-8")
_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
# Defense in depth: even if a text were parsed as markup, this policy would keep it from loading or running anything.
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
        summary: Tables of the routes.
        routes: Routes of all examples.
        path: File to write.
        blocks: Numbers of the blocks whose classes and experts are shown. None shows the block whose routing depends most on the
            example.
        about: Origin of the routes, shown at the top. None omits it.
        pictures: Files that `draw` wrote; the page links to them.
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
            # The style sheet and script contain only this package's own text and base64, so they need no escaping.
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
    # Characters that cannot be encoded, such as lone surrogates from a JSON file, become question marks.
    path.write_text(text, encoding="utf-8", errors="replace")


def _environment() -> Environment:
    """Return a template engine that escapes everything and raises an error on undefined variables."""
    return Environment(
        autoescape=True, loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _facts(routes: Routes, about: About) -> dict[str, str]:
    """Return the facts at the top of the page by name."""
    sizes = {
        "Examples": f"{len(routes):,}",
        "Classes": f"{len(routes.classes):,}",
        "Routed blocks": f"{len(routes.blocks):,}",
        "Experts": f"{routes.probabilities.shape[2]:,}",
    }
    metric = quality(routes)
    return {**about.facts, **sizes, **({} if metric is None else {metric[0]: f"{metric[1]:.1%}"})}
