"""Pytest plugin for runs that may be killed: `-p bench.resume --resume FILE` stores outcomes and skips tests that passed before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mope.benchmark import rows


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--resume", type=Path, required=True, metavar="FILE", help="JSON lines, one per test")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Resume(config), "resume tests")


def name(nodeid: str) -> str:
    """Return the id of a test without the group that pytest-xdist appends."""
    return nodeid.split("@")[0]


class Resume:
    def __init__(self, config: pytest.Config) -> None:
        worker: dict[str, Any] | None = getattr(config, "workerinput", None)
        self.rows = None
        if worker is not None:
            # Workers of pytest-xdist must agree on the remaining tests, so they receive the list, and one process writes.
            self.passed = set(worker["passed"])
            return
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        header = {"stage": "tests"} | rows.header(device) | {"sources": rows.sources("mope", "mope_kernels", "tests")}
        self.rows = rows.Rows(config.getoption("--resume"), header)
        # For tests that ran more than once, the last outcome counts.
        outcomes = {row["test"]: row["outcome"] for row in self.rows.rows}
        self.passed = {test for test, outcome in outcomes.items() if outcome == "passed"}

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["passed"] = sorted(self.passed)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        config.hook.pytest_deselected(items=[item for item in items if name(item.nodeid) in self.passed])
        items[:] = [item for item in items if name(item.nodeid) not in self.passed]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.rows is None or (report.when != "call" and report.passed):
            return
        row = {"test": name(report.nodeid), "outcome": report.outcome, "seconds": round(report.duration, 2)}
        self.rows.add(row if report.passed else row | {"why": report.longreprtext[-2000:]})
