"""Find a device by name."""

from __future__ import annotations

import torch


def find_device(name: str = "auto") -> torch.device:
    """Return the device of this name, and make a GPU the current device. "auto" is CUDA if available, else the CPU.

    Raises:
        ValueError: There is no such device, or it is the meta device, which cannot compute.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    # torch raises different errors depending on which backend it was built without.
    except (AssertionError, ModuleNotFoundError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"there is no {name} here") from error
    if device.type == "meta":
        raise ValueError("meta holds shapes and no numbers, so nothing can be computed there")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
