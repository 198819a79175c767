"""Write the table of results as text and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mope.demo.plain import Comparison
from mope.demo.report import aligned, spread, write_results
from mope.demo.scenes.train import Result, Settings


@dataclass(frozen=True)
class Run:
    """Results for one seed: the pretraining accuracies of the encoders, and the lines of the table."""

    seed: int
    tag_accuracy: float | None
    word_accuracy: float | None
    results: list[Result]
    seconds: float


def table(runs: Sequence[Run]) -> str:
    """Format a Markdown table with a line for each method."""
    header = ["method", "test", "new combinations", "trained parameters", "seconds of training"]
    lines = []
    for of_method in zip(*(run.results for run in runs), strict=True):
        seconds = [result.seconds for result in of_method if result.seconds is not None]
        lines.append(
            [
                of_method[0].method,
                spread([result.test for result in of_method]),
                spread([result.new_combinations for result in of_method]),
                f"{of_method[0].trained_parameters:,}",
                f"{statistics.mean(seconds):.0f}" if seconds else "–",
            ]
        )
    return aligned(header, lines)


NOTE = """\
Accuracy in per cent{spread}. Half of all questions are true, so guessing, the scene alone and the sentence alone give 50.
Test: scenes made of scans that no method has seen. New combinations: the same scenes, with pairs of place and property that
training never asks about. Each method keeps the round that is best on a validation split. The methods train one after the other
on the same core, so their times show orders of magnitude only."""


def write(out: Path, runs: Sequence[Run], comparison: Comparison, settings: Settings, environment: dict[str, Any]) -> str:
    """Write results.md and results.json; return the text of results.md."""
    note = NOTE.format(spread=f", mean and standard deviation over {len(runs)} seeds" if len(runs) > 1 else ", one seed")
    if trained := [run for run in runs if run.tag_accuracy is not None]:
        tags = spread([run.tag_accuracy for run in trained if run.tag_accuracy is not None])
        words = spread([run.word_accuracy for run in trained if run.word_accuracy is not None])
        note += f"\nThe frozen encoders that this run trained, alone: {tags} % of the digits' tags, {words} % of masked words."
    text = f"# Does the sentence hold for the scene?\n\n{table(runs)}\n\n{note}"
    return write_results(out, text, runs, comparison, settings, environment, ("test", "new_combinations", "seconds"))
