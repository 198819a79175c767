"""Suggest corrections of misspelled names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def did_you_mean(word: str, names: Iterable[str], found: Sequence[str] = ()) -> str:
    """Return a question that suggests names similar to `word`, or `found` if given; empty if no name is similar."""
    close = list(found) or difflib.get_close_matches(word, list(names), 2, cutoff=0.7)
    return f"did you mean {' or '.join(close)}?" if close else ""
