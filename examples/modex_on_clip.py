"""Attach routed adapters (ModeX) to CLIP, train them with the contrastive loss, save them, and remove and reload them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from mope.modex import Adapters, ModeXConfig, attach


def small_clip() -> CLIPModel:
    """Build a small CLIP with random weights. For a pretrained one: CLIPModel.from_pretrained("openai/clip-vit-base-patch32")."""
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    text = CLIPTextConfig(**size, vocab_size=100, max_position_embeddings=16, bos_token_id=98, eos_token_id=99)
    vision = CLIPVisionConfig(**size, image_size=32, patch_size=8)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32))


def main() -> None:
    torch.manual_seed(0)
    clip = small_clip().eval()
    words = torch.randint(98, (8, 10))
    words[:, -1] = 99
    batch = {"pixel_values": torch.randn(8, 3, 32, 32), "input_ids": words, "attention_mask": torch.ones_like(words)}
    before = clip(**batch).logits_per_image

    # Plain adapters in the image tower; in the text tower, adapters that mix three experts for each word.
    sites = {"visual_msa": "plain", "visual_ffn": "plain", "textual_msa": "expert", "textual_ffn": "expert"}
    adapters = attach(clip, ModeXConfig(sites=sites, bottleneck=8, num_experts=3))
    print("unchanged at the start:", torch.equal(clip(**batch).logits_per_image, before))

    trained = [p for p in clip.parameters() if p.requires_grad]
    print(f"trained: {sum(p.numel() for p in trained):,} of {sum(p.numel() for p in clip.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    for step in range(40):
        loss = clip(**batch, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.3f}")

    with torch.no_grad(), adapters.routes() as routes:
        after = clip(**batch).logits_per_image
    # For each adapter, `routes` holds a list with the weights (B,L,experts) of each call.
    name = next(name for name in routes if name.endswith("textual_ffn"))
    print(f"{name}: experts of the first word:", [round(w, 2) for w in routes[name][0][0, 0].tolist()])

    with tempfile.TemporaryDirectory() as folder:
        adapters.save_pretrained(folder)
        print("saved:", sorted(file.name for file in Path(folder).iterdir()))
        adapters.detach()
        print("unchanged after detaching:", torch.equal(clip(**batch).logits_per_image, before))
        Adapters.from_pretrained(clip, folder)
        print("same outputs with the adapters again:", torch.allclose(clip(**batch).logits_per_image, after, atol=1e-5))


if __name__ == "__main__":
    main()
