"""Layers with the fused ops inside. Needs torch and mope_kernels only."""

from .attention import FrozenAttention, MoPEAttention, PromptBank
from .packing import Packing
from .prompts import InputPrompts, PromptExperts
from .router import ComplementaryRouter, MultimodalRouter, Router
from .swin import MoPESwinBlock, PromptedPatchMerging

__all__ = [
    "ComplementaryRouter",
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
