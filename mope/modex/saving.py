"""Saving and checking adapter tensors; adapter files contain no code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mope.fusion.checkpoint import compare_tensors
from mope.printing import first_of

WEIGHTS = "modex.safetensors"


def gather(tensor: Tensor) -> Tensor:
    """Gather a tensor that is sharded over processes; return other tensors unchanged."""
    # Tested by its method, because importing its class, DTensor, takes seconds.
    whole: Any = getattr(tensor, "full_tensor", None)
    return tensor if whole is None else whole()


def check_tensors(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Check that tensors have the names and shapes of those they replace, and are floating point.

    Raises:
        ValueError: If they do not; the message lists the differences.
    """
    found = compare_tensors(given, own)
    unfit = {*found.of_shape, *found.of_dtype}
    wrong = [f"{name} is missing" for name in found.missing]
    wrong += [f"{name} is unknown" for name in found.unknown]
    wrong += [
        f"{name} is {tuple(given[name].shape)} {given[name].dtype}, expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in unfit
    ]
    if wrong:
        raise ValueError(first_of(wrong, 10))
