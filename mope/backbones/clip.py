"""Adapters and layouts for the towers of CLIP and SigLIP."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mope.fused import FrozenAttention
from mope.fused.padding import Padding

from .base import VisionAdapter, interpolating
from .feed_forward import norm_and_mlp
from .layouts import Layout, register_layout
from .registry import register_backbone, register_towers

IN_TOWER = {modality: Layout(modality, "self_attn", "mlp", "layer_norm1") for modality in ("visual", "textual")}


class CLIPVisionAdapter(VisionAdapter):
    """Adapter for CLIP's vision tower."""

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
        """Return the features of the class tokens."""
        return padding.first_tokens(hidden_states)

    def normalize(self, model: Any, features: Tensor) -> Tensor:
        return model.post_layernorm(features)


def _in_tower(layer: nn.Module) -> Layout:
    """Return the layout of a layer. Both towers use the same class; the layer's config tells which tower it belongs to."""
    config = getattr(getattr(layer, "self_attn", None), "config", None)
    return IN_TOWER["textual" if getattr(config, "model_type", "").endswith("_text_model") else "visual"]


register_backbone("clip_vision_model", CLIPVisionAdapter)
register_towers("clip", vision="CLIPVisionModel")
for _name in ("CLIPEncoderLayer", "SiglipEncoderLayer"):
    register_layout(_name, _in_tower)
