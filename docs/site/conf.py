"""Sphinx's configuration; `build.py` runs it."""

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
