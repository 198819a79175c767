"""Small versions of the benchmarks."""

from __future__ import annotations

import dataclasses

from mope.benchmark.cases import Case, cases


def tiny_cases(op: str, where: str) -> list[Case]:
    """Replace `cases` by the small ones, with the ways of a CPU."""
    return [dataclasses.replace(case, detailed=False, graphs=False) for case in cases(op, "tiny")]
