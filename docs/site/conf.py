"""Sphinx's configuration; `build.py` runs it."""

from typing import Any

from mope import __version__

project, release = "mope", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"mope {__version__}"
html_show_copyright = False

myst_heading_anchors = 4
# Docstrings are Google's; names in single backticks are code.
default_role = "code"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"exclude-members": "__init__, __new__"}
napoleon_google_docstring = True
napoleon_use_rtype = False


def setup(app: Any) -> None:
    """Leave out what tells a reader nothing: fields of tuples without a text of their own, and `object` as a base."""
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-bases", lambda app, name, obj, options, bases: bases.remove(object) if object in bases else None)


def _skip(app: Any, kind: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    return True if str(getattr(member, "__doc__", "")).startswith("Alias for field number") else None
