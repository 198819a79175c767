"""Suggest the name that was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def did_you_mean(word: str, names: Iterable[str], found: Sequence[str] = ()) -> str:
    """Ask for what `word` may have meant; empty if nothing is like it. `found` are names that are known to be meant."""
    close = list(found) or difflib.get_close_matches(word, list(names), 2, cutoff=0.7)
    return f"did you mean {' or '.join(close)}?" if close else ""
