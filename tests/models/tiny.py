"""Tiny random backbones of all supported architectures, and a plain implementation that runs them with prompts."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from mope import MoPEConfig, MoPEForClassification

SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2)
IMAGE = dict(image_size=8, patch_size=4, num_channels=1)
TEXT = dict(vocab_size=50, intermediate_size=48, max_position_embeddings=16, type_vocab_size=2, pad_token_id=1)
BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SIZES, **IMAGE, intermediate_size=48)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, **IMAGE, mlp_ratio=2, drop_path_rate=0.5)),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES, **IMAGE, intermediate_size=48)),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES, **TEXT)),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**SIZES, **TEXT)),
}
VISION, TEXTS = ("vit", "dinov2", "clip"), ("bert", "roberta")
BATCH, TOKENS, LENGTHS = 5, 7, (7, 3, 2, 4, 7)


def backbone(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a model far from its initialisation, where weights are small, biases zero and LayerNorms the identity."""
    model = BACKBONES[name]().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.train()


@torch.no_grad()
def counted(model: nn.Module) -> nn.Module:
    """Set weights without random numbers, so that they are the same in every version of torch."""
    for parameter in model.parameters():
        parameter.copy_((torch.arange(parameter.numel()) % 64 / 64).view(parameter.shape))
    return model


def inputs(dtype: torch.dtype = torch.float64, lengths: tuple[int, ...] = LENGTHS, side: str = "right") -> dict[str, Tensor]:
    """Return a padded batch; the padding token is 1, as RoBERTa's embeddings expect."""
    ids = torch.randint(2, 50, (BATCH, TOKENS))
    positions = torch.arange(TOKENS)
    position = positions if side == "right" else positions.flip(0)
    mask = position < torch.tensor(lengths)[:, None]
    pixels = torch.randn(BATCH, 1, 8, 8, dtype=dtype)
    return {"pixel_values": pixels, "input_ids": ids.where(mask, 1), "attention_mask": mask.long()}


def fusion(
    vision: str | None = "vit", text: str | None = "bert", dtype: torch.dtype = torch.float64, **options: Any
) -> MoPEForClassification:
    config = MoPEConfig(
        **{"num_labels": 3, "num_experts": 4, "prompt_length": 2, "static_length": 3, "mapper_hidden": 16, **options}
    )
    encoders = {"vision": vision, "text": text}
    return MoPEForClassification(
        config, **{m: backbone(name, dtype) for m, name in encoders.items() if name and m in config.modalities}
    ).to(dtype)


def takes_a_mask(layer: nn.Module) -> bool:
    """Return whether the layer accepts a mask; DINOv2's does not in older versions of transformers."""
    return len(inspect.signature(layer.forward).parameters) > 1


class Plain:
    """Reference fusion model: prompts are prepended to the tokens of each layer of the original backbones.

    In a ViT or BERT block, tokens interact only through attention, and each attends to the whole input. Running a block on
    [prompts; tokens] therefore gives the tokens the same result as using the prompts as extra keys and values. The block's
    outputs for the prompts themselves are dropped.
    """

    def __init__(self, model: MoPEForClassification) -> None:
        self.model, self.config = model, model.config
        twin = copy.deepcopy(model)
        twin.detach()
        self.backbones = {m: twin.backbone(m).eval() for m in model.config.modalities}

    def __call__(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        top_k: int | None = None,
    ) -> Tensor:
        given = {"vision": pixel_values, "text": input_ids}
        masks = {"vision": None, "text": attention_mask}
        main, *other = self.config.modalities
        psi = mapped = None
        if other:
            psi = self.encode(other[0], given[other[0]], masks[other[0]], self.model.cross_blocks, None, None, None)
        if self.model.mapper is not None:
            mapped = self.model.mapper(psi)[:, None]
        feature = self.encode(main, given[main], masks[main], self.model.blocks, psi, mapped, top_k)
        return self.model.head(torch.cat([feature, psi], -1) if self.config.method == "late_concat" else feature)

    def encode(
        self,
        modality: str,
        given: Tensor,
        mask: Tensor | None,
        blocks: Any,
        psi: Tensor | None,
        mapped: Tensor | None,
        top_k: int | None,
    ) -> Tensor:
        model: Any = self.backbones[modality]
        kind = model.config.model_type
        x = model.embeddings(given)
        if kind == "clip_vision_model":
            x = model.pre_layrnorm(x)
        visible = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        layers = model.layers if kind == "vit" else model.encoder.layers if kind == "clip_vision_model" else model.encoder.layer
        prompted = (
            self.config.prompted_layers if blocks is self.model.blocks and self.config.prompted_layers else range(len(layers))
        )
        block_of = dict(zip(sorted(i % len(layers) for i in prompted), blocks, strict=False))
        for i, layer in enumerate(layers):
            prompts = self.prompts(block_of[i], x, visible, psi, mapped, top_k) if i in block_of else x[:, :0]
            rows = torch.cat([prompts, x], 1)
            keys = torch.cat([visible.new_ones(prompts.shape[:2]), visible], 1)
            bias = torch.zeros(keys.shape, dtype=x.dtype).masked_fill(~keys, -1e30)[:, None, None]
            x = self.run(layer, rows, None if mask is None else bias)[:, prompts.shape[1] :]
        cls = x[:, 0]
        return (
            model.post_layernorm(cls)
            if kind == "clip_vision_model"
            else model.layernorm(cls)
            if hasattr(model, "layernorm")
            else cls
        )

    @staticmethod
    def run(layer: Any, rows: Tensor, bias: Tensor | None) -> Tensor:
        return layer(rows, bias) if takes_a_mask(layer) else layer(rows)

    @staticmethod
    def prompts(block: Any, x: Tensor, visible: Tensor, psi: Tensor | None, mapped: Tensor | None, top_k: int | None) -> Tensor:
        parts = [] if block.static is None else [block.static.expand(len(x), -1, -1)]
        parts += [] if mapped is None else [mapped]
        if block.router is not None:
            router = block.router
            pooled = (x * visible[..., None]).sum(1) / visible.sum(1, keepdim=True)
            query = torch.cat([router.self_projection(pooled), router.cross_projection(psi)], -1)
            weights = (query @ router.expert_embedding / router.temperature).softmax(-1)
            if top_k is not None:
                weights = torch.where(weights >= weights.topk(top_k).values[:, -1:], weights, 0)
            parts.append(torch.einsum("bk,kpc->bpc", weights, block.experts.prompts))
        return torch.cat(parts, 1)
