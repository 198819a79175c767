"""ModeX: adapters with experts mixed per token, attached to frozen transformers.

The public names are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mope.lazy import lazily

if TYPE_CHECKING:
    from .albef import AlbefConfig, AlbefModel
    from .attaching import Adapters, attach
    from .configuration import ModeXConfig
    from .modeling import ModeXForClassification

__all__ = [
    "Adapters",
    "AlbefConfig",
    "AlbefModel",
    "ModeXConfig",
    "ModeXForClassification",
    "attach",
]

__getattr__ = lazily(
    __name__,
    {
        "Adapters": ".attaching",
        "AlbefConfig": ".albef",
        "AlbefModel": ".albef",
        "ModeXConfig": ".configuration",
        "ModeXForClassification": ".modeling",
        "attach": ".attaching",
    },
)
