"""Benchmarks, with one module per op: named shapes, work, opponents and cases. New modules are found automatically."""

from __future__ import annotations

import importlib
import pkgutil

from mope.benchmark import case

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

BENCHMARKS: dict[str, case.Benchmark] = dict(sorted(case.BENCHMARKS.items(), key=lambda item: (item[1].rank, item[0])))
