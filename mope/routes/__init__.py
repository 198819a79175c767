"""Where a model sends its examples: which expert is taken how often, for which classes, for which images and words.

    routes = collect(model, loader, split)
    summary = summarize(routes)
    draw(summary, routes, "out")
    write_html(summary, routes, "out/index.html")

The names below are imported on first use: the command line asks for its options without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .command import add_routes
    from .page import write_html
    from .pictures import draw
    from .routing import Routes, collect
    from .summary import Summary, summarize

__all__ = ["Routes", "Summary", "add_routes", "collect", "draw", "summarize", "write_html"]

_PLACES = {
    "Routes": "routing",
    "collect": "routing",
    "add_routes": "command",
    "write_html": "page",
    "draw": "pictures",
    "Summary": "summary",
    "summarize": "summary",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
