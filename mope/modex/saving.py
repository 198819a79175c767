"""Files of adapters. Nothing in them is code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mope.fusion.checkpoint import compare_tensors
from mope.printing import first_of

WEIGHTS = "modex.safetensors"


def gather(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process holds a part."""
    # Asked by its method: to import its class, DTensor, takes seconds.
    whole: Any = getattr(tensor, "full_tensor", None)
    return tensor if whole is None else whole()


def check_tensors(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """ValueError where tensors differ in names or shapes from those that they shall replace, or are not of floating point."""
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
