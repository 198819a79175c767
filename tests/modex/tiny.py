"""Tiny random transformers models, and a call for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from mope.modex import Adapters, ModeXConfig, attach

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
IMAGE = dict(image_size=8, patch_size=4, num_channels=3)
TEXT = dict(vocab_size=50, max_position_embeddings=16, pad_token_id=0)
BATCH, TOKENS = 3, 5
EXPERTS = dict.fromkeys(("textual_msa", "textual_ffn", "cross_msa", "cross_ffn"), "expert")


def _pair(config_class: Any, vision: Any, text: Any, **text_options: Any) -> Any:
    return config_class(
        vision_config=vision(**SIZES, **IMAGE).to_dict(),
        text_config=text(**SIZES, **TEXT, **text_options).to_dict(),
        projection_dim=16,
    )


def _blip(name: str) -> nn.Module:
    tokens = dict(encoder_hidden_size=32, bos_token_id=1, eos_token_id=2, sep_token_id=2)
    config = _pair(transformers.BlipConfig, transformers.BlipVisionConfig, transformers.BlipTextConfig, **tokens)
    return getattr(transformers, name)(config)


def _clip() -> nn.Module:
    tokens = dict(bos_token_id=1, eos_token_id=2)
    return transformers.CLIPModel(
        _pair(transformers.CLIPConfig, transformers.CLIPVisionConfig, transformers.CLIPTextConfig, **tokens)
    )


def _siglip() -> nn.Module:
    vision, text = (
        transformers.SiglipVisionConfig(**SIZES, **IMAGE),
        transformers.SiglipTextConfig(**SIZES, **TEXT, projection_size=32),
    )
    return transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision.to_dict(), text_config=text.to_dict()))


def _bert(**options: Any) -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SIZES, **TEXT, **options), add_pooling_layer=False)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SIZES, **IMAGE), add_pooling_layer=False),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, **IMAGE)),
    "bert": _bert,
    "bert_cross": lambda: _bert(is_decoder=True, add_cross_attention=True),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**SIZES, **TEXT), add_pooling_layer=False),
    "clip": _clip,
    "siglip": _siglip,
    "blip_retrieval": lambda: _blip("BlipForImageTextRetrieval"),
    "blip_vqa": lambda: _blip("BlipForQuestionAnswering"),
    "blip_captioning": lambda: _blip("BlipForConditionalGeneration"),
}
CONFIGS = {
    "vit": ModeXConfig.preset("vit"),
    "dinov2": ModeXConfig.preset("vit"),
    "bert": ModeXConfig.preset("bert"),
    "roberta": ModeXConfig.preset("bert"),
    "bert_cross": ModeXConfig(sites=EXPERTS),
    "clip": ModeXConfig.preset("clip"),
    "siglip": ModeXConfig.preset("clip"),
    "blip_retrieval": ModeXConfig.preset("blip"),
    "blip_vqa": ModeXConfig.preset("blip", sites={"visual_msa": "plain", "visual_ffn": "expert", **EXPERTS}),
    "blip_captioning": ModeXConfig.preset("blip"),
}


def model(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a model in evaluation mode, far from its initialisation, where weights are small and LayerNorms the identity."""
    made = MODELS[name]().to(dtype)
    shake(made.parameters())
    return made.eval()


@torch.no_grad()
def shake(parameters: Any, by: float = 0.15) -> None:
    for parameter in parameters:
        parameter.add_(by * torch.randn_like(parameter))


def inputs(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    pixels = {"pixel_values": torch.randn(BATCH, 3, 8, 8, dtype=dtype)}
    ids = torch.randint(3, 49, (BATCH, TOKENS))
    mask = torch.arange(TOKENS) < torch.tensor([TOKENS, 2, 4])[:, None]
    text = {"input_ids": ids, "attention_mask": mask.long()}
    if name in ("vit", "dinov2"):
        return pixels
    if name in ("bert", "roberta"):
        return text
    if name == "bert_cross":
        return {**text, "encoder_hidden_states": torch.randn(BATCH, 4, 32, dtype=dtype)}
    if name == "blip_vqa":
        return {**pixels, **text, "labels": ids}
    return {**pixels, **text}


def output(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """Return a tensor that depends on everything the model computes."""
    found = model(**given)
    names = ("logits_per_image", "itm_score", "loss", "logits", "last_hidden_state")
    return next(value for name in names if (value := getattr(found, name, None)) is not None)


def recompute(model: nn.Module, options: dict[str, Any] | None) -> None:
    """Turn on gradient checkpointing as transformers does: by the first name since version 6, by the second before."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def attached(name: str, **changes: Any) -> tuple[nn.Module, Adapters]:
    """Return a model with adapters that are far from their initial values."""
    made = model(name)
    adapters = attach(made, CONFIGS[name].replace(**changes))
    shake(adapters.parameters(), 0.3)
    return made, adapters
