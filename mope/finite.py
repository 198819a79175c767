"""Numbers that are not finite: training that diverges is noticed, and never becomes a result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mope.processes import is_distributed


class NotFiniteError(ArithmeticError):
    """A loss, a weight or a metric is NaN or infinite."""


class LossWatch:
    """Remembers the first step whose loss was not finite. Nobody waits for a device until `first` is asked for.

    On a device it costs a few kernels of one number in a step.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None

    def see(self, loss: Tensor, step: int) -> None:
        """Look at the loss () of a step, or of a part of it; steps count from 1."""
        if self._first is None:
            self._first = torch.zeros((), dtype=torch.int64, device=loss.device)
        self._first = self._first + (~torch.isfinite(loss.detach()) & (self._first == 0)) * step

    def first(self) -> int | None:
        """The first such step on any process. Every process has to ask at the same step."""
        if self._first is None:
            return None
        found = self._first
        if is_distributed():
            found = torch.where(found == 0, torch.iinfo(torch.int64).max, found)
            dist.all_reduce(found, dist.ReduceOp.MIN)
            found = torch.where(found == torch.iinfo(torch.int64).max, 0, found)
        return int(found) or None


def infinite(metrics: Mapping[str, float]) -> list[str]:
    """The names of metrics that are not finite."""
    return [name for name, value in metrics.items() if not math.isfinite(value)]


def finite_or_none(value: Any) -> Any:
    """A tree of values for JSON, which has neither NaN nor infinity: None in their place."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite_or_none(each) for name, each in value.items()}
    return [finite_or_none(each) for each in value] if isinstance(value, list | tuple) else value
