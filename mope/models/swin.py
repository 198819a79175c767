"""A Swin Transformer whose stages hold prompts, routed block by block."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import SwinModel

import mope_kernels
from mope.fused.swin import MoPESwinBlock, PromptedPatchMerging, position_bias
from mope_kernels import Routing

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
        for pattern, new in _RENAMED:
            name = re.sub(pattern, new, name)
        named[name] = tensor
    for name in [n for n in named if re.search(r"\.attn\.q\.", n)]:
        parts = [named.pop(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        named[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return {name: tensor for name, tensor in named.items() if not _SUPERFLUOUS.search(name)}


class SwinOutput(NamedTuple):
    """What the encoder returns.

    features: (B, C), the mean over prompts and tokens of the last stage.
    importance_loss: () mean over the routed blocks, 0 if none is.
    routing: of every routed block, in order.
    """

    features: Tensor
    importance_loss: Tensor
    routing: tuple[Routing, ...]


class MoPESwinEncoder(nn.Module):
    """A frozen Swin Transformer with P = 2 l + 1 prompts (l without experts) beside its tokens in every block.

    The prompts of the input pass through the first block of each stage; every later block replaces them by its own, as its router
    says: [static; dynamic; mapped]. (MoPE, arXiv 2403.10568, the published configuration.)

    Args:
        image_size, patch_size, embed_dim, depths, num_heads, window_size, mlp_ratio, eps: the Swin Transformer.
        cross_dim: Cc, width of psi.
        num_experts: K.
        prompt_length: l.
        mapper_hidden: width between psi and the mapped prompts.
        prompt_dropout: on the prompts of the input and on mapped prompts, in training.
        importance_threshold: see `mope_kernels.importance_loss`.
        route_first_block: give the first block of each stage prompts of its own too (for routing that is given from outside).
        prompt_owner, self_width, cross_width, impl: see `MoPESwinBlock`.
    """

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
        cross_dim: int = 768,
        num_experts: int = 4,
        prompt_length: int = 6,
        mapper_hidden: int = 384,
        prompt_dropout: float = 0.1,
        importance_threshold: float = 0.1,
        route_first_block: bool = False,
        prompt_owner: str = "instance",
        self_width: int = 2,
        cross_width: int = 8,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.num_prompts, self.importance_threshold, self.impl = 2 * prompt_length + 1, importance_threshold, impl
        self.patch_embed = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.patch_norm = nn.LayerNorm(embed_dim, eps=eps)
        bound = (3 / embed_dim) ** 0.5
        self.input_prompts = nn.Parameter(torch.empty(self.num_prompts, embed_dim).uniform_(-bound, bound))
        self.prompt_dropout = nn.Dropout(prompt_dropout)
        self.mapper = nn.Sequential(nn.Linear(cross_dim, mapper_hidden), nn.BatchNorm1d(mapper_hidden), nn.GELU())
        self.stage_mappers, self.stages, self.merges = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim, resolution = embed_dim * 2**stage, image_size // patch_size // 2**stage
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
                        prompt_length=prompt_length if i or route_first_block else 0,
                        num_experts=num_experts,
                        cross_dim=cross_dim if i else None,
                        self_width=self_width,
                        cross_width=cross_width,
                        prompt_owner=prompt_owner,
                        impl=impl,
                    )
                    for i in range(depth)
                )
            )
            if stage < len(depths) - 1:
                self.merges.append(PromptedPatchMerging(dim, resolution, self.num_prompts, eps=eps))
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

    def train(self, mode: bool = True) -> MoPESwinEncoder:
        """Training mode of prompts and routers. The mapper's BatchNorm keeps its statistics: it is an affine map."""
        super().train(mode)
        self.mapper[1].eval()
        return self

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
        """
        if mapper_input is None:
            if cross is None:
                raise ValueError("MoPESwinEncoder: needs cross, or mapper_input and route_weights")
            mapper_input = self.mapper(cross)
        mapped = self.mapped_prompts(mapper_input)
        x = self.patch_norm(rearrange(self.patch_embed(pixel_values), "b c y x -> b (y x) c"))
        x = torch.cat([self.prompt_dropout(self.input_prompts).to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        rows = None if route_weights is None else self._rows(route_weights)
        routed: list[Routing] = []
        for stage, blocks in enumerate(self.blocks()):
            for block in blocks:
                routing = None
                if rows is not None:
                    routing = next(rows)
                elif block.router is not None:
                    if cross is None:
                        raise ValueError("MoPESwinEncoder: the routers need cross")
                    noise = block.router.sample_noise(len(x), always=router_noise)
                    routing = block.route(x, cross, noise, top_k)
                    routed.append(routing)
                x = block(x, routing, mapped[stage])
            if stage < len(self.merges):
                x = self.merges[stage](x)
        features: Tensor = self.norm(x).mean(1)
        losses = [mope_kernels.importance_loss(r.probs, threshold=self.importance_threshold, impl=self.impl) for r in routed]
        importance = torch.stack(losses).mean() if losses else features.new_zeros(())
        return SwinOutput(features, importance, tuple(routed))

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
    """A prompted encoder of the sizes and with the weights of a transformers `SwinModel`."""
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
    encoder.load_swin(model)
    return encoder
