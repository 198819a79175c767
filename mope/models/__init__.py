"""Fusion models over frozen transformers."""

from .backbones import Attachment, BackboneAdapter, PromptedLayer, attach, register_backbone
from .configuration import MoPEConfig
from .modeling import MoPEForClassification, MoPEOutput
from .presets import PRESETS
from .swin_weights import swin_model_from_checkpoint

__all__ = [
    "PRESETS",
    "Attachment",
    "BackboneAdapter",
    "MoPEConfig",
    "MoPEForClassification",
    "MoPEOutput",
    "PromptedLayer",
    "attach",
    "register_backbone",
    "swin_model_from_checkpoint",
]
