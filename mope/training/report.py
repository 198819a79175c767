"""Write the results of runs as JSON and as a Markdown table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mope.files import write_text
from mope.finite import finite_or_none

NAMES = {"accuracy": "accuracy", "f1_micro": "F1 micro", "f1_macro": "F1 macro", "loss": "loss"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table. The first column is left-aligned, the others are right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def runs_table(runs: Sequence[dict[str, Any]]) -> str:
    """Format a table with a row for each run. If there are several, add their mean and sample standard deviation."""
    columns = _columns(runs)
    head = ["seed", *(f"{split} {NAMES[name]}" for split, name in columns), "best step", "minutes"]
    rows = [
        [
            str(run["seed"]),
            *(_number(name, [run[split][name]]) for split, name in columns),
            str(run["best_step"] or run["steps"]),
            f"{run['seconds'] / 60:.1f}",
        ]
        for run in runs
    ]
    if len(runs) > 1:
        values = [_number(name, [run[split][name] for run in runs]) for split, name in columns]
        rows.append([f"mean ± std of {len(runs)}", *values, "", ""])
    return table(head, rows)


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and sample standard deviation of each metric over several runs, by split; an empty dict for a single run."""
    if len(runs) < 2:
        return {}
    found: dict[str, Any] = {}
    for split, name in _columns(runs):
        values = [run[split][name] for run in runs]
        found.setdefault(split, {})[name] = {"mean": statistics.mean(values), "std": statistics.stdev(values)}
    return {"summary": found}


def _columns(runs: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the pairs of split and metric that every run has."""
    return [(split, name) for split in ("dev", "test") for name in NAMES if all(name in run.get(split, {}) for run in runs)]


def metrics_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format a table of rows: their other fields first, then their metrics."""
    metrics = [name for name in NAMES if name in rows[0]]
    others = [name for name in rows[0] if name not in NAMES]
    head = [name.replace("_", " ") for name in others] + [NAMES[name] for name in metrics]
    return table(head, [[*(str(row[n]) for n in others), *(_number(n, [row[n]]) for n in metrics)] for row in rows])


def refuse_other(folder: Path) -> None:
    """Raise ValueError if `folder` holds results of anything but an evaluation, because they would be overwritten."""
    path = folder / "results.json"
    if not path.exists():
        return
    try:
        is_evaluation = "rows" in json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError):
        is_evaluation = False
    if not is_evaluation:
        raise ValueError(f"{path} is not from an evaluation and would be overwritten: choose another --out")


def write(folder: Path, results: dict[str, Any], text: str) -> None:
    """Write `results.json` and `results.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.json", json.dumps(finite_or_none(results), indent=2, allow_nan=False) + "\n")
    write_text(folder / "results.md", text)


def _number(name: str, values: list[float]) -> str:
    """Format losses as they are and other metrics in percent; several values as mean ± standard deviation."""
    scale, digits = (1, 4) if name == "loss" else (100, 2)
    text = f"{scale * statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {scale * statistics.stdev(values):.{digits}f}"
