"""Small versions of the benchmarks."""

from __future__ import annotations

import dataclasses

from mope.benchmark.cases import Case, cases


def tiny_cases(op: str, where: str) -> list[Case]:
    """Return the small cases in place of `cases`, with the ways that run on a CPU."""
    return [dataclasses.replace(case, detailed=False, graphs=False) for case in cases(op, "tiny")]
