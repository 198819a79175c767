"""Layers built on the fused ops. Requires only torch and mope_kernels."""

from .adapter import ExpertAdapter
from .attention import FrozenAttention, MoPEAttention, PromptBank
from .packing import Packing
from .prompts import InputPrompts, PromptExperts
from .router import ComplementaryRouter, MultimodalRouter, Router
from .swin import BlockPrompts, MoPESwinBlock, PromptedPatchMerging

__all__ = [
    "BlockPrompts",
    "ComplementaryRouter",
    "ExpertAdapter",
    "FrozenAttention",
    "InputPrompts",
    "MoPEAttention",
    "MoPESwinBlock",
    "MultimodalRouter",
    "Packing",
    "PromptBank",
    "PromptExperts",
    "PromptedPatchMerging",
    "Router",
]
