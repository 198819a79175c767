"""Show how a model routes its examples: how often it chooses each expert, and for which classes, images and words.

    routes = collect(model, loader, split)
    summary = summarize(routes)
    draw(summary, routes, "out")
    write_html(summary, routes, "out/index.html")

The names below are imported on first use, so that the command line can build its options without importing torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mope.lazy import lazily

if TYPE_CHECKING:
    from .about import About
    from .command import add_routes
    from .page import write_html
    from .pictures import draw
    from .routing import Routes, collect
    from .summary import Summary, summarize

__all__ = ["About", "Routes", "Summary", "add_routes", "collect", "draw", "summarize", "write_html"]

__getattr__ = lazily(
    __name__,
    {
        "About": ".about",
        "Routes": ".routing",
        "collect": ".routing",
        "add_routes": ".command",
        "write_html": ".page",
        "draw": ".pictures",
        "Summary": ".summary",
        "summarize": ".summary",
    },
)
