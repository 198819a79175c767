"""Fusion models over frozen transformers."""

from .backbones import Attachment, BackboneAdapter, PromptedLayer, attach, register_backbone
from .configuration import MoPEConfig
from .modeling import MoPEForClassification, MoPEOutput

__all__ = [
    "Attachment",
    "BackboneAdapter",
    "MoPEConfig",
    "MoPEForClassification",
    "MoPEOutput",
    "PromptedLayer",
    "attach",
    "register_backbone",
]
