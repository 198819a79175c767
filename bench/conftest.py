"""Run each way of each case as one test: check it, time it in alternation with ours, and store the row; skip stored rows.

`--out FOLDER` sets the result folder (out/), `--seconds` the time for a row, and `--tiny` runs one small case of each op. To
measure as on a CPU with fewer instructions, set ATEN_CPU_CAPABILITY (torch), ONEDNN_MAX_CPU_ISA (oneDNN) and MOPE_CPU_TARGET (the
C++ kernels) to avx2.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mope.benchmark import problems, rows
from mope.benchmark.baselines import Unavailable
from mope.benchmark.cases import Case, cases, is_compiled
from mope.benchmark.measure import Ceilings, Clock, Failed, WrongResult, measure
from mope.benchmark.problem import Problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.bfloat16, torch.float32]
DTYPE = DTYPES[0] if DEVICE.type == "cuda" else DTYPES[1]
CLOCK = Clock.of(DEVICE)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--out", type=Path, default=Path("out"), help="folder of the results")
    parser.addoption("--seconds", type=float, default=0.5, help="time for the rounds of a row")
    parser.addoption("--tiny", action="store_true", help="one small case of each op, to see whether everything works")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort the most informative tests first, because time may run out; compilation takes most of the time."""
    if config.pluginmanager.hasplugin("benchmark"):
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=CLOCK.now))

    def rank(item: Any) -> tuple[bool, bool]:
        found = item.callspec.params if hasattr(item, "callspec") else {}
        later, compiled = getattr(found.get("case"), "later", False), is_compiled(found.get("way", ""))
        # On a GPU, compiled ways on the main shapes are more informative than other shapes.
        return (later, compiled) if DEVICE.type == "cuda" else (compiled, later)

    items.sort(key=rank)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize a test named after an op with that op's cases."""
    if "case" in metafunc.fixturenames:
        op = metafunc.function.__name__.removeprefix("test_")
        where = "tiny" if metafunc.config.getoption("--tiny") else DEVICE.type
        pairs = [(case, way) for case in cases(op, where) for way in case.ways]
        metafunc.parametrize("case, way", pairs, ids=[f"{case} {way}".replace(" ", "-") for case, way in pairs])


# The ways of a case run consecutively, so one cached problem is enough.
@functools.lru_cache(maxsize=1)
def build(case: Case) -> Problem:
    return problems.build(case, DEVICE, DTYPE)


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> Callable[[str], rows.Rows]:
    """Return a function that opens the results of a stage, "ops" or "model", and measures the device's ceilings for a new file."""

    @functools.cache
    def of(stage: str) -> rows.Rows:
        name = "dry" if pytestconfig.getoption("--tiny") else rows.slug(DEVICE)
        found = rows.Rows(pytestconfig.getoption("--out") / f"{stage}-{name}.jsonl", {"stage": stage} | rows.header(DEVICE))
        if "ceilings" not in found.header:
            ceilings = Ceilings.measure(DEVICE, DTYPES)
            found.begin(date=time.strftime("%Y-%m-%d"), ceilings=vars(ceilings))
        return found

    return of


Measured = Callable[..., None]


@pytest.fixture
def measured(request: pytest.FixtureRequest, results: Callable[[str], rows.Rows]) -> Measured:
    """Return a function (case, way, build, stage) that measures one row for the problem that `build(case)` returns."""

    def run(case: Any, way: str, build: Callable[[Any], Problem] = build, stage: str = "ops") -> None:
        found, key = results(stage), {"op": case.op, "case": str(case), "way": way}
        if found.has(**key):
            pytest.skip("already in the results")
        rounds = None
        if request.config.pluginmanager.hasplugin("benchmark"):
            # Request the fixture only if something is timed.
            rounds = lambda *run: pedantic(request.getfixturevalue("benchmark"), f"{case.op} {case}", *run)  # noqa: E731
        ceilings, seconds = Ceilings(**found.header["ceilings"]), request.config.getoption("--seconds")
        try:
            row = measure(build(case), way, DEVICE, ceilings, CLOCK, seconds, rounds)
        except (Unavailable, WrongResult) as reason:
            if isinstance(reason, WrongResult) and way.startswith("ours"):
                raise
            # Timing an opponent with wrong results is meaningless.
            found.add(key | {"unavailable": str(reason)})
            pytest.skip(str(reason))
        except Failed as reason:
            # The next run retries it.
            found.add(key | {"failed": str(reason)})
            pytest.skip(str(reason))
        except torch.AcceleratorError as error:
            # This process can no longer compute anything reliably.
            found.add(key | {"failed": str(error).splitlines()[0]})
            pytest.exit(f"this process has lost the device: {error}", returncode=1)
        found.add(key | row)

    return run


def pedantic(benchmark: Any, group: str, once: Callable[[], None], setup: Callable[[], object], rounds: int) -> list[float]:
    """Time rounds with pytest-benchmark and return their seconds."""

    def setup_without_result() -> None:
        # pytest-benchmark would use a result as arguments.
        setup()

    benchmark.group = group
    benchmark.pedantic(once, setup=setup_without_result, rounds=rounds)
    return benchmark.stats.stats.data
