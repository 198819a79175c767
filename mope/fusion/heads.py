"""Parts that a configuration adds to the encoders, each built from a `MoPEConfig` and widths alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SwinModel

from mope.checks import check_labels
from mope.encoders.pooling import AttentionPooling
from mope.encoders.windowed import MoPESwinEncoder, encoder_for
from mope.fused import InputPrompts
from mope.fused.attention import default_bound
from mope.fused.mapper import mapper_layers
from mope.fusion.config import MoPEConfig


def router_options(config: MoPEConfig) -> dict[str, Any]:
    """Return the options of `mope.fused.router.make_router`."""
    return {
        "self_width": config.router_self_width,
        "cross_width": config.router_cross_width,
        "temperature": config.temperature,
        "noise_std": config.noise_std,
        "router_embedding": config.router_embedding,
        "renormalize": config.renormalize,
    }


def new_swin(config: MoPEConfig, name: str, model: SwinModel, cross_dim: int | None) -> MoPESwinEncoder:
    """Return a copy of a Swin Transformer that holds prompts, and routers and mapper if it is the main encoder.

    Args:
        config: Configuration of the fusion model.
        name: Name of the encoder in the fusion model.
        model: The Swin Transformer to copy.
        cross_dim: Width Cc of psi; None without complementary encoders.

    Raises:
        ValueError: The config requires something that a Swin Transformer does not support.
    """
    of_both: dict[str, Any] = {
        "bound": config.prompt_init_bound,
        "first_blocks": "own" if config.prompt_first_blocks else "pass",
        "prompt_dropout": config.prompt_dropout,
        "drop_block_prompts": config.drop_block_prompts,
        "prompt_owner": config.prompt_owner,
        "impl": config.impl,
    }
    if config.main != name:
        encoder = encoder_for(model, cross_dim=None, num_experts=0, static_length=config.cross_prompt_length, **of_both)
    else:
        if config.prompted_layers is not None:
            raise ValueError(
                "prompted_layers is not supported with a SwinModel, whose prompts pass from layer to layer: leave it None"
            )
        if config.maps and config.mapper_each:
            raise ValueError("mapper_each is not supported with a SwinModel as the main encoder: set it to False, or give a ViT")
        if config.blind_prompts:
            raise ValueError(
                "blind_prompts is not supported with a SwinModel as the main encoder, whose windows let prompts see all tokens: "
                "set main='text', or give a ViT as vision"
            )
        fuses = config.fusion.maps != "never" and config.prompt_depth == "deep"
        if fuses and not config.prompt_first_blocks and 1 in model.config.depths:
            raise ValueError(
                f"a stage of this SwinModel has one block only (depths={list(model.config.depths)}), which passes on the prompts "
                "that it receives, so the other modality would not reach it: set prompt_first_blocks=True"
            )
        encoder = encoder_for(
            model,
            cross_dim=cross_dim,
            num_experts=config.experts,
            prompt_length=config.prompt_length,
            static_length=config.static_length,
            use_mapped=config.maps,
            mapper_hidden=config.mapper_hidden,
            mapper_batchnorm=config.mapper_batchnorm is not False,
            mapper_last_gelu=config.mapper_last_gelu is not False,
            prompt_depth=config.prompt_depth,
            router=config.router_kind,
            router_scope=config.router_scope,
            **router_options(config),
            **of_both,
        )
    if name in config.finetuned:
        encoder.finetune()
    return encoder


class MapperOfEach(nn.ModuleList):
    """Mappers of the complementary modalities, one each: psi (B, sum of widths) -> mapped prompts (B, M, C)."""

    def __init__(self, mappers: Iterable[nn.Module], widths: Sequence[int]) -> None:
        super().__init__(mappers)
        self.widths = list(widths)

    def forward(self, psi: Tensor) -> Tensor:
        """Map each part of psi with its own mapper."""
        return torch.stack([mapper(part) for mapper, part in zip(self, psi.split(self.widths, -1), strict=True)], dim=1)


def new_mapper(config: MoPEConfig, widths: Sequence[int], dim: int) -> nn.Module:
    """Build the mapper: psi (B, sum of widths) -> the mapped prompt of all layers (B, dim), or one per width (B, M, dim)."""
    if len(widths) > 1:
        return MapperOfEach([new_mapper(config, [width], dim) for width in widths], widths)
    (cross_dim,) = widths
    gelu, hidden = bool(config.mapper_last_gelu), config.mapper_hidden
    if hidden:
        shared = mapper_layers(cross_dim, hidden, batchnorm=bool(config.mapper_batchnorm))
        return nn.Sequential(*shared, *mapper_layers(hidden, dim, gelu=gelu))
    return nn.Identity() if cross_dim == dim else mapper_layers(cross_dim, dim, gelu=gelu)


def new_input_prompts(config: MoPEConfig, norm: nn.Module | None, dim: int) -> InputPrompts:
    """Build shallow prompts for tokens of width `dim`; `norm` is the normalization before the first layer's attention, if any."""
    assert config.static_length is not None
    bound = config.prompt_init_bound or default_bound(norm, dim)
    return InputPrompts(config.static_length, dim, bound=bound, dropout=config.prompt_dropout, blind=config.blind_prompts)


def new_pooling(config: MoPEConfig, dim: int, num_heads: int, cross_dim: int | None) -> AttentionPooling:
    """Tokens of the main encoder (B,L,dim) -> its feature (B,dim). psi asks, unless each encoder has a head of its own."""
    return AttentionPooling(dim, num_heads, None if config.fusion.head == "mean" else cross_dim)


def new_head(config: MoPEConfig, width: int) -> nn.Sequential:
    """Build the classification head: features (B, width) -> logits (B, num_labels)."""
    if config.head == "linear":
        return nn.Sequential(nn.Linear(width, config.num_labels))
    return nn.Sequential(nn.Linear(width, config.head_hidden), nn.GELU(), nn.Linear(config.head_hidden, config.num_labels))


def task_loss(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """Compute the classification loss (), a mean over the batch, in float32 or wider.

    Args:
        logits: (B,num_labels).
        labels: (B,), or (B,num_labels) with problem_type "multi_label".
        problem_type: "single_label" (cross-entropy) or "multi_label" (binary cross-entropy).

    Raises:
        ValueError: Labels have another shape or dtype, or are empty; or, if they are on the CPU, they are outside the classes.
    """
    expected = logits.shape if problem_type == "multi_label" else logits.shape[:1]
    # cross_entropy would interpret labels (B,num_labels) as class probabilities.
    if labels.shape != expected:
        raise ValueError(f"labels must be {tuple(expected)} with problem_type={problem_type!r}, got {tuple(labels.shape)}")
    check_labels(labels, logits.shape[-1], problem_type)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if problem_type == "multi_label":
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return F.cross_entropy(logits, labels.long())
