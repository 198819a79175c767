"""The table of temperatures in docs/methods.md is that of the committed rows."""

from __future__ import annotations

import json
from pathlib import Path

from bench.temperature import OUT, TASKS, TEMPERATURES, table


def test_the_page_shows_the_committed_rows() -> None:
    rows = json.loads(OUT.read_text())["rows"]
    assert {(row["task"], row["temperature"]) for row in rows} == {(task, t) for task in TASKS for t in TEMPERATURES}
    assert table(rows) in (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
