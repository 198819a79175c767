"""The cases to time: the shapes and opponents of each op, from the modules of `mope.benchmark.ops`."""

from __future__ import annotations

import dataclasses

from .case import WITH_OPTIMIZER, Case, is_compiled, is_graphed, uses_graphs
from .ops import BENCHMARKS

__all__ = ["BENCHMARKS", "WAYS", "WITH_OPTIMIZER", "Case", "cases", "is_compiled", "is_graphed", "uses_graphs"]

WAYS = {op: found.ways for op, found in BENCHMARKS.items()}


def cases(op: str, where: str) -> list[Case]:
    """Return the cases of an op for a place: "cpu", "cuda" or "tiny"."""
    # A CPU has a single kernel for attention, and no graphs.
    on_cpu = where == "cpu"
    found = BENCHMARKS[op].cases.get(where, [])
    return [dataclasses.replace(case, detailed=case.detailed and not on_cpu, graphs=case.graphs and not on_cpu) for case in found]
