"""Fusion model with ALBEF's architecture: a ViT, BERT text layers, and further BERT layers that also attend to the image."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedConfig, PreTrainedModel, ViTConfig, ViTModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.bert.modeling_bert import BertLayer
from transformers.utils.generic import ModelOutput

from mope.backbones import FusedEncoder, register_fused


class AlbefConfig(PreTrainedConfig):
    """Sizes of an `AlbefModel`.

    Args:
        vision_config: `ViTConfig` of the ViT, or its values. Default: ViT-B/16 at 384 pixels.
        text_config: `BertConfig` of all text layers, or its values. Default: bert-base.
        fusion_layer: Number of text layers before the first that attends to the image.

    Raises:
        ValueError: If `fusion_layer` is out of range, or `text_config` is not the config of an encoder.
    """

    model_type = "albef"
    sub_configs = {"vision_config": ViTConfig, "text_config": BertConfig}  # noqa: RUF012 - as transformers declares it

    def __init__(
        self,
        vision_config: ViTConfig | dict[str, Any] | None = None,
        text_config: BertConfig | dict[str, Any] | None = None,
        fusion_layer: int = 6,
        **options: Any,
    ) -> None:
        if vision_config is None:
            vision_config = ViTConfig(image_size=384, layer_norm_eps=1e-6)
        self.vision_config = ViTConfig(**vision_config) if isinstance(vision_config, dict) else vision_config
        self.text_config = BertConfig(**(text_config or {})) if not isinstance(text_config, BertConfig) else text_config
        self.fusion_layer = fusion_layer
        layers = self.text_config.num_hidden_layers
        if not isinstance(fusion_layer, int) or not 0 <= fusion_layer < layers:
            raise ValueError(
                f"AlbefConfig: fusion_layer must leave at least one of the {layers} text layers for fusion, got {fusion_layer}"
            )
        if self.text_config.is_decoder or self.text_config.add_cross_attention:
            raise ValueError(
                "AlbefConfig: text_config must be that of an encoder, without is_decoder and add_cross_attention: "
                "fusion_layer determines which layers attend to the image"
            )
        super().__init__(**options)


@dataclass
class AlbefOutput(ModelOutput):
    """Output of an `AlbefModel`.

    Attributes:
        last_hidden_state: Hidden states of the text (B, T, C).
        image_embeds: Image features (B, P, C_v), or (B, N, P, C_v) with N images per text; None for text alone.
    """

    last_hidden_state: Tensor | None = None
    image_embeds: Tensor | None = None


class AlbefModel(PreTrainedModel):
    """Model that maps images and texts to the hidden states of the fused text.

    `vision` and `text` are transformers' `ViTModel` and `BertModel`. The text layers from `config.fusion_layer` on also have
    cross-attention. All text layers are bidirectional.
    """

    config: AlbefConfig
    config_class = AlbefConfig
    base_model_prefix = "albef"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViTEmbeddings", "ViTLayer", "BertEmbeddings", "BertLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__(config)
        self.vision = ViTModel(config.vision_config, add_pooling_layer=False)
        self.text = BertModel(config.text_config, add_pooling_layer=False)
        for i in range(config.fusion_layer, config.text_config.num_hidden_layers):
            self.text.encoder.layer[i] = _fusion_layer(config.text_config, i, config.vision_config.hidden_size)
        self.post_init()

    @classmethod
    def from_encoders(cls, vision: ViTModel, text: BertModel, *, fusion_layer: int | None = None) -> Self:
        """Build a fusion model with copies of the weights of two encoders.

        The text layers from `fusion_layer` on (default: the upper half) get new, randomly initialised cross-attention.

        Raises:
            ValueError: If an encoder lacks weights.
        """
        if fusion_layer is None:
            fusion_layer = text.config.num_hidden_layers // 2
        model: Any = cls(AlbefConfig(copy.deepcopy(vision.config), copy.deepcopy(text.config), fusion_layer))
        model.to(torch.promote_types(vision.dtype, text.dtype))
        for own, given in ((model.vision, vision), (model.text, text)):
            missing, _ = own.load_state_dict(given.state_dict(), strict=False)
            if lacking := [name for name in missing if ".crossattention." not in name]:
                raise ValueError(f"from_encoders: {type(given).__name__} lacks {', '.join(lacking[:5])}")
        return model

    def get_input_embeddings(self) -> nn.Module:
        return self.text.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text.set_input_embeddings(value)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> AlbefOutput:
        """Encode images and texts.

        Args:
            pixel_values: Images (B, channels, H, W), or (B, N, channels, H, W) with N images per text. Without images, only the
                text layers before the fusion run.
            input_ids: Token ids (B, T).
            attention_mask: Mask (B, T), 1 for tokens and 0 for padding.
            token_type_ids: Token types (B, T).
            interpolate_pos_encoding: Allow images of another size than the configured one.

        Raises:
            ValueError: If `input_ids` are missing, or shapes do not match.
        """
        if input_ids is None:
            raise ValueError("AlbefModel: input_ids are missing; for image features alone, use model.encode_image(pixel_values)")
        hidden_states, mask = self._text(input_ids, attention_mask, token_type_ids)
        if pixel_values is None:
            return AlbefOutput(last_hidden_state=hidden_states)
        image_embeds = self.encode_image(pixel_values, interpolate_pos_encoding)
        return AlbefOutput(self._fuse(hidden_states, image_embeds, mask), image_embeds)

    def encode_image(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Encode images (B, channels, H, W) as (B, P, C_v), or (B, N, channels, H, W) as (B, N, P, C_v).

        The first of the P tokens is the class token.
        """
        if pixel_values.dim() not in (4, 5):
            raise ValueError(
                "AlbefModel: pixel_values must be (B, channels, H, W), or (B, N, channels, H, W) with N images per text, "
                f"got {tuple(pixel_values.shape)}"
            )
        images = pixel_values.flatten(0, -4)
        embeds = self.vision(images, interpolate_pos_encoding=interpolate_pos_encoding).last_hidden_state
        return embeds.unflatten(0, pixel_values.shape[:-3])

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        """Run the text layers before the fusion on token ids (B, T), giving (B, T, C)."""
        return self._text(input_ids, attention_mask, token_type_ids)[0]

    def fuse(self, text_embeds: Tensor, image_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run the fusion layers on the results of `encode_text` (B, T, C) and `encode_image`, giving (B, T, C).

        With N images per text, each layer attends to one of them, in turn.
        """
        return self._fuse(text_embeds, image_embeds, self._mask(text_embeds, attention_mask))

    def _text(self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None) -> tuple[Tensor, Any]:
        """Return the encoded text (B, T, C), and its mask for reuse in the fusion, because building one may wait for the device."""
        hidden_states = self.text.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
        mask = self._mask(hidden_states, attention_mask)
        for layer in self.text.encoder.layer[: self.config.fusion_layer]:
            hidden_states = layer(hidden_states, mask)
        return hidden_states, mask

    def _fuse(self, hidden_states: Tensor, image_embeds: Tensor, mask: Any) -> Tensor:
        if len(hidden_states) != len(image_embeds):
            raise ValueError(f"AlbefModel: needs as many texts as images, got {len(hidden_states)} and {len(image_embeds)}")
        images = image_embeds.unbind(1) if image_embeds.dim() == 4 else (image_embeds,)
        for i, layer in enumerate(self.text.encoder.layer[self.config.fusion_layer :]):
            hidden_states = layer(hidden_states, mask, images[i % len(images)])
        return hidden_states

    def _mask(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Any:
        # Not typed in transformers: a tensor, None, or a backend-specific mask.
        return create_bidirectional_mask(config=self.config.text_config, inputs_embeds=hidden_states, attention_mask=attention_mask)


def _fusion_layer(config: BertConfig, index: int, vision_width: int) -> BertLayer:
    """Build a bidirectional BERT layer with cross-attention to tokens of another width."""
    # transformers adds cross-attention only to decoders, and reads these two fields only when it creates the layer.
    decoder = copy.deepcopy(config)
    decoder.is_decoder = decoder.add_cross_attention = True
    layer = BertLayer(decoder, layer_idx=index)
    attention, cross = layer.attention.self, layer.crossattention.self
    attention.is_causal = False
    # All layers share one config, so that `set_attn_implementation` affects them.
    attention.config = cross.config = config
    if vision_width != config.hidden_size:
        cross.key, cross.value = (nn.Linear(vision_width, cross.all_head_size) for _ in range(2))
    return layer


def _call(model: AlbefModel, inputs: Mapping[str, Mapping[str, Any]]) -> Tensor:
    """Run the model on images and texts, giving the fused text (B, T, C)."""
    states = model(**inputs["vision"], **inputs["text"]).last_hidden_state
    assert isinstance(states, Tensor)
    return states


register_fused(
    "AlbefModel", FusedEncoder({"vision": "vision", "text": "text"}, _call, refused=("position_ids",), model_class=AlbefModel)
)
