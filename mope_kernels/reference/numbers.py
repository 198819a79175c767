"""Helpers shared by the reference implementations: the dtype of statistics, and disabling autocast."""

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
    """Return a context that disables autocast on `device`. It does nothing on the meta device, which has no autocast."""
    # torch.amp.is_autocast_available would work for any device, but torch 2.11 cannot compile a call to it.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def without_autocast(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Wrap a function so that it runs with autocast disabled on the device of its first tensor argument."""

    @functools.wraps(function)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        device = next(a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        with autocast_off(device):
            return function(*args, **kwargs)

    return run


def statistics_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any of the tensors is float64, otherwise float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
