"""Support for users of the released code: its state dicts, checkpoints, live models and scripts.

The names below are imported on first use, because the command line imports `run` from here without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mope.lazy import lazily

if TYPE_CHECKING:
    from .acceleration import Acceleration, accelerate
    from .checkpoint import ReleasedCheckpoint, read_released_checkpoint
    from .encoder import load_released_encoder
    from .loading import load_released_checkpoint
    from .modex import load_released_state_dict

__all__ = [
    "Acceleration",
    "ReleasedCheckpoint",
    "accelerate",
    "load_released_checkpoint",
    "load_released_encoder",
    "load_released_state_dict",
    "read_released_checkpoint",
]

__getattr__ = lazily(
    __name__,
    {
        "Acceleration": ".acceleration",
        "accelerate": ".acceleration",
        "ReleasedCheckpoint": ".checkpoint",
        "load_released_checkpoint": ".loading",
        "load_released_encoder": ".encoder",
        "load_released_state_dict": ".modex",
        "read_released_checkpoint": ".checkpoint",
    },
)
