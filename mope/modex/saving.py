"""Files of adapters. Nothing in them is code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "modex.safetensors"


def gather(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process holds a part."""
    # Asked by its method: to import its class, DTensor, takes seconds.
    whole: Any = getattr(tensor, "full_tensor", None)
    return tensor if whole is None else whole()


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


def read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: give a folder that save_pretrained of the adapters wrote")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is no readable safetensors file: {error}") from error


def check_tensors(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """ValueError where tensors differ in names or shapes from those that they shall replace, or are not of floating point."""
    wrong = [f"{name} is missing" for name in own if name not in given]
    wrong += [f"{name} is unknown" for name in given if name not in own]
    wrong += [
        f"{name} is {tuple(given[name].shape)} {given[name].dtype}, expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in given and not (given[name].shape == tensor.shape and torch.is_floating_point(given[name]))
    ]
    if wrong:
        raise ValueError("; ".join(wrong[:10]) + (f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""))
