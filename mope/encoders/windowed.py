"""Swin Transformer with prompts in every stage, routed block by block."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import SwinConfig, SwinModel

from mope.backbones.registry import find_architecture
from mope.backbones.swin_weights import swin_state_dict, transformers_state_dict
from mope.encoders.importance import importance as mean_importance
from mope.encoders.pooling import Pool
from mope.encoders.recomputing import Recomputing
from mope.fused.mapper import mapper_layers
from mope.fused.modules import is_plain
from mope.fused.padding import Padding
from mope.fused.plain import add, add_norm
from mope.fused.prompts import PromptExperts
from mope.fused.router import Router, cross_logits, make_router, sample_noise
from mope.fused.swin import BlockPrompts, MoPESwinBlock, PromptedPatchMerging, position_bias, position_table
from mope.printing import first_of
from mope_kernels import Routing


class SwinOutput(NamedTuple):
    """Output of the encoder.

    Attributes:
        features: Mean over the prompts and tokens of the last stage, (B, C).
        importance_loss: Scalar mean over the routed blocks; 0 if there are none or the loss was not requested.
        routing: Routing of each routed block, in order.
    """

    features: Tensor
    importance_loss: Tensor
    routing: tuple[Routing, ...]


@dataclass(frozen=True)
class SwinSizes:
    """Sizes of a Swin Transformer; `eps` applies to the LayerNorms in and after the blocks."""

    image_size: int = 224
    patch_size: int = 4
    embed_dim: int = 128
    depths: Sequence[int] = (2, 2, 18, 2)
    num_heads: Sequence[int] = (4, 8, 16, 32)
    window_size: int = 7
    mlp_ratio: float = 4.0
    eps: float = 1e-5


@dataclass(frozen=True)
class SwinPrompts:
    """Configuration of an encoder's prompts.

    Attributes:
        num_experts: Number of experts K; 0 for no dynamic prompts.
        length: Number of prompts per expert l.
        static_length: Number of static prompts per block S. Default: `length`.
        use_mapped: Add a prompt that the mapper makes from psi, shared by all blocks of a stage.
        mapper_hidden: Width of the mapper's shared hidden layer; 0 for no such layer.
        mapper_batchnorm: Put a BatchNorm into the mapper's shared part; see `mapper_layers`.
        mapper_last_gelu: Put a GELU after the last layer of the mapper; see `mapper_layers`.
        bound: Prompts are initialised from U(-bound, bound). Default: sqrt(6 / (3 patch_size^2 + embed_dim)).
        depth: "deep", or "shallow" to put static and mapped prompts before the first block and pass them through all blocks.
        first_blocks: Prompts of the first block of each stage. "pass": the incoming ones. "own": its own, and the input has none.
            "either": its own if routing is passed to the call, otherwise the incoming ones.
        dropout: Dropout probability on input prompts and mapped prompts in training.
        drop_block_prompts: Apply dropout to the static and dynamic prompts of the blocks too.
    """

    num_experts: int = 4
    length: int = 6
    static_length: int | None = None
    use_mapped: bool = True
    mapper_hidden: int = 384
    mapper_batchnorm: bool = True
    mapper_last_gelu: bool = True
    bound: float | None = None
    depth: str = "deep"
    first_blocks: str = "pass"
    dropout: float = 0.1
    drop_block_prompts: bool = False


class MoPESwinEncoder(nn.Module):
    """Frozen Swin Transformer with P prompts next to its tokens in every block.

    Incoming prompts pass through the first block of each stage. Every later block replaces them with its own, [static; dynamic;
    mapped], P = S + l + 1, where the router mixes the dynamic ones. Each of the three kinds is optional: without any, this is the
    Swin Transformer, and with static prompts only, it is VPT. (Published configuration of MoPE, arXiv 2403.10568.)

    If the weights come from a transformers model, `config` is the config of that model.

    Args:
        sizes: Sizes of the Swin Transformer.
        prompts: Prompts to add.
        cross_dim: Width Cc of psi; None for neither routers nor mapper.
        router: Kind of router, see `MoPESwinBlock`.
        router_scope: "layer" for a router per block; "shared" for one router for all blocks, which must see psi only; "released"
            for a router per block except that the first two blocks share one.
        importance_threshold: See `mope_kernels.importance_loss`.
        impl: Implementation of the fused ops.
        block_options: self_width, cross_width, temperature, noise_std, router_embedding, renormalize and prompt_owner; see
            `MoPESwinBlock`.
    """

    config: SwinConfig | None = None

    def __init__(
        self,
        sizes: SwinSizes | None = None,
        prompts: SwinPrompts | None = None,
        *,
        cross_dim: int | None = 768,
        router: str = "multimodal",
        router_scope: str = "layer",
        importance_threshold: float = 0.1,
        impl: str = "auto",
        **block_options: Any,
    ) -> None:
        super().__init__()
        sizes, prompts = sizes or SwinSizes(), prompts or SwinPrompts()
        image_size, patch_size, embed_dim = sizes.image_size, sizes.patch_size, sizes.embed_dim
        depths, num_heads, window_size, eps = sizes.depths, sizes.num_heads, sizes.window_size, sizes.eps
        length, mapper_hidden, first_blocks, bound = prompts.length, prompts.mapper_hidden, prompts.first_blocks, prompts.bound
        static_length = length if prompts.static_length is None else prompts.static_length
        deep, use_mapped = prompts.depth == "deep", prompts.use_mapped and cross_dim is not None
        num_experts = prompts.num_experts if deep else 0
        self.num_prompts = static_length + length * (num_experts > 0) + use_mapped
        self.image_size, self.importance_threshold, self.impl = image_size, importance_threshold, impl
        self.deep, self.own_first = deep, deep and first_blocks == "own"
        self.drop_block_prompts = prompts.drop_block_prompts
        self.patch_embed = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.patch_norm = nn.LayerNorm(embed_dim)
        bound = (6 / (3 * patch_size**2 + embed_dim)) ** 0.5 if bound is None else bound
        self.input_prompts: nn.Parameter | None = None
        # Shallow prompts are joined by a mapped prompt in each call.
        at_input = 0 if self.own_first else self.num_prompts if deep else static_length
        if at_input:
            self.input_prompts = nn.Parameter(torch.empty(at_input, embed_dim).uniform_(-bound, bound))
        self.prompt_dropout = nn.Dropout(prompts.dropout)
        self.use_mapped = use_mapped
        self.mapper: nn.Sequential | None = None
        if use_mapped and cross_dim is not None and mapper_hidden:
            self.mapper = mapper_layers(cross_dim, mapper_hidden, batchnorm=prompts.mapper_batchnorm)
        shared = router_scope == "shared"
        self.pairs_first = router_scope == "released" and self.own_first and depths[0] > 1
        of_router = {name: value for name, value in block_options.items() if name != "prompt_owner"}
        self.router = make_router(router if shared else None, embed_dim, cross_dim, num_experts, impl=impl, **of_router)
        if self.router is not None and self.router.sees_tokens:
            raise ValueError(
                "a router shared by all blocks of a Swin Transformer cannot see their tokens, because their width differs between "
                "stages: set router='complementary' or router_self_width=0, or router_scope='layer'"
            )
        own = BlockPrompts(length, num_experts, static_length, bound)
        none = BlockPrompts(bound=bound)
        self.stage_mappers, self.stages, self.merges = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim, resolution = embed_dim * 2**stage, image_size // patch_size // 2**stage
            if use_mapped and cross_dim is not None and (deep or not stage):
                self.stage_mappers.append(mapper_layers(mapper_hidden or cross_dim, dim, gelu=prompts.mapper_last_gelu))
            blocks = nn.ModuleList()
            for i in range(depth):
                first = not i and not self.own_first
                routes = not shared and not first and not (self.pairs_first and not stage and not i)
                blocks.append(
                    MoPESwinBlock(
                        dim,
                        heads,
                        resolution,
                        window_size=window_size,
                        shift=window_size // 2 * (i % 2),
                        num_prompts=self.num_prompts,
                        mlp_ratio=sizes.mlp_ratio,
                        eps=eps,
                        own=none if not deep or (first and first_blocks != "either") else own,
                        cross_dim=cross_dim,
                        router=router if routes else None,
                        impl=impl,
                        **block_options,
                    )
                )
            self.stages.append(blocks)
            if stage < len(depths) - 1:
                self.merges.append(PromptedPatchMerging(dim, resolution, self.num_prompts, impl=impl))
        self.norm = nn.LayerNorm(embed_dim * 2 ** (len(depths) - 1), eps=eps)
        for module in self.swin_modules():
            module.requires_grad_(False)

    @classmethod
    def of(cls, **options: Any) -> Self:
        """Build an encoder from keyword arguments: the fields of `SwinSizes` and `SwinPrompts`, and the class's other arguments.

        Three fields of `SwinPrompts` go by their names in a model's configuration: prompt_length, prompt_depth, prompt_dropout.
        """
        names = {"length": "prompt_length", "depth": "prompt_depth", "dropout": "prompt_dropout"}
        parts: list[Any] = []
        for kind in (SwinSizes, SwinPrompts):
            named = {field.name: names.get(field.name, field.name) for field in dataclasses.fields(kind)}
            parts.append(kind(**{field: options.pop(name) for field, name in named.items() if name in options}))
        return cls(*parts, **options)

    def swin_modules(self) -> list[nn.Module]:
        """Return the modules of the Swin Transformer itself, without the position bias of its blocks."""
        of_blocks = [module for stage in self.blocks() for block in stage for module in block.swin_modules()]
        return [self.patch_embed, self.patch_norm, *of_blocks, *self.merges, self.norm]

    def finetune(self) -> None:
        """Make the Swin Transformer itself trainable, including position biases, without dropout or stochastic depth."""
        for module in self.swin_modules():
            module.requires_grad_(True)
        for stage in self.blocks():
            for block in stage:
                block.finetune()

    def blocks(self) -> list[list[MoPESwinBlock]]:
        """Return the blocks of each stage."""
        stages: Any = self.stages
        return [list(stage) for stage in stages]

    def routers(self) -> list[list[Router | None]]:
        """Return the router of each block of each stage, None for blocks without routing. Blocks may share a router."""
        shared, stages = self.router, self.blocks()
        found = [[None if block.experts is None else shared or block.router for block in blocks] for blocks in stages]
        if self.pairs_first:
            found[0][0] = found[0][1]
        return found

    def routed_blocks(self) -> dict[str, Router]:
        """Return the routers of routed blocks by block name, in the order of `SwinOutput.routing`.

        Stages and blocks are counted from 0.
        """
        found = {}
        for stage, routers in enumerate(self.routers()):
            for i, router in enumerate(routers):
                if router is not None:
                    found[f"stage {stage}, block {i}"] = router
        return found

    def swin_tensors(self) -> set[str]:
        """Return the state-dict names of the tensors of the Swin Transformer itself."""
        return {name for _, name, _ in self.original_names()}

    def load_swin(self, source: nn.Module | Mapping[str, Tensor]) -> None:
        """Load the weights of a transformers `SwinModel` or of an original Swin checkpoint (see `swin_state_dict`).

        Raises:
            ValueError: If tensors are missing, unknown or of another shape; the message names them.
        """
        state = swin_state_dict(source)
        own = self.state_dict(keep_vars=True)
        wrong, taken = [], set()
        for name, _, shape in self.original_names():
            if name not in state:
                wrong.append(f"{name} is missing")
                continue
            taken.add(name)
            if tuple(state[name].shape) != shape:
                wrong.append(f"{name} is {tuple(state[name].shape)}, expected {shape}")
        wrong += [f"{name} is unknown" for name in state.keys() - taken]
        if wrong:
            raise ValueError(f"load_swin: {first_of(wrong, 8)}")
        with torch.no_grad():
            for name, target, _ in self.original_names():
                value = state[name]
                if target.endswith(".position_bias"):
                    value = position_bias(value, int((own[target].shape[-1]) ** 0.5))
                own[target].copy_(value)

    def original_names(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """List (original name, name here, original shape) of every tensor of the Swin Transformer."""
        modules = {"patch_embed.proj": "patch_embed", "patch_embed.norm": "patch_norm", "norm": "norm"}
        tables: list[tuple[str, str, tuple[int, ...]]] = []
        for s, stage in enumerate(self.blocks()):
            for i, block in enumerate(stage):
                original, here = f"layers.{s}.blocks.{i}", f"stages.{s}.{i}"
                modules |= {f"{original}.{name}": f"{here}.{name}" for name in ("norm1", "norm2")}
                modules |= {f"{original}.attn.{name}": f"{here}.{name}" for name in ("qkv", "proj")}
                modules |= {f"{original}.mlp.fc1": f"{here}.mlp.0", f"{original}.mlp.fc2": f"{here}.mlp.2"}
                shape = ((2 * block.window_size - 1) ** 2, block.num_heads)
                bias = f"{here}.position_bias" if block.position_table is None else f"{here}.position_table"
                tables.append((f"{original}.attn.relative_position_bias_table", bias, shape))
            if s < len(self.merges):
                modules |= {f"layers.{s}.downsample.{name}": f"merges.{s}.{name}" for name in ("norm", "reduction")}
        found = [
            (f"{original}.{name}", f"{here}.{name}", tuple(tensor.shape))
            for original, here in modules.items()
            for name, tensor in self.get_submodule(here).named_parameters()
        ]
        return found + tables

    def swin_model(self) -> tuple[SwinModel, dict[str, Tensor]]:
        """Return the transformers model of `config` on the meta device, and its state dict with this encoder's weights.

        Raises:
            ValueError: If there is no `config`, because the weights do not come from a transformers model.
        """
        if self.config is None:
            raise ValueError("MoPESwinEncoder: there is no transformers config: create the encoder with encoder_for(model)")
        with torch.device("meta"):
            model = SwinModel(self.config, add_pooling_layer=False)
        own, original = self.state_dict(), {}
        for name, here, _ in self.original_names():
            tensor = own[here]
            is_looked_up = here.endswith(".position_bias")
            original[name] = position_table(tensor, int(tensor.shape[-1] ** 0.5)) if is_looked_up else tensor
        state = transformers_state_dict(model, original)
        nn.Module.to(model, self.patch_embed.weight.dtype)
        return model, state

    def embed(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, image_size, image_size) as tokens (B, R*R, embed_dim)."""
        size, shape = self.image_size, tuple(images.shape)
        if shape[1:] != (3, size, size):
            raise ValueError(f"MoPESwinEncoder: images must be (B, 3, {size}, {size}), got {shape}")
        return self.patch_norm(rearrange(self.patch_embed(images.to(self.patch_embed.weight.dtype)), "b c y x -> b (y x) c"))

    def mapped_prompts(self, mapper_input: Tensor) -> list[Tensor]:
        """Compute the mapped prompt (B, 1, C_s) of each stage from the output (B, mapper_hidden) of the mapper's shared part.

        One matrix product serves all stages if their mappers are plain.
        """
        mappers: Any = self.stage_mappers
        first = [mapper[0] for mapper in mappers if is_plain(mapper, nn.Sequential) and is_plain(mapper[0], nn.Linear)]
        behind = [list(mapper)[1:] for mapper in mappers]
        alike = len(first) == len(mappers) and len(set(map(len, behind))) == 1
        if not alike or any(not is_plain(layer, nn.GELU) for layers in behind for layer in layers):
            return [self.prompt_dropout(mapper(mapper_input))[:, None] for mapper in mappers]
        mapped = F.linear(mapper_input, torch.cat([m.weight for m in first]), torch.cat([m.bias for m in first]))
        for layer in behind[0]:
            mapped = layer(mapped)
        parts = self.prompt_dropout(mapped).split([m.out_features for m in first], dim=1)
        return [part[:, None] for part in parts]

    def forward(
        self,
        images: Tensor,
        cross: Tensor | None = None,
        *,
        mapper_input: Tensor | None = None,
        route_weights: Tensor | None = None,
        noise: Sequence[Tensor | None] | None = None,
        router_noise: bool = False,
        top_k: int | None = None,
        checkpointing: bool = False,
        importance: bool = True,
    ) -> SwinOutput:
        """Encode images.

        Args:
            images: Images (B, 3, image_size, image_size).
            cross: psi (B, Cc), for routers and mapper.
            mapper_input: Replacement (B, mapper_hidden) for the output of the mapper's shared part.
            route_weights: Routing weights (B, L, K), one row per block in order, which replace the routers. If L is one less than
                the number of blocks, the first two blocks share the first row (the released text-only router). Every block then
                uses its own prompts.
            noise: Router noise (B, K) for each routed block. Default: drawn here in training.
            router_noise: Draw noise outside training too.
            top_k: Number of experts per item; None for all.
            checkpointing: Recompute blocks in the backward pass. Noise is not drawn again.
            importance: Whether to compute the importance loss.

        Raises:
            ValueError: If images have another size, `cross` is missing, or `route_weights` has a wrong shape.
        """
        prompts = TrainedWindowPrompts(
            self,
            len(images),
            cross,
            mapped=self.mapped(cross, mapper_input),
            rows=None if route_weights is None else self._rows(route_weights),
            noise=noise,
            router_noise=router_noise,
            top_k=top_k,
        )
        features, routed = self.encode(images, prompts, recomputing=Recomputing() if checkpointing else None)
        if not (importance and routed):
            return SwinOutput(features, features.new_zeros(()), routed)
        probs = [routing.probs for routing in distinct(routed)]
        return SwinOutput(features, mean_importance(probs, threshold=self.importance_threshold, impl=self.impl), routed)

    def encode(
        self, images: Tensor, prompts: WindowPrompts, *, recomputing: Recomputing | None = None, pool: Pool | None = None
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Encode images (B, 3, image_size, image_size) with the given prompts.

        Returns the features (B, C) and the routing of each routed block. `recomputing` selects the blocks to recompute in the
        backward pass; `prompts` is not called again then.
        """
        x = self.embed(images)
        if at_input := prompts.of_input(x):
            x = torch.cat([*at_input, x], dim=1)
        recomputing = recomputing if torch.is_grad_enabled() else None
        # The last block returns its residual sum unevaluated; the next block adds it.
        update: Tensor | None = None
        routed: list[Routing] = []
        count = itertools.count()
        for stage, (blocks, routers) in enumerate(zip(self.blocks(), prompts.routers, strict=True)):
            for i, (block, router) in enumerate(zip(blocks, routers, strict=True)):
                x, update, own, routing = prompts.of_block((stage, i), block, router, x, update)
                if recomputing is not None and recomputing.takes(next(count)):
                    x, update, found = _recomputed_step(recomputing, block, x, update, own)
                else:
                    x, update, found = _step(block, x, update, own)
                routing = prompts.decide(router, routing or found)
                if routing is not None:
                    routed.append(routing)
            if stage < len(self.merges):
                x, update = self.merges[stage](add(x, update)), None
        _, normed = add_norm(x, update, self.norm, impl=self.impl)
        return normed.mean(1) if pool is None else pool(normed, Padding()), tuple(routed)

    def cross_logits(self, routers: Sequence[Router], cross: Tensor | None) -> dict[int, Tensor]:
        """Compute psi's part of the logits, by router id, for the routers whose parameters may be read."""
        if cross is None:
            return {}
        found = {id(router): router.of_cross() for router in routers}
        parts = {key: part for key, part in found.items() if part is not None}
        return dict(zip(parts, cross_logits(list(parts.values()), cross), strict=True))

    def mapped(self, cross: Tensor | None, mapper_input: Tensor | None = None) -> list[Tensor]:
        """Return the mapped prompts of the stages that have one.

        Raises:
            ValueError: If mapped prompts are used and both `cross` and `mapper_input` are missing.
        """
        if not self.use_mapped:
            return []
        if mapper_input is None:
            if cross is None:
                raise ValueError("MoPESwinEncoder: needs cross, or mapper_input and route_weights")
            mapper_input = cross.to(next(self.stage_mappers.parameters()).dtype)
            mapper_input = mapper_input if self.mapper is None else self.mapper(mapper_input)
        return self.mapped_prompts(mapper_input)

    def _rows(self, route_weights: Tensor) -> Iterator[Routing]:
        """Yield the dense routing of each block."""
        count = sum(map(len, self.blocks()))
        if route_weights.shape[1] == count - 1:
            route_weights = torch.cat([route_weights[:, :1], route_weights], dim=1)
        if route_weights.shape[1] != count:
            raise ValueError(
                f"route_weights must have a row for each of the {count} blocks, or one fewer, got {tuple(route_weights.shape)}"
            )
        every = torch.arange(route_weights.shape[2], device=route_weights.device).expand_as(route_weights[:, 0])
        return (Routing(row, every, row) for row in route_weights.unbind(1))


class WindowedEncoder:
    """Encoder with prompts in windows: the counterpart of `LayerwiseEncoder`, using `WindowPrompts`.

    Args:
        backbone: The Swin Transformer, which also holds prompts and routers.
        recomputing: Blocks to recompute in the backward pass; None for none.
    """

    def __init__(self, backbone: MoPESwinEncoder, *, recomputing: Recomputing | None = None) -> None:
        self.backbone, self._recomputing = backbone, recomputing

    def refusal(self, flag: str) -> str | None:
        """Return why the encoder does not accept a flag of its modality."""
        return "the windows of a Swin Transformer fit images of one size, and it has no position embeddings to interpolate"

    def encode(
        self, inputs: Mapping[str, Any], padding: Padding, prompts: WindowPrompts, pool: Pool | None = None
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Encode images; return their features (B,C) and the routing of each routed block.

        `pool` makes the feature from the normalized prompts and tokens; by default it is their mean.
        """
        (images,) = inputs.values()
        return self.backbone.encode(images, prompts, recomputing=self._recomputing, pool=pool)


class WindowPrompts(ABC):
    """Source of the prompts of `MoPESwinEncoder.encode`, block by block."""

    # The router of each block of each stage, None for blocks without routing.
    routers: list[list[Router | None]]

    @abstractmethod
    def of_input(self, tokens: Tensor) -> list[Tensor]:
        """Return the prompts (B,N,C) to put in front of the tokens (B,L,C), in order."""

    @abstractmethod
    def of_block(
        self, place: tuple[int, int], block: MoPESwinBlock, router: Router | None, x: Tensor, update: Tensor | None
    ) -> tuple[Tensor, Tensor | None, dict[str, Any] | None, Routing | None]:
        """Supply a block with its prompts.

        Args:
            place: (stage, block).
            block: The block.
            router: Router of the block, None without routing.
            x: First summand of the block's input.
            update: Second summand of the block's input, None for none.

        Returns:
            x; update; the block's own prompts as the `own` argument of `MoPESwinBlock.step`, or None if they are already in x or
            the incoming prompts are kept; and the routing, or None if the block decides it or there is none.
        """

    @abstractmethod
    def decide(self, router: Router | None, routing: Routing | None) -> Routing | None:
        """Receive the routing of a block, and return the routing that the encoder reports for it, or None."""


class TrainedWindowPrompts(WindowPrompts):
    """Trainable prompts that an encoder holds itself.

    Args:
        encoder: Encoder that holds the prompts.
        batch: Batch size B.
        cross: psi (B,Cc), for routers.
        mapped: Mapped prompt of each stage, from `MoPESwinEncoder.mapped`.
        rows: Given routing of each block, which replaces the routers.
        noise: Router noise (B,K) for each routed block. Default: drawn here in training, or always with `router_noise`.
        router_noise: Draw noise outside training too.
        top_k: Number of experts per item; None for all.
    """

    def __init__(
        self,
        encoder: MoPESwinEncoder,
        batch: int,
        cross: Tensor | None = None,
        *,
        mapped: Sequence[Tensor] = (),
        rows: Iterator[Routing] | None = None,
        noise: Sequence[Tensor | None] | None = None,
        router_noise: bool = False,
        top_k: int | None = None,
    ) -> None:
        self.encoder, self.cross, self.mapped, self.top_k, self._rows = encoder, cross, mapped, top_k, rows
        self.routers = encoder.routers()
        of_blocks = [router for routers in self.routers for router in routers if router is not None]
        self._noise = self._noises(of_blocks, batch, router_noise) if noise is None else iter(noise)
        self._of_cross = encoder.cross_logits(of_blocks, cross) if rows is None else {}
        self._dropping = encoder.drop_block_prompts and encoder.prompt_dropout.training
        # A router that sees only psi decides once for all its blocks.
        self._decided: dict[int, Routing] = {}

    @staticmethod
    def _noises(routers: Sequence[Router], batch: int, always: bool) -> Iterator[Tensor | None]:
        """Draw noise lazily, when the first block needs it, so that random numbers are drawn after the input prompts' dropout."""
        yield from sample_noise(routers, batch, always=always)

    def of_input(self, tokens: Tensor) -> list[Tensor]:
        """Return shallow mapped prompts and input prompts, with dropout drawn independently for each image."""
        encoder, found = self.encoder, []
        if encoder.use_mapped and not encoder.deep:
            found.append(self.mapped[0].to(tokens.dtype))
        if encoder.input_prompts is not None:
            found.append(encoder.prompt_dropout(encoder.input_prompts.expand(tokens.shape[0], -1, -1)).to(tokens.dtype))
        return found

    def of_block(
        self, place: tuple[int, int], block: MoPESwinBlock, router: Router | None, x: Tensor, update: Tensor | None
    ) -> tuple[Tensor, Tensor | None, dict[str, Any] | None, Routing | None]:
        """Supply the block's static, mapped and routed prompts."""
        encoder, (stage, i) = self.encoder, place
        # Mix prompts separately if they go through dropout, or if the experts have hooks or are of another class.
        apart = self._dropping or not (block.experts is None or is_plain(block.experts, PromptExperts))
        routing: Routing | None = None
        deciding: dict[str, Any] = {}
        if self._rows is not None:
            routing = next(self._rows)
        elif router is not None:
            if self.cross is None:
                raise ValueError("MoPESwinEncoder: the routers need cross")
            drawn, routing = next(self._noise), self._decided.get(id(router))
            if routing is None and id(router) in self._of_cross and not apart:
                deciding = {"router": router, "cross_logits": self._of_cross[id(router)], "noise": drawn, "top_k": self.top_k}
            elif routing is None:
                x, update = add(x, update), None
                routing = block.route(x, self.cross, drawn, self.top_k, router=router)
        own = None
        if encoder.deep and encoder.num_prompts and (i or encoder.own_first or routing is not None or deciding):
            of_stage = self.mapped[stage] if self.mapped else None
            if apart:
                dropout = encoder.prompt_dropout if self._dropping else None
                x, update = block.with_prompts(add(x, update), routing, of_stage, dropout=dropout), None
            else:
                own = block.own_prompts(routing, of_stage, **deciding)
        return x, update, own, routing

    def decide(self, router: Router | None, routing: Routing | None) -> Routing | None:
        """Return the routing, and keep it if it applies to all blocks of the router."""
        if self._rows is not None or router is None:
            return None
        assert routing is not None
        if not router.sees_tokens:
            self._decided[id(router)] = routing
        return routing


def _step(
    block: MoPESwinBlock, x: Tensor, update: Tensor | None, own: dict[str, Any] | None
) -> tuple[Tensor, Tensor | None, Routing | None]:
    """Run `MoPESwinBlock.step`; if the block has hooks or is of another class, evaluate the sum and call the block."""
    if is_plain(block, MoPESwinBlock):
        return block.step(x, update, own)
    x, routing = block.add_up(x, update, own)
    return block(x), None, routing


def _recomputed_step(
    recomputing: Recomputing, block: MoPESwinBlock, x: Tensor, update: Tensor | None, own: dict[str, Any] | None
) -> tuple[Tensor, Tensor | None, Routing | None]:
    """Run `_step` with recomputation; sums are evaluated first, so that only one tensor is kept."""

    def whole(x: Tensor) -> tuple[Tensor, Routing | None]:
        x, update, routing = _step(block, x, None, own)
        return add(x, update), routing

    x, routing = recomputing(whole, add(x, update))
    return x, None, routing


def distinct(routing: Sequence[Routing]) -> list[Routing]:
    """Return each routing decision once, even if several blocks share it."""
    return list({id(r): r for r in routing}.values())


def encoder_for(model: SwinModel, **options: Any) -> MoPESwinEncoder:
    """Build a prompted encoder from a transformers `SwinModel`, with copies of its weights, on its device and in its dtype.

    The model itself is not changed and shares nothing with the encoder. Its dropout and stochastic depth are not used.

    Args:
        model: The model.
        options: Further arguments of `MoPESwinEncoder.of`.

    Raises:
        ValueError: If the model's config uses a feature that the encoder does not have; the message names it.
    """
    find_architecture(model, "vision")
    config: Any = model.config
    encoder = MoPESwinEncoder.of(
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
    for module in encoder.swin_modules():
        module.to(model.dtype)
    for stage in encoder.blocks():
        for block in stage:
            assert block.position_bias is not None
            block.position_bias = block.position_bias.to(model.dtype)
    encoder.load_swin(model)
    return encoder
