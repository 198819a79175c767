"""Set the order of windows: that of the released code mixes the items of a batch."""

from __future__ import annotations

from mope.fused import MoPESwinBlock
from mope.fusion.base import FusionModel

MODES = ("released", "instance")


def set_prompt_owner(model: FusionModel, mode: str) -> str:
    """Set the mode of a model with a Swin Transformer to "released" or "instance", and return the previous mode.

    Raises:
        ValueError: The mode is unknown, or the model has no windows.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    blocks = [module for module in model.modules() if isinstance(module, MoPESwinBlock)]
    if not blocks:
        raise ValueError(
            "modes are two orders of windows, which only a Swin Transformer has: each item of this model uses its own prompts"
        )
    before: str = model.config.prompt_owner
    model.config = model.config.replace(prompt_owner=mode)
    for block in blocks:
        block.prompt_owner = mode
    return before
