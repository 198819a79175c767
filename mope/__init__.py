"""Mixture-of-Prompt-Experts fusion models over frozen transformers.

The names below are imported on first use, so `import mope` is fast, and `mope.fused` does not need transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mope.lazy import lazily
from mope.registering import register_with_transformers

if TYPE_CHECKING:
    from mope.backbones import register_backbone
    from mope.fusion import MoPEConfig, MoPEForClassification
    from mope_kernels import __version__

    from .graphs import CudaGraphRunner
    from .modalities import register_modality
    from .released.acceleration import accelerate
    from .released.encoder import load_released_encoder
    from .released.loading import load_released_checkpoint
    from .serving import MoPEServer
    from .training.graphs import GraphedStep

__all__ = [
    "CudaGraphRunner",
    "GraphedStep",
    "MoPEConfig",
    "MoPEForClassification",
    "MoPEServer",
    "__version__",
    "accelerate",
    "load_released_checkpoint",
    "load_released_encoder",
    "register_backbone",
    "register_modality",
]

# Modules that register file types and modes with training, imported on first use, see `mope.training.extensions`.
EXTENSIONS = ("mope.released.opening",)

_RELEASED = ("accelerate", "load_released_checkpoint", "load_released_encoder")
__getattr__ = lazily(
    __name__,
    dict.fromkeys(__all__, ".fusion")
    | dict.fromkeys(_RELEASED, ".released")
    | {
        "__version__": "mope_kernels",
        "CudaGraphRunner": ".graphs",
        "GraphedStep": ".training.graphs",
        "MoPEServer": ".serving",
        "register_backbone": ".backbones",
        "register_modality": ".modalities",
    },
)

register_with_transformers()
