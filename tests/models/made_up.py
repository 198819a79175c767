"""A made-up modality (series of numbers) and an encoder for it whose blocks attend to the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

import mope
from mope.backbones import BackboneAdapter, unregister_backbone
from mope.fused import FrozenAttention
from mope.fused.padding import Padding
from mope.modalities import Modality, unregister_modality


@contextmanager
def registered() -> Iterator[None]:
    """Register the modality and its encoder for the duration of the context."""
    register()
    try:
        yield
    finally:
        unregister_modality("series")
        unregister_backbone("made_up_series")


class Series(Modality):
    name = "series"
    inputs = {"series_values": "values"}  # noqa: RUF012 - (B,L)


class SeriesConfig(PreTrainedConfig):
    model_type = "made_up_series"
    hidden_size: int = 16
    num_hidden_layers: int = 2


class SeriesModel(PreTrainedModel):
    config_class = SeriesConfig

    def __init__(self, config: SeriesConfig) -> None:
        super().__init__(config)
        self.embed = nn.Linear(1, config.hidden_size)
        width, parts = config.hidden_size, ("q", "k", "v", "o", "mlp")
        blocks = (nn.ModuleDict({part: nn.Linear(width, width) for part in parts}) for _ in range(config.num_hidden_layers))
        self.blocks = nn.ModuleList(blocks)
        self.post_init()


class SeriesAdapter(BackboneAdapter):
    modality, model_class, identity = "series", SeriesModel, ("hidden_size", "num_hidden_layers")

    def layers(self, model: Any) -> nn.ModuleList:
        return model.blocks

    def embed(self, model: Any, inputs: dict[str, Any], token_mask: Tensor | None) -> Tensor:
        return model.embed(inputs["values"][..., None])

    def attention(self, layer: Any) -> FrozenAttention:
        return FrozenAttention(layer["q"], layer["k"], layer["v"], layer["o"], num_heads=2)

    def finish(self, layer: Any, hidden_states: Tensor, attention_output: Tensor) -> Tensor:
        hidden_states = hidden_states + attention_output
        return hidden_states + torch.tanh(layer["mlp"](hidden_states))

    def pool(self, model: Any, hidden_states: Tensor, padding: Padding) -> Tensor:
        return padding.mean_of_tokens(hidden_states)


def register() -> None:
    mope.register_modality(Series())
    mope.register_backbone("made_up_series", SeriesAdapter)
