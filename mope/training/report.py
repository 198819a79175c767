"""Results of runs: JSON and a Markdown table."""

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
    """A Markdown table, first column left."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def runs_table(runs: Sequence[dict[str, Any]]) -> str:
    """A line for each run, and mean and standard deviation (of the sample) where there are several."""
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
    """Mean and standard deviation (of the sample) of what several runs have reached, by split and metric; nothing of one run."""
    if len(runs) < 2:
        return {}
    found: dict[str, Any] = {}
    for split, name in _columns(runs):
        values = [run[split][name] for run in runs]
        found.setdefault(split, {})[name] = {"mean": statistics.mean(values), "std": statistics.stdev(values)}
    return {"summary": found}


def _columns(runs: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Splits and metrics that every run has."""
    return [(split, name) for split in ("dev", "test") for name in NAMES if all(name in run.get(split, {}) for run in runs)]


def metrics_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each row: what else it says, then its metrics."""
    metrics = [name for name in NAMES if name in rows[0]]
    others = [name for name in rows[0] if name not in NAMES]
    head = [name.replace("_", " ") for name in others] + [NAMES[name] for name in metrics]
    return table(head, [[*(str(row[n]) for n in others), *(_number(n, [row[n]]) for n in metrics)] for row in rows])


def refuse_other(folder: Path) -> None:
    """ValueError where `folder` holds the results of something else than an evaluation, which would be lost."""
    path = folder / "results.json"
    if not path.exists():
        return
    try:
        is_evaluation = "rows" in json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError):
        is_evaluation = False
    if not is_evaluation:
        raise ValueError(f"{path} is not that of an evaluation and would be overwritten: choose another --out")


def write(folder: Path, results: dict[str, Any], text: str) -> None:
    """`results.json` and `results.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.json", json.dumps(finite_or_none(results), indent=2, allow_nan=False) + "\n")
    write_text(folder / "results.md", text)


def _number(name: str, values: list[float]) -> str:
    """Losses as they are, the others in percent; several as mean ± standard deviation."""
    scale, digits = (1, 4) if name == "loss" else (100, 2)
    text = f"{scale * statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {scale * statistics.stdev(values):.{digits}f}"
