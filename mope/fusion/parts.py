"""The parts of a `MoPEConfig`: router, prompts, mapper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mope.fusion.protocol import with_fields_named


@with_fields_named()
@dataclass(frozen=True)
class RouterConfig:
    """How experts are chosen.

    Args:
        kind: "multimodal", softmax(q K / temperature + noise) with q = [W_self pool(x); W_cross psi]; or "complementary",
            softmax((W psi + b) / temperature + noise).
        scope: "layer", a router for each prompted layer; "shared", one for all, which cannot see the tokens of a Swin Transformer;
            "released", one for each, but one for the first two blocks of a Swin Transformer if both are prompted.
        temperature, noise_std: of the router; noise only in training. noise_std=None: 1 / num_experts^2.
        self_width, cross_width: widths of the two parts of the router's query; `self_width=0` routes by psi only.
        embedding: K, "frozen" or "learned".
        renormalize: divide the weights of the selected experts by their sum.
        train_top_k, eval_top_k: selected experts in training and evaluation, None for all. Training with 1 leaves the router
            almost without a gradient.
    """

    kind: str = "multimodal"
    scope: str = "layer"
    temperature: float = 0.1
    noise_std: float | None = 1 / 256
    self_width: int = 2
    cross_width: int = 8
    embedding: str = "frozen"
    renormalize: bool = False
    train_top_k: int | None = None
    eval_top_k: int | None = None


@with_fields_named()
@dataclass(frozen=True)
class PromptConfig:
    """Which prompts there are.

    Args:
        num_experts: K prompt experts in each prompted layer.
        length: P dynamic prompts, the length of an expert.
        static_length: S prompts that all instances share, in each prompted layer of the main encoder. Default: 4 with the
            methods mope and static_mapped, else 0; more than 0 there is deep visual (or text) prompt tuning.
        depth: "deep", prompts of its own for each layer; "shallow", static and mapped prompts in front of the first layer,
            which pass through all layers with the tokens (not with the method mope).
        blind: shallow static prompts see each other only.
        complementary_length: static prompts in every layer of the complementary encoders, 0 for none.
        layers: which layers of the main encoder are prompted, None for all; negative indices count from the last. A Swin
            Transformer is prompted in all.
        first_blocks: in a Swin Transformer give the first block of each stage prompts of its own too, instead of those that
            arrive there; the input then has none. In other encoders every layer has its own anyway.
        init_bound: prompts start as U(-bound, bound). Default: sqrt(3 / C) in pre-LN encoders,
            sqrt(6 / (3 patch_size^2 + embed_dim)) in a Swin Transformer, else 0.3.
        dropout: on the prompts in training; in a Swin Transformer on those of the input and on mapped ones, with drop_block also on
            the blocks' own.
        owner: whose prompts a window of a Swin Transformer attends: "instance", those of its own image; "released", those of the
            released code's order, in which items of a batch reach each other.
    """

    num_experts: int = 16
    length: int = 6
    static_length: int | None = None
    depth: str = "deep"
    blind: bool = False
    complementary_length: int = 0
    layers: Sequence[int] | None = None
    first_blocks: bool = False
    init_bound: float | None = None
    dropout: float = 0.0
    drop_block: bool = False
    owner: str = "instance"


@with_fields_named()
@dataclass(frozen=True)
class MapperConfig:
    """How psi becomes a prompt.

    Args:
        use: one prompt made by the mapper from psi; always on in static_mapped.
        each: a mapper and a mapped prompt for each complementary modality, instead of one from all of psi.
        hidden: hidden width of the mapper, which all layers share; in a Swin Transformer all layers of a stage, and the hidden
            layer all stages. 0: one linear map, and none where psi is as wide as the tokens.
        batchnorm: a BatchNorm in front of the hidden GELU. It keeps its first statistics and so is an affine map.
        last_gelu: a GELU on the mapped prompt. Both default to what was published: yes in a Swin Transformer, else no.
    """

    use: bool = True
    each: bool = False
    hidden: int = 128
    batchnorm: bool | None = None
    last_gelu: bool | None = None


PARTS = {"router": RouterConfig, "prompts": PromptConfig, "mapper": MapperConfig}
# Shorthands: keyword of `MoPEConfig` -> part, and field of the part.
SHORT = {
    "router_scope": ("router", "scope"),
    "temperature": ("router", "temperature"),
    "noise_std": ("router", "noise_std"),
    "router_self_width": ("router", "self_width"),
    "router_cross_width": ("router", "cross_width"),
    "router_embedding": ("router", "embedding"),
    "renormalize": ("router", "renormalize"),
    "train_top_k": ("router", "train_top_k"),
    "eval_top_k": ("router", "eval_top_k"),
    "num_experts": ("prompts", "num_experts"),
    "prompt_length": ("prompts", "length"),
    "static_length": ("prompts", "static_length"),
    "prompt_depth": ("prompts", "depth"),
    "blind_prompts": ("prompts", "blind"),
    "cross_prompt_length": ("prompts", "complementary_length"),
    "prompted_layers": ("prompts", "layers"),
    "prompt_first_blocks": ("prompts", "first_blocks"),
    "prompt_init_bound": ("prompts", "init_bound"),
    "prompt_dropout": ("prompts", "dropout"),
    "drop_block_prompts": ("prompts", "drop_block"),
    "prompt_owner": ("prompts", "owner"),
    "use_mapped": ("mapper", "use"),
    "mapper_each": ("mapper", "each"),
    "mapper_hidden": ("mapper", "hidden"),
    "mapper_batchnorm": ("mapper", "batchnorm"),
    "mapper_last_gelu": ("mapper", "last_gelu"),
}
