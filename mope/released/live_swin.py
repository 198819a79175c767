"""The released prompted Swin Transformer with this library's forward."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn

from mope.encoders.importance import importance
from mope.fused.modules import has_hooks, is_plain, version
from mope.fused.plain import add, add_norm
from mope.fused.router import CrossPart, cross_logits
from mope.fused.swin import MoPESwinBlock, position_bias

from .live import Accelerated, missing

# Written as numbers in the released code.
TEMPERATURE, NOISE_STD, IMPORTANCE_THRESHOLD = 0.1, 1 / 16**2, 0.1
# Never on in the released models, and not repeated here.
_DROPOUTS = ("drop_path", "attn.attn_drop", "attn.proj_drop")


class Block(Accelerated):
    """A released block has what `MoPESwinBlock` computes with, under other names."""

    attn: Any
    input_resolution: tuple[int, int]
    shift_size: int
    impl = "auto"
    prompt_owner = property(lambda self: self.mode)
    qkv = property(lambda self: self.attn.qkv)
    proj = property(lambda self: self.attn.proj)
    resolution = property(lambda self: self.input_resolution[0])
    shift = property(lambda self: self.shift_size)
    mm_prompt_self_proj: nn.Linear
    mm_prompt_cross_proj: nn.Linear
    mm_frozen_expert_key_embed: Tensor

    @property
    def position_bias(self) -> Tensor:
        """Looked up again only when the table was written to, moved or cast."""
        table = self.attn.relative_position_bias_table
        # A compiled graph would be made anew for every table that is kept.
        if table.requires_grad or torch.compiler.is_compiling():
            return position_bias(table, self.attn.window_size[0])
        key = (version(table), table.data_ptr(), table.device, table.dtype)
        if self.__dict__.get("_cached_position_bias", (None,))[0] != key:
            # Also when a model is first used in inference mode: what is made there could not be trained with later.
            with torch.inference_mode(False), torch.no_grad():
                # With a view of the table: while it is held, no other one can lie at its address.
                self.__dict__["_cached_position_bias"] = key, position_bias(table, self.attn.window_size[0]), table.detach()
        return self.__dict__["_cached_position_bias"][1]

    add_up: Any = MoPESwinBlock.add_up
    enter: Any = MoPESwinBlock.enter

    def mlp_layers(self) -> list[nn.Module]:
        """Those of the released Mlp, which also has a dropout behind both; empty where it has to be called."""
        mlp: Any = self.mlp
        names = [name for name, _ in mlp.named_children()]
        known = type(mlp).__name__ == "Mlp" and names in (["fc1", "act", "fc2", "drop"], ["fc1", "act", "drop", "fc2"])
        return [] if not known or has_hooks(mlp) or _drops(mlp.drop) else [mlp.fc1, mlp.act, mlp.fc2]

    def step(self, x: Tensor, update: Tensor | None = None, own: dict[str, Any] | None = None) -> Any:
        """`MoPESwinBlock.step`."""
        if dropping := [name for name in _DROPOUTS if _drops(attrgetter(name)(self))]:
            raise RuntimeError(
                f"accelerate: {', '.join(dropping)} of a block would drop, which is not supported. The released encoder's "
                "train() and eval() both turn it off: call one of them first"
            )
        return MoPESwinBlock.step(cast(Any, self), x, update, own)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P + R*R, C) -> (B, P + R*R, C)."""
        return MoPESwinBlock.forward(cast(Any, self), x)

    def of_cross(self) -> CrossPart:
        """What makes psi's part of the logits."""
        project, keys = self.mm_prompt_cross_proj, self.mm_frozen_expert_key_embed
        return CrossPart(project.weight, project.bias, keys[-project.out_features :])

    def own_prompts(self, static: Tensor, experts: Tensor, mapped: Tensor, cross_logits: Tensor) -> dict[str, Any]:
        """(l,C), (K,l,C), (B,1,C), (B,K) -> what `step` takes. Noise is added in eval mode too, as the released code does."""
        project, keys = self.mm_prompt_self_proj, self.mm_frozen_expert_key_embed
        own = {"self_weight": project.weight, "self_bias": project.bias, "self_keys": keys[: project.out_features]}
        noise = torch.randn(cross_logits.shape, device=cross_logits.device) * NOISE_STD
        prompts = {"static": static, "experts": experts, "mapped": mapped}
        return {**prompts, **own, "cross_logits": cross_logits, "noise": noise, "temperature": TEMPERATURE}


class Encoder(Accelerated):
    """The routed forward, without copying the experts for each item or waiting for the device.

    The other methods of the released encoder run unchanged over accelerated blocks.
    """

    layers: Any
    norm: nn.Module
    num_prompts: int
    incorporate_prompt: Any
    mm_prompt_instruction_proj: nn.Module
    prompt_proj_act: nn.Module
    prompt_dropout: nn.Module

    def frozen_parts(self) -> Iterator[nn.Module]:
        for layer in self.layers:
            yield from (part for block in layer.blocks for part in (block.attn, block.mlp))
            if layer.downsample is not None:
                yield layer.downsample

    def forward_features_instruct_multimodal_moe(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """(B, 3, S, S), psi (B, Cc) -> features (B, C), all rows (B, N, C), {"importance_loss": ()}."""
        self.put_in_order(x)
        x = self.incorporate_prompt(x)
        mapper_input = self.mm_prompt_instruction_proj(y)
        # All of them before the first block: random numbers are drawn in the released order.
        mapped = [
            self.prompt_dropout(self.prompt_proj_act(getattr(self, f"prompt_proj_{stage}")(mapper_input)))[:, None]
            for stage in range(len(self.layers))
        ]
        of_cross = iter(cross_logits([block.of_cross() for layer in self.layers for block in layer.blocks[1:]], y))
        # What the last block leaves to be added.
        update: Tensor | None = None
        probs = []
        for stage, layer in enumerate(self.layers):
            # (1 + K, depth, l, C): the static prompts come first.
            own = getattr(self, f"deep_prompt_embeddings_{stage}")
            for i, (block, static, experts) in enumerate(zip(layer.blocks, own[0].unbind(0), own[1:].unbind(1), strict=True)):
                prompts = None
                if i:
                    prompts = block.own_prompts(static, experts, mapped[stage], next(of_cross))
                    # What concatenation makes of 16-bit rows under autocast.
                    x = x.to(torch.promote_types(x.dtype, experts.dtype))
                if has_hooks(block):
                    x, routing = block.add_up(x, update, prompts)
                    x, update = block(x), None
                else:
                    x, update, routing = block.step(x, update, prompts)
                probs += [] if routing is None else [routing.probs]
            if layer.downsample is not None:
                x, update = layer.downsample(add(x, update)), None
        _, rows = add_norm(x, update, self.norm)
        return rows.mean(1), rows, {"importance_loss": importance(probs, threshold=IMPORTANCE_THRESHOLD)}


def _drops(module: nn.Module) -> bool:
    """Dropout or timm's DropPath, switched on."""
    return module.training and any(getattr(module, name, None) for name in ("p", "drop_prob"))


def _blocks(encoder: Any) -> Iterator[tuple[str, nn.Module]]:
    for stage, layer in enumerate(encoder.layers):
        for i, block in enumerate(layer.blocks):
            yield f"layers.{stage}.blocks.{i}", block


# What the code above reads.
_ENCODER_PARTS = [
    *("forward_features_instruct_multimodal_moe", "incorporate_prompt", "num_prompts", "norm"),
    *("prompt_dropout", "prompt_proj_act", "mm_prompt_instruction_proj"),
]
_BLOCK_PARTS = [
    *("forward_mm_moe", "num_prompts", "num_heads", "input_resolution", "window_size", "shift_size", "norm2", "mlp"),
    *("norm1.normalized_shape", "mm_prompt_self_proj", "mm_prompt_cross_proj", "mm_frozen_expert_key_embed"),
    *("attn.qkv", "attn.proj", "attn.scale", "attn.window_size", "attn.relative_position_bias_table"),
    *_DROPOUTS,
]


def recognise(module: nn.Module) -> bool:
    return hasattr(module, "deep_prompt_embeddings_0")


def replaced(encoder: nn.Module) -> dict[str, tuple[nn.Module, type[Accelerated]]]:
    """What gets other methods, by name within the encoder."""
    return {"": (encoder, Encoder)} | {name: (block, Block) for name, block in _blocks(encoder)}


def differences(encoder: Any) -> Iterator[str]:
    """How a module with deep prompts is not the released prompted Swin Transformer."""
    try:
        blocks, stages = dict(_blocks(encoder)), range(len(encoder.layers))
    except AttributeError as error:
        yield str(error)
        return
    of_stages = ("deep_prompt_embeddings_{}", "prompt_proj_{}", "layers.{}.downsample")
    if lacking := missing(encoder, _ENCODER_PARTS + [part.format(stage) for part in of_stages for stage in stages]):
        yield f"{', '.join(lacking)} missing"
        return
    for stage, layer in enumerate(encoder.layers):
        if getattr(encoder, f"deep_prompt_embeddings_{stage}").shape[1] != len(layer.blocks):
            yield f"deep_prompt_embeddings_{stage} is not for {len(layer.blocks)} blocks"
        if has_hooks(layer):
            yield f"layers.{stage} has hooks, which would not run"
    if "forward_features_instruct_multimodal_moe" in vars(encoder):
        yield "forward_features_instruct_multimodal_moe was replaced on the instance"
    for name, block in blocks.items():
        yield from (f"{name}{problem}" for problem in _block_differences(block))


def _block_differences(block: Any) -> Iterator[str]:
    if lacking := missing(block, _BLOCK_PARTS):
        yield f": {', '.join(lacking)} missing"
        return
    if len(set(block.input_resolution)) != 1 or block.input_resolution[0] % block.window_size:
        yield f" has input_resolution {block.input_resolution}, not a square of windows of {block.window_size}"
    if getattr(block, "prompt_location", "prepend") != "prepend":
        yield f" has prompt_location {block.prompt_location!r}, not 'prepend'"
    if block.attn.scale != (block.norm1.normalized_shape[0] // block.num_heads) ** -0.5:
        yield f".attn has scale {block.attn.scale}, not (C / H)^-0.5"
    if has_hooks(block.attn):
        yield ".attn has hooks, which would not run"
    for name in ("mm_prompt_self_proj", "mm_prompt_cross_proj"):
        if not is_plain(getattr(block, name), nn.Linear):
            yield f".{name} is not, or not only, a linear layer, and would not be called"
    if "forward" in vars(block) or "forward_mm_moe" in vars(block):
        yield " has its forward replaced on the instance"
