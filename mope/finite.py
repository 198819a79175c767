"""Detect NaN and infinity, so that diverged training is noticed and never becomes a result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mope.processes import is_distributed


class NotFiniteError(ArithmeticError):
    """Error that a loss, a weight or a metric is NaN or infinite."""


class LossWatch:
    """Watcher that records the first step whose loss is not finite, without a device sync until `first` is called.

    The cost on a device is a few kernels on a single number in each step.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None

    def see(self, loss: Tensor, step: int) -> None:
        """Check the loss () of a step, or of a part of a step; steps count from 1."""
        if self._first is None:
            self._first = torch.zeros((), dtype=torch.int64, device=loss.device)
        self._first = self._first + (~torch.isfinite(loss.detach()) & (self._first == 0)) * step

    def first(self) -> int | None:
        """Return the first such step on any process, or None. All processes must call this at the same step."""
        if self._first is None:
            return None
        found = self._first
        if is_distributed():
            found = torch.where(found == 0, torch.iinfo(torch.int64).max, found)
            dist.all_reduce(found, dist.ReduceOp.MIN)
            found = torch.where(found == torch.iinfo(torch.int64).max, 0, found)
        return int(found) or None


def infinite(metrics: Mapping[str, float]) -> list[str]:
    """Return the names of metrics that are not finite."""
    return [name for name, value in metrics.items() if not math.isfinite(value)]


def finite_or_none(value: Any) -> Any:
    """Replace NaN and infinity in a tree of values with None, because JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite_or_none(each) for name, each in value.items()}
    return [finite_or_none(each) for each in value] if isinstance(value, list | tuple) else value
