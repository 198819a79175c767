"""Fusion and layouts for BLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .bert import POST_NORM
from .clip import IN_TOWER
from .fused import FusedEncoder, register_fused
from .layouts import register_layout, register_pre_hook


def fuse(model: Any, inputs: Mapping[str, Mapping[str, Any]]) -> Tensor:
    """Run both parts on images and texts, giving the fused text (B,L,C). Token types are dropped, because BLIP has none."""
    image = model.vision_model(**inputs["vision"]).last_hidden_state
    visible = torch.ones(image.shape[:2], dtype=torch.long, device=image.device)
    text = {name: value for name, value in inputs["text"].items() if name != "token_type_ids"}
    states: Tensor = model.text_encoder(**text, encoder_hidden_states=image, encoder_attention_mask=visible).last_hidden_state
    return states


def embed_apart(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Look up the token ids and pass on a copy of the embeddings; a forward pre-hook of BLIP's text embeddings.

    For gradient checkpointing, transformers makes the embeddings a leaf that requires gradients, and BLIP adds to it in place.
    """
    ids = kwargs.get("input_ids")
    if args or ids is None or not torch.is_grad_enabled():
        return args, kwargs
    found = module.word_embeddings(ids)
    return args, {**kwargs, "input_ids": None, "inputs_embeds": found.clone() if found.requires_grad else found}


_FUSED = FusedEncoder(
    {"vision": "vision_model", "text": "text_encoder"},
    fuse,
    refused=("position_ids",),
    # The answer decoder of BLIP for VQA is never called.
    unread=("text_decoder.",),
)
for _name in ("BlipForImageTextRetrieval", "BlipForQuestionAnswering"):
    register_fused(_name, _FUSED)
register_layout("BlipTextLayer", POST_NORM)
register_layout("BlipEncoderLayer", IN_TOWER["visual"])
register_pre_hook("BlipTextEmbeddings", embed_apart)
