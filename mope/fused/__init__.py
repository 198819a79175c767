"""Layers with the fused ops inside. Needs torch and mope_kernels only."""

from .attention import FrozenAttention, MoPEAttention, PromptBank
from .prompts import PromptExperts
from .router import MultimodalRouter
from .swin import MoPESwinBlock, PromptedPatchMerging

__all__ = [
    "FrozenAttention",
    "MoPEAttention",
    "MoPESwinBlock",
    "MultimodalRouter",
    "PromptBank",
    "PromptExperts",
    "PromptedPatchMerging",
]
