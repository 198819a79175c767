"""Timing of one thing after its check passed. Rows of one group were measured side by side and are compared as ratios."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    import mope_kernels
    from mope_kernels._extension import STATUS

    machine_info.pop("node", None)
    machine_info["torch"] = torch.__version__
    machine_info["mope_kernels"] = mope_kernels.__version__
    machine_info["extension"] = STATUS.loaded
    machine_info["threads"] = torch.get_num_threads()
    machine_info["device"] = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    machine_info["commit"] = done.stdout.strip() or "unknown"


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
