"""How prompts get into the encoders of transformers: an adapter for each architecture, in a file for each family."""

from . import bert, clip, swin, vit
from .attaching import Attachment, PromptedLayer, attach, base_model, original_state_dict, wrapped_by_peft
from .base import Architecture, BackboneAdapter, VisionAdapter
from .bert import BertAdapter, RobertaAdapter
from .clip import CLIPVisionAdapter
from .registry import architecture_for, find_adapter, find_architecture, known, register_backbone, unregister_backbone
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
    "PromptedLayer",
    "RobertaAdapter",
    "SwinArchitecture",
    "ViTAdapter",
    "VisionAdapter",
    "architecture_for",
    "attach",
    "base_model",
    "bert",
    "clip",
    "find_adapter",
    "find_architecture",
    "known",
    "original_state_dict",
    "register_backbone",
    "swin",
    "swin_model_from_checkpoint",
    "swin_state_dict",
    "transformers_state_dict",
    "unregister_backbone",
    "vit",
    "wrapped_by_peft",
]
