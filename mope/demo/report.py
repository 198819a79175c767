"""The table and the comparison, as text and as JSON."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mope.demo.plain import BATCH, Comparison
from mope.demo.train import Result, Settings
from mope.files import write_text
from mope.finite import finite_or_none
from mope_kernels import _extension


@dataclass(frozen=True)
class Run:
    """One seed: the accuracy of the frozen encoders on what they were trained for, and the lines of the table."""

    seed: int
    digit_accuracy: float
    word_accuracy: float
    results: list[Result]
    seconds: float


def spread(values: Sequence[float], form: str = ".1f", scale: float = 100.0) -> str:
    """Format the mean, with the standard deviation if there are several seeds."""
    mean = f"{scale * statistics.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ± {scale * statistics.stdev(values):{form}}"


def table(runs: Sequence[Run]) -> str:
    """Write a line of Markdown for each method."""
    header = ["method", "held-out digits", "held-out phrasings", "trained parameters", "share of all", "router gradient"]
    lines = []
    for of_method in zip(*(run.results for run in runs), strict=True):
        first = of_method[0]
        gradients = [result.router_gradient for result in of_method if result.router_gradient is not None]
        lines.append(
            [
                first.method,
                spread([result.held_out_digits for result in of_method]),
                spread([result.held_out_phrasings for result in of_method]),
                f"{first.trained_parameters:,}",
                f"{first.share_of_all:.1%}",
                spread(gradients, ".1e", 1.0) if gradients else "–",
            ]
        )
    return aligned(header, lines)


def aligned(header: list[str], lines: list[list[str]]) -> str:
    """Align a Markdown table: names left, numbers right."""
    widths = [max(len(row[i]) for row in (header, *lines)) for i in range(len(header))]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    aligned = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in (header, *lines)
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in (aligned[0], rule, *aligned[1:]))


def describe(comparison: Comparison, plain: str = "plain PyTorch that concatenates") -> str:
    """Describe the comparison, one line for each fact. `plain` names what it is compared with."""
    kernels = {"cpu": f"cpu, the C++ kernels for {_extension.STATUS.target}", "reference": "reference, plain PyTorch"}
    lines = [f"- {op}: {kernels.get(impl, impl)}" for op, impl in comparison.implementations.items()]
    if comparison.dispatched:
        counts = ", ".join(f"{name} × {count}" for name, count in comparison.dispatched.items())
        lines.append(f"- compiled ops that ran in one training step: {counts}")
    lines.append(
        f"- largest error against {plain}: {comparison.logit_error:.1e} on the logits, "
        f"{comparison.gradient_error:.1e} of the largest gradient on the gradients"
    )
    if comparison.milliseconds is None:
        return "\n".join([*lines, "- no fused kernel here: nothing to time (`mope info` says why)"])
    for what, times in comparison.milliseconds.items():
        lines.append(
            f"- {what}: {comparison.ratio(what):.2f} × the throughput of plain "
            f"({times['fused']:.1f} ms against {times['plain']:.1f} ms, batch of {BATCH})"
        )
    return "\n".join(lines)


NOTE = """\
Accuracy in per cent{spread}.
Half of all questions are true, so guessing, the scan alone and the sentence alone give 50.
Held-out digits: 400 scans that no method has seen, with known phrasings. Held-out phrasings: the same scans, with phrasings that
training never uses for that statement. Each method keeps the round that is best on 200 other scans. Router gradient: norm of the
task loss's gradient on all routers after training; for top-1, that of a training step with one expert.
The frozen encoders alone are right on {digits} % of the validation digits and {words} % of masked words."""


def made_with(environment: dict[str, Any]) -> str:
    """Format device, versions, and commit or release."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version != "not installed")
    commit = environment["commit"]
    return f"{environment['device']}; {versions}; " + (commit if commit.startswith("release") else f"commit {commit}")


def summary(runs: Sequence[Any], *measured: str) -> dict[str, Any]:
    """Compute mean and standard deviation over seeds of each measured field, by method; {} for one seed."""
    if len(runs) < 2:
        return {}
    found: dict[str, Any] = {}
    for of_method in zip(*(run.results for run in runs), strict=True):
        named = {name: [value for result in of_method if (value := getattr(result, name)) is not None] for name in measured}
        found[of_method[0].method] = {
            name: {"mean": statistics.mean(values), "std": statistics.stdev(values)} for name, values in named.items() if values
        }
    return {"summary": found}


def write(out: Path, runs: Sequence[Run], comparison: Comparison, settings: Settings, environment: dict[str, Any]) -> str:
    """Write results.md and results.json; return the text."""
    count = len(runs)
    note = NOTE.format(
        spread=f", mean and standard deviation over {count} seeds" if count > 1 else ", one seed",
        digits=spread([run.digit_accuracy for run in runs]),
        words=spread([run.word_accuracy for run in runs]),
    )
    measured = ("held_out_digits", "held_out_phrasings", "router_gradient")
    return write_results(
        out, f"# Does the sentence hold for the scan?\n\n{table(runs)}\n\n{note}", runs, comparison, settings, environment, measured
    )


def write_results(
    out: Path,
    text: str,
    runs: Sequence[Any],
    comparison: Comparison,
    settings: Any,
    environment: dict[str, Any],
    measured: Sequence[str],
) -> str:
    """Write results.md and results.json; return the former.

    Args:
        out: Folder for both.
        text: Title, table and note.
        runs: One dataclass for each seed, with `seconds` and `results`.
        comparison: Fused against plain.
        settings: Dataclass of the settings.
        environment: Device, versions and command.
        measured: Fields of the results that get a mean and a deviation over the seeds.
    """
    seconds = statistics.mean(run.seconds for run in runs)
    text = (
        f"{text}\n\n## Fused against plain\n\n{describe(comparison)}\n\n{made_with(environment)}. {seconds:.0f} s for each seed.\n"
    )
    record = {
        **environment,
        "settings": dataclasses.asdict(settings),
        "runs": [dataclasses.asdict(run) for run in runs],
        **summary(runs, *measured),
        "fused_against_plain": dataclasses.asdict(comparison),
    }
    write_files(out, text, record)
    return text


def write_files(out: Path, text: str, record: dict[str, Any]) -> None:
    """Write results.md and results.json."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "results.md", text)
    write_text(out / "results.json", json.dumps(finite_or_none(record), indent=2, allow_nan=False) + "\n")
