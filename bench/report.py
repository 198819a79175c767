"""docs/benchmarks.md from the committed results: `python -m bench.report`. Says nothing that is not in a file of bench/results."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

HEAD = """\
# Benchmarks

Made by `python -m bench.report` from the files in `bench/results`. The entries of a line were measured side by side in one run,
each after its result was checked. Times are medians, ± half the interquartile range; a ratio above 1 means that ours is
faster. *cat+sdpa* mixes the same bank, concatenates and calls torch's `scaled_dot_product_attention`; *eager* is einsum, or gather
and sum; *concatenated* is the model written by hand, prompts concatenated to the tokens; *compiled* is the same under
`torch.compile`.
"""
NO_GPU = """
There are no results of a GPU yet. What the kernels take there is in the report of `make aot`; how fast they are is not known.
"""


def way_of(benchmark: dict[str, Any]) -> str:
    return benchmark["params"]["way"]


def milliseconds(stats: dict[str, float]) -> str:
    return f"{1e3 * stats['median']:.3g} ± {1e3 * stats['iqr'] / 2:.2g}"


def table(benchmarks: list[dict[str, Any]]) -> str:
    """One line for each group, one column for each way."""
    groups: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for benchmark in benchmarks:
        groups[benchmark["group"]][way_of(benchmark)] = benchmark["stats"]
    sections: dict[str, list[str]] = defaultdict(list)
    for group, ways in groups.items():
        kind, _, case = group.partition(" ")
        others = [way for way in ways if way != "ours"]
        if not sections[kind]:
            sections[kind] += [f"\n### {kind}\n", f"| case | ours, ms | {' | '.join(f'{way}, ms | ratio' for way in others)} |"]
            sections[kind].append("|:---|---:|" + "---:|---:|" * len(others))
        cells = [f"{milliseconds(ways[way])} | {ways[way]['median'] / ways['ours']['median']:.2f}" for way in others]
        sections[kind].append(f"| {case} | {milliseconds(ways['ours'])} | {' | '.join(cells)} |")
    return "\n".join(line for lines in sections.values() for line in lines)


def main() -> None:
    text, on_gpu = HEAD, False
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        results = json.loads(path.read_text())
        machine = results["machine_info"]
        on_gpu |= machine["cuda"]
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version != "not installed")
        text += f"\n## {machine['device']}\n\n`{path.name}`: C++ kernels {machine['extension']}; {versions}; "
        text += f"commit {machine['commit']}; {results['datetime'][:10]}.\n{table(results['benchmarks'])}\n"
    (ROOT / "docs" / "benchmarks.md").write_text(text if on_gpu else text + NO_GPU)


if __name__ == "__main__":
    main()
