"""The towers of CLIP."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mope.fused import FrozenAttention
from mope.fused.padding import Padding

from .base import VisionAdapter, interpolating
from .feed_forward import norm_and_mlp
from .registry import register_backbone


class CLIPVisionAdapter(VisionAdapter):
    interpolates = True

    def layers(self, model: Any) -> nn.ModuleList:
        return model.encoder.layers

    def embed(self, model: Any, inputs: dict[str, Any], token_mask: Tensor | None) -> Tensor:
        return model.pre_layrnorm(model.embeddings(inputs["pixel_values"], **interpolating(inputs)))

    def attention(self, layer: Any) -> FrozenAttention:
        a = layer.self_attn
        return FrozenAttention(a.q_proj, a.k_proj, a.v_proj, a.out_proj, a.num_heads, layer.layer_norm1)

    def finish(self, layer: Any, hidden_states: Tensor, attention_output: Tensor) -> Tensor:
        hidden_states, update = norm_and_mlp(hidden_states, attention_output, layer.layer_norm2, layer.mlp)
        return hidden_states + update

    def pool(self, model: Any, hidden_states: Tensor, padding: Padding) -> Tensor:
        """Return the class token's."""
        return padding.first_tokens(hidden_states)

    def normalize(self, model: Any, features: Tensor) -> Tensor:
        return model.post_layernorm(features)


register_backbone("clip_vision_model", CLIPVisionAdapter)
