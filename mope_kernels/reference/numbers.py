"""Common parts of the definitions: the dtype of statistics, and switching autocast off."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Params = ParamSpec("Params")
Result = TypeVar("Result")


def autocast_off(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the dtypes of the arguments. The meta device has no autocast, so nothing changes there."""
    # torch.amp.is_autocast_available would answer for any device, but torch 2.11 cannot compile a call of it.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def without_autocast(function: Callable[Params, Result]) -> Callable[Params, Result]:
    @functools.wraps(function)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        device = next(a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        with autocast_off(device):
            return function(*args, **kwargs)

    return run


def statistics_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any of the tensors is float64, otherwise float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
