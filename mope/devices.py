"""The device that somebody asks for by name."""

from __future__ import annotations

import torch


def find_device(name: str = "auto") -> torch.device:
    """The device of a name that torch knows; "auto" is CUDA where there is one, else the CPU. A GPU becomes the current one.

    Raises:
        ValueError: there is no such device here, or it computes nothing.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    # Torch raises another error for each thing that it was built without.
    except (AssertionError, ModuleNotFoundError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"there is no {name} here") from error
    if device.type == "meta":
        raise ValueError("meta holds shapes and no numbers, so nothing can be computed there")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
