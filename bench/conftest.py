"""Each way of each case is one test: checked, then timed in turns with ours, then written down; what stands there is skipped.

`--out FOLDER` says where (out/), `--seconds` how long a row may take, `--tiny` runs one small case of each op. What a CPU of fewer
instructions would do, torch, oneDNN and the C++ kernels say with ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and MOPE_CPU_TARGET=avx2.
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
    """What says most comes first: time may run out. Compilers take most of it."""
    if config.pluginmanager.hasplugin("benchmark"):
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=CLOCK.now))

    def rank(item: Any) -> tuple[bool, bool]:
        found = item.callspec.params if hasattr(item, "callspec") else {}
        later, compiled = getattr(found.get("case"), "later", False), is_compiled(found.get("way", ""))
        # On a GPU what is compiled for the main shapes says more than other shapes do.
        return (later, compiled) if DEVICE.type == "cuda" else (compiled, later)

    items.sort(key=rank)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test named after an op gets that op's cases."""
    if "case" in metafunc.fixturenames:
        op = metafunc.function.__name__.removeprefix("test_")
        where = "tiny" if metafunc.config.getoption("--tiny") else DEVICE.type
        pairs = [(case, way) for case in cases(op, where) for way in case.ways]
        metafunc.parametrize("case, way", pairs, ids=[f"{case} {way}".replace(" ", "-") for case, way in pairs])


# The ways of a case follow each other.
@functools.lru_cache(maxsize=1)
def build(case: Case) -> Problem:
    return problems.build(case, DEVICE, DTYPE)


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> Callable[[str], rows.Rows]:
    """Of a stage, "ops" or "model"; the device's ceilings are measured when a file is begun."""

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
    """measured(case, way, build, stage): one row, of the problem that `build(case)` gives."""

    def run(case: Any, way: str, build: Callable[[Any], Problem] = build, stage: str = "ops") -> None:
        found, key = results(stage), {"op": case.op, "case": str(case), "way": way}
        if found.has(**key):
            pytest.skip("stands in the results")
        rounds = None
        if request.config.pluginmanager.hasplugin("benchmark"):
            # Asked for only where something is timed.
            rounds = lambda *run: pedantic(request.getfixturevalue("benchmark"), f"{case.op} {case}", *run)  # noqa: E731
        ceilings, seconds = Ceilings(**found.header["ceilings"]), request.config.getoption("--seconds")
        try:
            row = measure(build(case), way, DEVICE, ceilings, CLOCK, seconds, rounds)
        except (Unavailable, WrongResult) as reason:
            if isinstance(reason, WrongResult) and way.startswith("ours"):
                raise
            # An opponent that is wrong measures nothing.
            found.add(key | {"unavailable": str(reason)})
            pytest.skip(str(reason))
        except Failed as reason:
            # The next run tries it again.
            found.add(key | {"failed": str(reason)})
            pytest.skip(str(reason))
        except torch.AcceleratorError as error:
            # Nothing that this process computes from now on can be trusted.
            found.add(key | {"failed": str(error).splitlines()[0]})
            pytest.exit(f"the device is lost to this process: {error}", returncode=1)
        found.add(key | row)

    return run


def pedantic(benchmark: Any, group: str, once: Callable[[], None], setup: Callable[[], object], rounds: int) -> list[float]:
    """pytest-benchmark's rounds."""

    def setup_without_result() -> None:
        # A result would be taken for arguments.
        setup()

    benchmark.group = group
    benchmark.pedantic(once, setup=setup_without_result, rounds=rounds)
    return benchmark.stats.stats.data
