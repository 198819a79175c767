"""Adapters and layouts for ViT and DINOv2."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mope.fused import FrozenAttention
from mope.fused.padding import Padding

from .base import VisionAdapter, interpolating
from .feed_forward import norm_and_mlp
from .layouts import Layout, register_layout
from .registry import register_backbone


class ViTAdapter(VisionAdapter):
    """Adapter for ViT."""

    interpolates = True
    unreached = ("embeddings.mask_token",)
    unused, load_options = ("pooler.",), {"add_pooling_layer": False}

    def layers(self, model: Any) -> nn.ModuleList:
        return model.layers

    def embed(self, model: Any, inputs: dict[str, Any], token_mask: Tensor | None) -> Tensor:
        return model.embeddings(inputs["pixel_values"].to(model.dtype), **interpolating(inputs))

    def attention(self, layer: Any) -> FrozenAttention:
        a = layer.attention
        return FrozenAttention(a.q_proj, a.k_proj, a.v_proj, a.o_proj, a.num_attention_heads, layer.layernorm_before)

    def finish(self, layer: Any, hidden_states: Tensor, attention_output: Tensor) -> Tensor:
        hidden_states, update = norm_and_mlp(hidden_states, layer.dropout(attention_output), layer.layernorm_after, layer.mlp)
        return layer.dropout(update) + hidden_states

    def pool(self, model: Any, hidden_states: Tensor, padding: Padding) -> Tensor:
        """Return the features of the class tokens."""
        return padding.first_tokens(hidden_states)

    def normalize(self, model: Any, features: Tensor) -> Tensor:
        return model.layernorm(features)


class Dinov2Adapter(VisionAdapter):
    """Adapter for DINOv2."""

    # DINOv2 always interpolates, whether the flag is set or not.
    interpolates = True
    unreached = ("embeddings.mask_token",)

    def layers(self, model: Any) -> nn.ModuleList:
        return model.encoder.layer

    def embed(self, model: Any, inputs: dict[str, Any], token_mask: Tensor | None) -> Tensor:
        return model.embeddings(inputs["pixel_values"])

    def attention(self, layer: Any) -> FrozenAttention:
        a = layer.attention
        if hasattr(a, "q_proj"):
            return FrozenAttention(a.q_proj, a.k_proj, a.v_proj, a.o_proj, a.num_attention_heads, layer.norm1)
        # transformers < 5.23
        inner = a.attention
        return FrozenAttention(inner.query, inner.key, inner.value, a.output.dense, inner.num_attention_heads, layer.norm1)

    def finish(self, layer: Any, hidden_states: Tensor, attention_output: Tensor) -> Tensor:
        attention_output = layer.drop_path(layer.layer_scale1(attention_output))
        hidden_states, update = norm_and_mlp(hidden_states, attention_output, layer.norm2, layer.mlp)
        return layer.drop_path(layer.layer_scale2(update)) + hidden_states

    def pool(self, model: Any, hidden_states: Tensor, padding: Padding) -> Tensor:
        """Return the features of the class tokens."""
        return padding.first_tokens(hidden_states)

    def normalize(self, model: Any, features: Tensor) -> Tensor:
        return model.layernorm(features)

    def stable_name(self, name: str) -> str:
        for old, new in (("query", "q"), ("key", "k"), ("value", "v")):
            name = name.replace(f".attention.attention.{old}.", f".attention.{new}_proj.")
        return name.replace(".attention.output.dense.", ".attention.o_proj.")


register_backbone("vit", ViTAdapter)
register_backbone("dinov2", Dinov2Adapter)
register_layout("ViTLayer", Layout("visual", "attention", "mlp", "layernorm_before"))
register_layout("Dinov2Layer", Layout("visual", "layer_scale1", "layer_scale2", "norm1"))
