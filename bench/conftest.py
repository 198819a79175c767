"""Timing of one thing after its check passed. Rows of one group were measured side by side and are compared as ratios."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mope import environment
from mope_kernels._extension import STATUS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What a reader needs to place the numbers, and no more about the machine."""
    machine_info.clear()
    machine_info |= {
        "device": environment.device_name(torch.device(DEVICE)),
        "cuda": DEVICE == "cuda",
        "threads": torch.get_num_threads(),
        "extension": STATUS.target or STATUS.reason,
        "versions": environment.versions(),
        "commit": environment.commit(),
    }


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Without each single time: medians and quartiles are what is read."""
    for benchmark in output_json["benchmarks"]:
        del benchmark["stats"]["data"]


@pytest.fixture
def time_checked(benchmark: Any) -> Callable[..., None]:
    """time_checked(function, exact, name, group, train_with): check `function()` against `exact`, then time it.

    With `train_with` (leaves) the time is that of forward and backward.
    """

    def run(function: Callable[[], Tensor], exact: Tensor, group: str, train_with: list[Tensor] | None = None) -> None:
        out = function()
        tolerance = 4e-6 if out.dtype == torch.float32 else 3e-2
        torch.testing.assert_close(out.detach().double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())
        grad = torch.randn_like(out)

        def once() -> None:
            if train_with is None:
                with torch.no_grad():
                    function()
            else:
                torch.autograd.grad(function(), train_with, grad)
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        for _ in range(3):
            once()
        benchmark.group = group
        benchmark(once)

    return run
