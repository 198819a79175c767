"""BLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .fused import FusedEncoder, register_fused


def fuse(model: Any, inputs: Mapping[str, Mapping[str, Any]]) -> Tensor:
    """Run both parts: images and texts -> the fused text (B,L,C). BLIP has no token types, and reads none."""
    image = model.vision_model(**inputs["vision"]).last_hidden_state
    visible = torch.ones(image.shape[:2], dtype=torch.long, device=image.device)
    text = {name: value for name, value in inputs["text"].items() if name != "token_type_ids"}
    states: Tensor = model.text_encoder(**text, encoder_hidden_states=image, encoder_attention_mask=visible).last_hidden_state
    return states


_FUSED = FusedEncoder(
    {"vision": "vision_model", "text": "text_encoder"},
    fuse,
    # The part of BLIP for VQA that writes answers: nothing in it is called.
    unread=("text_decoder.",),
)
for _name in ("BlipForImageTextRetrieval", "BlipForQuestionAnswering"):
    register_fused(_name, _FUSED)
