"""Prompt an encoder that the library does not support out of the box: SigLIP's image tower.

An adapter tells the library where the layers are, which projections attention uses, and how a block continues after attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, SiglipVisionConfig, SiglipVisionModel

import mope
from mope import MoPEConfig, MoPEForClassification
from mope.backbones import BackboneAdapter
from mope.fused import FrozenAttention
from mope.fused.padding import Padding


class SiglipAdapter(BackboneAdapter):
    """Adapter that lets the library insert prompts into a SiglipVisionModel."""

    modality = "vision"

    def layers(self, model: Any) -> nn.ModuleList:
        return model.encoder.layers

    def embed(self, model: Any, inputs: dict[str, Any], token_mask: Tensor | None) -> Tensor:
        return model.embeddings(inputs["pixel_values"])

    def attention(self, layer: Any) -> FrozenAttention:
        a = layer.self_attn
        return FrozenAttention(a.q_proj, a.k_proj, a.v_proj, a.out_proj, num_heads=a.num_heads, norm=layer.layer_norm1)

    def finish(self, layer: Any, hidden_states: Tensor, attention_output: Tensor) -> Tensor:
        hidden_states = hidden_states + attention_output
        return hidden_states + layer.mlp(layer.layer_norm2(hidden_states))

    def pool(self, model: Any, hidden_states: Tensor, padding: Padding) -> Tensor:
        # SigLIP has no class token. It pools all patches by attention with a trained query.
        return model.head(model.post_layernorm(hidden_states))


def main() -> None:
    torch.manual_seed(0)
    mope.register_backbone("siglip_vision_model", SiglipAdapter)

    # For a pretrained model: SiglipVisionModel.from_pretrained("google/siglip-base-patch16-224").
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    vision = SiglipVisionModel(SiglipVisionConfig(**size, image_size=32, patch_size=8)).eval()
    text = BertModel(BertConfig(**size, vocab_size=100)).eval()
    images, words = torch.randn(8, 3, 32, 32), torch.randint(1, 100, (8, 10))

    # Without prompts, the adapter must compute the same feature as transformers.
    alone = MoPEForClassification(MoPEConfig(method="image_only", num_labels=2), vision=vision)
    feature = alone.eval()(pixel_values=images).features
    alone.detach()
    print("largest difference from transformers:", (feature - vision(pixel_values=images).pooler_output).abs().max().item())

    model = MoPEForClassification(MoPEConfig(num_labels=2, num_experts=4, temperature=1.0), vision=vision, text=text)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
    labels = torch.arange(8) % 2
    for step in range(30):
        optimizer.zero_grad()
        loss = model(pixel_values=images, input_ids=words, labels=labels).loss
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
