"""Origin of the routes on a page, and the model's accuracy there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from .routing import Routes


@dataclass(frozen=True)
class About:
    """Origin of routes: names of the model, the data and the split, and the date."""

    model: str = ""
    data: str = ""
    split: str = ""
    date: str = ""

    @property
    def facts(self) -> dict[str, str]:
        """Known facts, by their names on the page."""
        found = {"Model": self.model, "Data": self.data, "Split": self.split, "Date": self.date}
        return {name: value for name, value in found.items() if value}


def today() -> str:
    """Return today's date in UTC, or the date of SOURCE_DATE_EPOCH if it is set, for reproducible files.

    Raises:
        ValueError: SOURCE_DATE_EPOCH is not a number of seconds.
    """
    seconds = os.environ.get("SOURCE_DATE_EPOCH")
    if seconds is None:
        return datetime.now(UTC).date().isoformat()
    try:
        return datetime.fromtimestamp(int(seconds), UTC).date().isoformat()
    except (OverflowError, OSError, ValueError) as error:
        raise ValueError(f"SOURCE_DATE_EPOCH={seconds!r} is not a number of seconds since 1970: set one, or unset it") from error


def quality(routes: Routes) -> tuple[str, float] | None:
    """Return the name and value of a metric, or None if no example has a label.

    The metric is accuracy if each example has one label, otherwise micro F1: 2 * right / (predicted + labels), over all classes.
    """
    if not routes.labels.any():
        return None
    right, said = np.logical_and(routes.labels, routes.predictions).sum(), routes.labels.sum() + routes.predictions.sum()
    single = all((rows.sum(1) == 1).all() for rows in (routes.labels, routes.predictions))
    return "Accuracy" if single else "Micro F1", 2 * float(right) / float(said)
