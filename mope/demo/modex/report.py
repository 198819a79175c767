"""Write the table and the comparison as text and as JSON."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mope.demo.modex.pictures import Routes
from mope.demo.modex.train import Result, Settings
from mope.demo.plain import Comparison
from mope.demo.report import aligned, describe, made_with, spread, summary, write_files


@dataclass(frozen=True)
class Run:
    """Results of one seed: the pre-trained model's accuracy in matching captions, the lines of the table, and the time."""

    seed: int
    matching_accuracy: float
    results: list[Result]
    seconds: float


def table(runs: Sequence[Run]) -> str:
    """Format a Markdown table with one line for each method."""
    lines = [
        [
            of_method[0].method,
            spread([result.held_out_digits for result in of_method]),
            spread([result.held_out_phrasings for result in of_method]),
            f"{of_method[0].trained_parameters:,}",
            f"{of_method[0].share_of_all:.1%}",
        ]
        for of_method in zip(*(run.results for run in runs), strict=True)
    ]
    return aligned(["method", "held-out digits", "held-out phrasings", "trained parameters", "share of all"], lines)


NOTE = """\
Accuracy in per cent{spread}.
Half of all questions are true, so guessing, the scan alone and the sentence alone give 50.
Held-out digits: 400 scans that no method has seen, with known phrasings. Held-out phrasings: the same scans, with phrasings that
training never uses for that statement. Each method keeps the round that is best on 200 other scans. Adapters are trained together
with all LayerNorms.
On scans that it was not trained on, the pre-trained model judges correctly whether a caption fits for {matching} % of captions."""


def write(
    out: Path, runs: Sequence[Run], comparison: Comparison, routes: Routes, settings: Settings, environment: dict[str, Any]
) -> str:
    """Write results.md and results.json -> the text."""
    count = len(runs)
    note = NOTE.format(
        spread=f", mean and standard deviation over {count} seeds" if count > 1 else ", one seed",
        matching=spread([run.matching_accuracy for run in runs]),
    )
    seconds = statistics.mean(run.seconds for run in runs)
    text = (
        f"# Does the sentence hold for the scan? With ModeX\n\n{table(runs)}\n\n{note}\n\n"
        f"## Fused against plain\n\n{describe(comparison, 'adapters in plain PyTorch')}\n\n"
        f"## Routers\n\n{routes.describe()}\n\n"
        f"{made_with(environment)}. {seconds:.0f} s for each seed.\n"
    )
    record = {
        **environment,
        "settings": dataclasses.asdict(settings),
        "runs": [dataclasses.asdict(run) for run in runs],
        **summary(runs, "held_out_digits", "held_out_phrasings"),
        "fused_against_plain": dataclasses.asdict(comparison),
        "routers": routes.to_dict(),
    }
    write_files(out, text, record)
    return text
