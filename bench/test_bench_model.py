"""A whole fusion model, serving and one training step, beside the same model with its prompts concatenated by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from mope import MoPEConfig, MoPEForClassification
from mope.demo import plain

from .conftest import DEVICE


@dataclass(frozen=True)
class ModelShape:
    batch: int
    experts: int
    hidden: int = 768
    layers: int = 12
    image: int = 224
    tokens: int = 128


SHAPES = {
    "cuda": {
        "vit-b+bert-base-b16": ModelShape(16, experts=4),
        "vit-b+bert-base-b64": ModelShape(64, experts=4),
        "vit-b+bert-base-b64-k64": ModelShape(64, experts=64),
    },
    "cpu": {"vit-b+bert-base-2-layers-b8": ModelShape(8, experts=4, layers=2, tokens=32)},
}[DEVICE]


def build(shape: ModelShape) -> MoPEForClassification:
    torch.manual_seed(0)
    size = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden // 64,
        "intermediate_size": 4 * shape.hidden,
    }
    vision = ViTModel(ViTConfig(**size, image_size=shape.image), add_pooling_layer=False)
    text = BertModel(BertConfig(**size), add_pooling_layer=False)
    # Without noise, so that all ways compute the same.
    config = MoPEConfig(num_labels=101, num_experts=shape.experts, static_length=6, noise_std=0.0)
    return MoPEForClassification(config, vision=vision.to(DEVICE), text=text.to(DEVICE))


@pytest.mark.parametrize("training", [False, True], ids=["serving", "training-step"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("way", ["ours", "concatenated", "concatenated compiled"])
def test_model(time_checked, way, name, training):
    shape = SHAPES[name]
    model = build(shape)
    inputs = {
        "pixel_values": torch.randn(shape.batch, 3, shape.image, shape.image, device=DEVICE),
        "input_ids": torch.randint(5, 30000, (shape.batch, shape.tokens), device=DEVICE),
        "attention_mask": torch.ones(shape.batch, shape.tokens, dtype=torch.int64, device=DEVICE),
    }
    with torch.no_grad():
        exact = plain.forward(model, **inputs)[0].double()
    leaves = list(model.trainable_parameters()) if training else None
    concatenated = torch.compile(plain.forward) if way.endswith("compiled") else plain.forward
    banks = None
    if not training:
        with torch.no_grad():
            banks = model.build_banks()
    model.train(training)

    def run() -> torch.Tensor:
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=DEVICE == "cuda"):
            if way == "ours":
                return model(**inputs, banks=banks).logits
            return concatenated(model, **inputs)[0]

    time_checked(run, exact, f"model {name} {'training step' if training else 'serving'}", leaves)
