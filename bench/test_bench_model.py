"""A whole fusion model, serving and one training step, beside the same model with its prompts concatenated by hand."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from mope import MoPEConfig, MoPEForClassification
from mope.benchmark.problem import Outputs, Problem
from mope.demo import plain

from .conftest import DEVICE, DTYPE

HALF = DTYPE.itemsize == 2


@dataclass(frozen=True)
class ModelCase:
    """ViT and BERT of the same size."""

    shape: str
    batch: int
    experts: int = 4
    hidden: int = 768
    layers: int = 12
    image: int = 224
    tokens: int = 128
    training: bool = False
    op: str = "model"

    def __str__(self) -> str:
        return f"{self.shape} {'training step' if self.training else 'serving'}"


SHAPES = {
    "tiny": [ModelCase("tiny", 2, hidden=64, layers=1, image=32, tokens=4)],
    "cpu": [ModelCase("vit-b+bert-base-2-layers-b8", 8, layers=2, tokens=32)],
    "cuda": [
        ModelCase("vit-b+bert-base-b16", 16),
        ModelCase("vit-b+bert-base-b64", 64),
        ModelCase("vit-b+bert-base-b64-k64", 64, experts=64),
    ],
}


class Concatenated(nn.Module):
    """The model written by hand, under autocast on a GPU."""

    def __init__(self, model: MoPEForClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Outputs:
        with torch.autocast(DEVICE.type, dtype=DTYPE, enabled=HALF and pixel_values.dtype != torch.float64):
            return plain.forward(self.model, pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask)[:1]


def model_of(case: ModelCase) -> MoPEForClassification:
    torch.manual_seed(0)
    size = {
        "hidden_size": case.hidden,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.hidden // 64,
        "intermediate_size": 4 * case.hidden,
    }
    vision = ViTModel(ViTConfig(**size, image_size=case.image), add_pooling_layer=False)
    text = BertModel(BertConfig(**size), add_pooling_layer=False)
    # Without noise, so that all ways compute the same.
    config = MoPEConfig(num_labels=101, num_experts=case.experts, static_length=6, noise_std=0.0)
    return MoPEForClassification(config, vision=vision.to(DEVICE), text=text.to(DEVICE)).train(case.training)


@functools.lru_cache(maxsize=1)
def build(case: ModelCase) -> Problem:
    model, twin = model_of(case), model_of(case)
    concatenated, banks = Concatenated(model), None
    if not case.training:
        with torch.no_grad():
            banks = model.build_banks()
    inputs = {
        "pixel_values": torch.randn(case.batch, 3, case.image, case.image, device=DEVICE),
        "input_ids": torch.randint(5, 30000, (case.batch, case.tokens), device=DEVICE),
        "attention_mask": torch.ones(case.batch, case.tokens, dtype=torch.int64, device=DEVICE),
    }
    parameters = {f"model.{n}": p for n, p in model.named_parameters() if p.requires_grad} if case.training else {}

    def ours(pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Outputs:
        with torch.autocast(DEVICE.type, dtype=DTYPE, enabled=HALF):
            return (model(pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask, banks=banks).logits,)

    def by_hand(pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Outputs:
        return concatenated(pixel_values, input_ids, attention_mask)

    def definition(pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, **parameters: Tensor) -> Outputs:
        module = Concatenated(twin.to(pixel_values.dtype))
        return torch.func.functional_call(module, parameters, (pixel_values, input_ids, attention_mask))

    return Problem(
        inputs | parameters,
        {"ours": ours, "concatenated": by_hand},
        definition,
        ", ".join(sorted({answer.impl or "" for answer in plain.explain_ops(model).values()})),
        None,
        DTYPE,
        tuple(parameters),
        (torch.randn(case.batch, 101, device=DEVICE),),
    )


WAYS = ("ours", "concatenated", "concatenated compiled")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    where = "tiny" if metafunc.config.getoption("--tiny") else DEVICE.type
    found = [replace(case, training=training) for case in SHAPES[where] for training in (False, True)]
    pairs = [(case, way) for case in found for way in WAYS]
    metafunc.parametrize("model_case, way", pairs, ids=[f"{case} {way}".replace(" ", "-") for case, way in pairs])


def test_model(measured, model_case, way):
    measured(model_case, way, build, stage="model")
