"""Layers with the fused ops inside. Needs torch and mope_kernels only."""

from .attention import FrozenAttention, MoPEAttention, PromptBank
from .prompts import PromptExperts
from .router import MultimodalRouter

__all__ = ["FrozenAttention", "MoPEAttention", "MultimodalRouter", "PromptBank", "PromptExperts"]
