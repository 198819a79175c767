"""Mixture-of-Prompt-Experts fusion models over frozen transformers.

The names below are imported on first use: `import mope` is quick, and `mope.fused` needs no transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mope.lazy import lazily

if TYPE_CHECKING:
    from mope_kernels import __version__

    from .graphs import CudaGraphRunner
    from .models import MoPEConfig, MoPEForClassification, register_backbone
    from .reference.acceleration import accelerate
    from .reference.encoder import load_reference_encoder
    from .reference.loading import load_reference_checkpoint
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
    "load_reference_checkpoint",
    "load_reference_encoder",
    "register_backbone",
]

_REFERENCE = ("accelerate", "load_reference_checkpoint", "load_reference_encoder")
__getattr__ = lazily(
    __name__,
    dict.fromkeys(__all__, ".models")
    | dict.fromkeys(_REFERENCE, ".reference")
    | {
        "__version__": "mope_kernels",
        "CudaGraphRunner": ".graphs",
        "GraphedStep": ".training.graphs",
        "MoPEServer": ".serving",
    },
)
