"""Parts of a `MoPEConfig`: router, prompts and mapper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mope.fusion.protocol import with_fields_named


@with_fields_named()
@dataclass(frozen=True)
class RouterConfig:
    """Configuration of the routers, which choose experts.

    Args:
        kind: "multimodal", softmax(q K / temperature + noise) with q = [W_self pool(x); W_cross psi]; or "complementary",
            softmax((W psi + b) / temperature + noise).
        scope: "layer", a router for each prompted layer; "shared", one router for all layers, which cannot see the tokens of a Swin
            Transformer; "released", a router for each layer, except that the first two blocks of a Swin Transformer share one if
            both are prompted.
        temperature: Softmax temperature.
        noise_std: Standard deviation of the noise, which is added only in training. None means 1 / num_experts^2.
        self_width: Width of the part of the query that comes from the tokens; 0 routes by psi only.
        cross_width: Width of the part of the query that comes from psi.
        embedding: Expert embedding K, "frozen" or "learned".
        renormalize: Whether to divide the weights of the selected experts by their sum.
        train_top_k: Number of experts selected in training, None for all. With 1, the router receives almost no gradient.
        eval_top_k: Number of experts selected in evaluation, None for all.
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
    """Configuration of the prompts.

    Args:
        num_experts: Number of prompt experts K in each prompted layer.
        length: Number of dynamic prompts P, which is the length of an expert.
        static_length: Number of prompts S in each prompted layer of the main encoder that all instances share. The default is 4
            with the methods mope and static_mapped and 0 with the others, where more than 0 is deep visual (or text) prompt tuning.
        depth: "deep", separate prompts for each layer; "shallow", static and mapped prompts in front of the first layer, which
            pass through all layers with the tokens (not with the method mope).
        blind: Whether shallow static prompts attend only to each other.
        complementary_length: Number of static prompts in every layer of the complementary encoders, 0 for none.
        layers: Prompted layers of the main encoder, None for all; negative indices count from the last. All layers of a Swin
            Transformer are prompted.
        first_blocks: Whether the first block of each stage of a Swin Transformer also has its own prompts, instead of those passed
            on to it; the input then has none. In other encoders every layer has its own prompts anyway.
        init_bound: Prompts are initialized with U(-bound, bound). The default is sqrt(3 / C) in pre-LN encoders,
            sqrt(6 / (3 patch_size^2 + embed_dim)) in a Swin Transformer, and 0.3 otherwise.
        dropout: Dropout probability of the prompts in training. In a Swin Transformer it applies to prompts of the input and to
            mapped prompts.
        drop_block: Whether `dropout` also applies to the prompts of the blocks of a Swin Transformer.
        owner: Prompts that a window of a Swin Transformer attends to: "instance", those of its own image; "released", those in
            the order of the released code, which mixes the items of a batch.
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
    """Configuration of the mapper, which turns psi into a prompt.

    Args:
        use: Whether to add one prompt that the mapper makes from psi; always on in static_mapped.
        each: Whether each complementary modality has its own mapper and mapped prompt, instead of one made from all of psi.
        hidden: Hidden width of the mapper. All layers share the mapper; in a Swin Transformer, all layers of a stage share it, and
            all stages share its hidden layer. 0 means a single linear map, or the identity if psi is as wide as the tokens.
        batchnorm: Whether there is a BatchNorm before the hidden GELU. It keeps its initial statistics, so it is an affine map.
            None means as published: yes in a Swin Transformer, otherwise no.
        last_gelu: Whether a GELU is applied to the mapped prompt. None means as published, like `batchnorm`.
    """

    use: bool = True
    each: bool = False
    hidden: int = 128
    batchnorm: bool | None = None
    last_gelu: bool | None = None


PARTS = {"router": RouterConfig, "prompts": PromptConfig, "mapper": MapperConfig}
# Shorthands: keyword of `MoPEConfig` -> (part, field of the part).
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
