"""A Swin Transformer whose stages hold prompts, routed block by block."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import SwinConfig, SwinModel

import mope_kernels
from mope.fused.swin import MoPESwinBlock, PromptedPatchMerging, position_bias, position_table
from mope_kernels import Routing

from .backbones import Architecture, find_architecture, register_backbone

# transformers' names for what the original Swin Transformer's checkpoints call otherwise; both of transformers' generations.
_RENAMED = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layers\.", "layers."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:self\.(query|key|value)|([qkv])_proj)\.", lambda m: f".attn.{(m[1] or m[2])[0]}."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(?:self|relative_position_bias)\.relative_position_bias_table$", ".attn.relative_position_bias_table"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.blocks\.(\d+)\.output\.dense\.", r".blocks.\1.mlp.fc2."),
)
# What a checkpoint may hold and nobody needs: made anew from sizes, or the head of another task.
_SUPERFLUOUS = re.compile(r"relative_position_index$|attn_mask$|^head\.|^pooler\.|position_ids$")


def swin_state_dict(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a Swin Transformer under the original checkpoints' names: from a transformers `SwinModel` or an original `.pth`.

    A `.pth` is given as what `torch.load(path, weights_only=True)` returns, with its tensors under "model" or at the top.
    Query, key and value of transformers' models become one projection.
    """
    state: Any = source.state_dict() if isinstance(source, nn.Module) else source.get("model", source)
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        named[_original_name(name)] = tensor
    for name in [n for n in named if re.search(r"\.attn\.q\.", n)]:
        parts = [named.pop(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        named[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return {name: tensor for name, tensor in named.items() if not _SUPERFLUOUS.search(name)}


def _original_name(name: str) -> str:
    for pattern, new in _RENAMED:
        name = re.sub(pattern, new, name)
    return name


class SwinArchitecture(Architecture):
    """Prompted in windows, by `MoPESwinEncoder`; not layer by layer."""

    modality = "vision"
    unused, load_options = ("pooler.",), {"add_pooling_layer": False}
    identity = (
        *("embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "hidden_act", "layer_norm_eps"),
        *("image_size", "patch_size", "num_channels"),
    )

    def stable_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return swin_state_dict(state)

    def objections(self, config: Any) -> list[str]:
        found = super().objections(config)
        for name, only in {"num_channels": 3, "qkv_bias": True, "hidden_act": "gelu", "use_absolute_embeddings": False}.items():
            if getattr(config, name) != only:
                found.append(f"{name}={getattr(config, name)!r}: only {only!r} is supported")
        found += [
            f"{name}={getattr(config, name)!r}: only squares are supported, given as one integer"
            for name in ("image_size", "patch_size", "window_size")
            if not isinstance(getattr(config, name), int)
        ]
        return found


register_backbone("swin", SwinArchitecture)


class SwinOutput(NamedTuple):
    """What the encoder returns.

    features: (B, C), the mean over prompts and tokens of the last stage.
    importance_loss: () mean over the routed blocks, 0 if none is or if it was not asked for.
    routing: of every routed block, in order.
    """

    features: Tensor
    importance_loss: Tensor
    routing: tuple[Routing, ...]


class MoPESwinEncoder(nn.Module):
    """A frozen Swin Transformer with P prompts beside its tokens in every block.

    The prompts of the input pass through the first block of each stage; every later block replaces them by its own, as its router
    says: [static; dynamic; mapped], P = S + l + 1. Each of the three may be absent; without any it is the Swin Transformer, and
    with static prompts alone it is VPT-deep. (MoPE, arXiv 2403.10568, the published configuration.)

    Args:
        image_size, patch_size, embed_dim, depths, num_heads, window_size, mlp_ratio, eps: the Swin Transformer; eps is of the
            LayerNorms in and after the blocks.
        cross_dim: Cc, width of psi; None: neither routers nor mapper.
        num_experts: K, 0 for no dynamic prompts.
        prompt_length: l, prompts of an expert.
        static_length: S, static prompts of a block. Default: `prompt_length`.
        use_mapped: one prompt made by the mapper from psi, for all blocks of a stage.
        mapper_hidden: width between psi and the mapped prompts.
        bound: prompts start as U(-bound, bound). Default: sqrt(6 / (3 patch_size^2 + embed_dim)).
        prompt_dropout: on the prompts of the input and on mapped prompts, in training.
        importance_threshold: see `mope_kernels.importance_loss`.
        route_first_block: give the first block of each stage prompts of its own too (for routing that is given from outside).
        impl, block_options: see `MoPESwinBlock`: self_width, cross_width, temperature, noise_std, router_embedding, renormalize,
            prompt_owner.

    `config` is that of the transformers model that the weights came from, if they did.
    """

    config: SwinConfig | None = None

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch_size: int = 4,
        embed_dim: int = 128,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        eps: float = 1e-5,
        cross_dim: int | None = 768,
        num_experts: int = 4,
        prompt_length: int = 6,
        static_length: int | None = None,
        use_mapped: bool = True,
        mapper_hidden: int = 384,
        bound: float | None = None,
        prompt_dropout: float = 0.1,
        importance_threshold: float = 0.1,
        route_first_block: bool = False,
        impl: str = "auto",
        **block_options: Any,
    ) -> None:
        super().__init__()
        static_length = prompt_length if static_length is None else static_length
        own: dict[str, Any] = {"static_length": static_length, "prompt_length": prompt_length, "num_experts": num_experts}
        none: dict[str, Any] = dict.fromkeys(own, 0)
        use_mapped = use_mapped and cross_dim is not None
        self.num_prompts = static_length + prompt_length * (num_experts > 0) + use_mapped
        self.image_size, self.importance_threshold, self.impl = image_size, importance_threshold, impl
        self.patch_embed = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.patch_norm = nn.LayerNorm(embed_dim)
        bound = (6 / (3 * patch_size**2 + embed_dim)) ** 0.5 if bound is None else bound
        self.input_prompts: nn.Parameter | None = None
        if self.num_prompts:
            self.input_prompts = nn.Parameter(torch.empty(self.num_prompts, embed_dim).uniform_(-bound, bound))
        self.prompt_dropout = nn.Dropout(prompt_dropout)
        self.mapper: nn.Sequential | None = None
        if use_mapped and cross_dim is not None:
            self.mapper = nn.Sequential(nn.Linear(cross_dim, mapper_hidden), nn.BatchNorm1d(mapper_hidden), nn.GELU())
        self.stage_mappers, self.stages, self.merges = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim, resolution = embed_dim * 2**stage, image_size // patch_size // 2**stage
            if self.mapper is not None:
                self.stage_mappers.append(nn.Sequential(nn.Linear(mapper_hidden, dim), nn.GELU()))
            self.stages.append(
                nn.ModuleList(
                    MoPESwinBlock(
                        dim,
                        heads,
                        resolution,
                        window_size=window_size,
                        shift=window_size // 2 * (i % 2),
                        num_prompts=self.num_prompts,
                        mlp_ratio=mlp_ratio,
                        eps=eps,
                        bound=bound,
                        cross_dim=cross_dim if i else None,
                        impl=impl,
                        **(own if i or route_first_block else none),
                        **block_options,
                    )
                    for i in range(depth)
                )
            )
            if stage < len(depths) - 1:
                self.merges.append(PromptedPatchMerging(dim, resolution, self.num_prompts))
        self.norm = nn.LayerNorm(embed_dim * 2 ** (len(depths) - 1), eps=eps)
        for module in self.frozen_modules():
            module.requires_grad_(False)

    def frozen_modules(self) -> list[nn.Module]:
        """The Swin Transformer itself."""
        blocks = (block for stage in self.blocks() for block in stage)
        of_blocks = [module for b in blocks for module in (b.norm1, b.qkv, b.proj, b.norm2, b.mlp)]
        return [self.patch_embed, self.patch_norm, *of_blocks, *self.merges, self.norm]

    def blocks(self) -> list[list[MoPESwinBlock]]:
        """The blocks of each stage."""
        stages: Any = self.stages
        return [list(stage) for stage in stages]

    def routed_blocks(self) -> tuple[str, ...]:
        """Names of the blocks with a router, in the order of `SwinOutput.routing`; stages and blocks count from 0."""
        return tuple(
            f"stage {s}, block {i}"
            for s, stage in enumerate(self.blocks())
            for i, block in enumerate(stage)
            if block.router is not None
        )

    def train(self, mode: bool = True) -> MoPESwinEncoder:
        """Training mode of prompts and routers. The mapper's BatchNorm keeps its statistics: it is an affine map."""
        super().train(mode)
        if self.mapper is not None:
            self.mapper[1].eval()
        return self

    def swin_tensors(self) -> set[str]:
        """Names in the state dict of what belongs to the Swin Transformer itself."""
        return {name for _, name, _ in self._original_names()}

    def load_swin(self, source: nn.Module | Mapping[str, Tensor]) -> None:
        """Take the weights of a transformers `SwinModel` or of an original Swin checkpoint (see `swin_state_dict`).

        Raises:
            ValueError: tensors are missing, unknown or of another shape; the message names them.
        """
        state = swin_state_dict(source)
        own = self.state_dict(keep_vars=True)
        wrong, taken = [], set()
        for name, _, shape in self._original_names():
            if name not in state:
                wrong.append(f"{name} is missing")
                continue
            taken.add(name)
            if tuple(state[name].shape) != shape:
                wrong.append(f"{name} is {tuple(state[name].shape)}, expected {shape}")
        wrong += [f"{name} is unknown" for name in state.keys() - taken]
        if wrong:
            raise ValueError("load_swin: " + "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""))
        with torch.no_grad():
            for name, target, _ in self._original_names():
                value = state[name]
                if name.endswith("relative_position_bias_table"):
                    value = position_bias(value, int((own[target].shape[-1]) ** 0.5))
                own[target].copy_(value)

    def _original_names(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(the original name, the name here, the original shape) of every tensor of the Swin Transformer."""
        modules = {"patch_embed.proj": "patch_embed", "patch_embed.norm": "patch_norm", "norm": "norm"}
        tables: list[tuple[str, str, tuple[int, ...]]] = []
        for s, stage in enumerate(self.blocks()):
            for i, block in enumerate(stage):
                original, here = f"layers.{s}.blocks.{i}", f"stages.{s}.{i}"
                modules |= {f"{original}.{name}": f"{here}.{name}" for name in ("norm1", "norm2")}
                modules |= {f"{original}.attn.{name}": f"{here}.{name}" for name in ("qkv", "proj")}
                modules |= {f"{original}.mlp.fc1": f"{here}.mlp.0", f"{original}.mlp.fc2": f"{here}.mlp.2"}
                rows = (2 * block.window_size - 1) ** 2
                tables.append((f"{original}.attn.relative_position_bias_table", f"{here}.position_bias", (rows, block.num_heads)))
            if s < len(self.merges):
                modules |= {f"layers.{s}.downsample.{name}": f"merges.{s}.{name}" for name in ("norm", "reduction")}
        found = [
            (f"{original}.{name}", f"{here}.{name}", tuple(tensor.shape))
            for original, here in modules.items()
            for name, tensor in self.get_submodule(here).named_parameters()
        ]
        return found + tables

    def swin_model(self) -> tuple[SwinModel, dict[str, Tensor]]:
        """The transformers model that the weights came from, on the meta device, and its state dict with the weights of here.

        Raises:
            ValueError: the weights came from somewhere else, so that there is no `config`.
        """
        if self.config is None:
            raise ValueError("MoPESwinEncoder: there is no transformers config: make it with encoder_for(model)")
        with torch.device("meta"):
            model = SwinModel(self.config, add_pooling_layer=False)
        own, original = self.state_dict(), {}
        for name, here, _ in self._original_names():
            tensor = own[here]
            is_table = name.endswith("relative_position_bias_table")
            original[name] = position_table(tensor, int(tensor.shape[-1] ** 0.5)) if is_table else tensor
        state = {}
        for name in model.state_dict():
            known_as = _original_name(name)
            if part := re.search(r"\.attn\.([qkv])\.", known_as):
                merged = original[known_as.replace(part[0], ".attn.qkv.")]
                state[name] = merged.chunk(3)["qkv".index(part[1])].clone()
            elif known_as in original:
                state[name] = original[known_as]
        nn.Module.to(model, self.patch_embed.weight.dtype)
        return model, state

    def mapped_prompts(self, mapper_input: Tensor) -> list[Tensor]:
        """The mapped prompt of each stage, (B, 1, C_s), from what the shared part of the mapper gives, (B, mapper_hidden)."""
        return [self.prompt_dropout(mapper(mapper_input))[:, None] for mapper in self.stage_mappers]

    def forward(
        self,
        pixel_values: Tensor,
        cross: Tensor | None = None,
        *,
        mapper_input: Tensor | None = None,
        route_weights: Tensor | None = None,
        router_noise: bool = False,
        top_k: int | None = None,
        checkpointing: bool = False,
        importance: bool = True,
    ) -> SwinOutput:
        """Encode images.

        Args:
            pixel_values: (B, 3, image_size, image_size).
            cross: psi (B, Cc), for routers and mapper.
            mapper_input: (B, mapper_hidden), in place of the shared part of the mapper.
            route_weights: (B, L, K) given routing weights, one row for each block in order; where the first stage's blocks share
                a row, L is one less than there are blocks (the released text-only router). Every block then takes its own prompts.
            router_noise: add noise outside training too.
            top_k: experts for each item, None for all.
            checkpointing: recompute blocks in the backward pass; routing and noise are not drawn again.
            importance: whether to compute the importance loss.

        Raises:
            ValueError: images of another size, `cross` is missing, or `route_weights` has another shape.
        """
        size, shape = self.image_size, tuple(pixel_values.shape)
        if shape[1:] != (3, size, size):
            raise ValueError(f"MoPESwinEncoder: pixel_values must be (B, 3, {size}, {size}), got {shape}")
        mapped: list[Tensor | None] = [None] * len(self.stages)
        if self.mapper is not None:
            if mapper_input is None:
                if cross is None:
                    raise ValueError("MoPESwinEncoder: needs cross, or mapper_input and route_weights")
                first: Any = self.mapper[0]
                mapper_input = self.mapper(cross.to(first.weight.dtype))
            mapped = [*self.mapped_prompts(mapper_input)]
        x = self.patch_norm(rearrange(self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype)), "b c y x -> b (y x) c"))
        if self.input_prompts is not None:
            # Each image drops others.
            prompts = self.prompt_dropout(self.input_prompts.expand(len(x), -1, -1))
            x = torch.cat([prompts.to(x.dtype), x], dim=1)
        rows = None if route_weights is None else self._rows(route_weights)
        routed: list[Routing] = []
        for stage, blocks in enumerate(self.blocks()):
            for i, block in enumerate(blocks):
                routing = None
                if rows is not None:
                    routing = next(rows)
                elif block.router is not None:
                    if cross is None:
                        raise ValueError("MoPESwinEncoder: the routers need cross")
                    noise = block.router.sample_noise(len(x), always=router_noise)
                    routing = block.route(x, cross, noise, top_k)
                    routed.append(routing)
                # The first block of a stage takes the prompts that arrive, unless routing is given for it.
                if self.num_prompts and (i or routing is not None):
                    x = block.with_prompts(x, routing, mapped[stage])
                x = checkpoint(block, x, use_reentrant=False) if checkpointing and torch.is_grad_enabled() else block(x)
            if stage < len(self.merges):
                x = self.merges[stage](x)
        features: Tensor = self.norm(x).mean(1)
        losses = [
            mope_kernels.importance_loss(r.probs, threshold=self.importance_threshold, impl=self.impl) for r in routed if importance
        ]
        importance_loss = torch.stack(losses).mean() if losses else features.new_zeros(())
        return SwinOutput(features, importance_loss, tuple(routed))

    def _rows(self, route_weights: Tensor) -> Iterator[Routing]:
        """Dense routing of each block."""
        count = sum(map(len, self.blocks()))
        if route_weights.shape[1] == count - 1:
            route_weights = torch.cat([route_weights[:, :1], route_weights], dim=1)
        if route_weights.shape[1] != count:
            raise ValueError(
                f"route_weights must have a row for each of {count} blocks, or one less, got {tuple(route_weights.shape)}"
            )
        every = torch.arange(route_weights.shape[2], device=route_weights.device).expand_as(route_weights[:, 0])
        return (Routing(row, every, row) for row in route_weights.unbind(1))


def encoder_for(model: SwinModel, **options: Any) -> MoPESwinEncoder:
    """A prompted encoder of the sizes of a transformers `SwinModel`, with copies of its weights in their dtype, on its device.

    The model itself is not changed, and nothing is shared with it. Its dropout and stochastic depth are left out.

    Raises:
        ValueError: its config asks for what the encoder does not have; the message names it.
    """
    find_architecture(model, "vision")
    config: Any = model.config
    encoder = MoPESwinEncoder(
        image_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depths=config.depths,
        num_heads=config.num_heads,
        window_size=config.window_size,
        mlp_ratio=config.mlp_ratio,
        eps=config.layer_norm_eps,
        **options,
    )
    encoder.config = copy.deepcopy(config)
    encoder.to(model.device)
    for module in encoder.frozen_modules():
        module.to(model.dtype)
    for stage in encoder.blocks():
        for block in stage:
            block.position_bias = block.position_bias.to(model.dtype)
    encoder.load_swin(model)
    return encoder
