"""What users of the released code have: its state dicts, checkpoints, live models and scripts.

The names below are imported on first use: the command line takes `run` from here before it needs torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mope.lazy import lazily

if TYPE_CHECKING:
    from .acceleration import Acceleration, accelerate
    from .checkpoint import ReferenceCheckpoint, read_released_checkpoint
    from .encoder import load_released_encoder
    from .loading import load_released_checkpoint

__all__ = [
    "Acceleration",
    "ReferenceCheckpoint",
    "accelerate",
    "load_released_checkpoint",
    "load_released_encoder",
    "read_released_checkpoint",
]

__getattr__ = lazily(
    __name__,
    {
        "Acceleration": ".acceleration",
        "accelerate": ".acceleration",
        "ReferenceCheckpoint": ".checkpoint",
        "load_released_checkpoint": ".loading",
        "load_released_encoder": ".encoder",
        "read_released_checkpoint": ".checkpoint",
    },
)
