"""Support for prompts and adapters in transformers encoders, one file per model family."""

from . import bert, blip, clip, swin, vit
from .attaching import Attachment, PromptedLayer, attach, base_model, original_state_dict, wrapped_by_peft
from .base import Architecture, BackboneAdapter, VisionAdapter
from .bert import BertAdapter, RobertaAdapter
from .clip import CLIPVisionAdapter
from .fused import FusedEncoder, find_fused, fused_class, known_fused, register_fused
from .layouts import Layout, known_layouts, layout_of, pre_hook_of, register_layout, register_pre_hook, unregister_layout
from .registry import (
    architecture_for,
    find_adapter,
    find_architecture,
    known,
    register_backbone,
    register_towers,
    tower_class,
    unregister_backbone,
)
from .swin import SwinArchitecture
from .swin_weights import swin_model_from_checkpoint, swin_state_dict, transformers_state_dict
from .vit import Dinov2Adapter, ViTAdapter

__all__ = [
    "Architecture",
    "Attachment",
    "BackboneAdapter",
    "BertAdapter",
    "CLIPVisionAdapter",
    "Dinov2Adapter",
    "FusedEncoder",
    "Layout",
    "PromptedLayer",
    "RobertaAdapter",
    "SwinArchitecture",
    "ViTAdapter",
    "VisionAdapter",
    "architecture_for",
    "attach",
    "base_model",
    "bert",
    "blip",
    "clip",
    "find_adapter",
    "find_architecture",
    "find_fused",
    "fused_class",
    "known",
    "known_fused",
    "known_layouts",
    "layout_of",
    "original_state_dict",
    "pre_hook_of",
    "register_backbone",
    "register_fused",
    "register_layout",
    "register_pre_hook",
    "register_towers",
    "swin",
    "swin_model_from_checkpoint",
    "swin_state_dict",
    "tower_class",
    "transformers_state_dict",
    "unregister_backbone",
    "unregister_layout",
    "vit",
    "wrapped_by_peft",
]
