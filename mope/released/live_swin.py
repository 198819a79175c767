"""Accelerated forward of the released prompted Swin Transformer."""

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

# Hard-coded in the released code.
TEMPERATURE, NOISE_STD, IMPORTANCE_THRESHOLD = 0.1, 1 / 16**2, 0.1
# Never active in the released models, and not implemented here.
_DROPOUTS = ("drop_path", "attn.attn_drop", "attn.proj_drop")


class Block(Accelerated):
    """Released block, which provides the attributes of `MoPESwinBlock` under other names."""

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
        """Position bias, looked up again only if the table was written to, moved or cast."""
        table = self.attn.relative_position_bias_table
        # Caching would cause a recompilation for every cached table.
        if table.requires_grad or torch.compiler.is_compiling():
            return position_bias(table, self.attn.window_size[0])
        key = (version(table), table.data_ptr(), table.device, table.dtype)
        if self.__dict__.get("_cached_position_bias", (None,))[0] != key:
            # Leave inference mode, because inference tensors could not be used in training later.
            with torch.inference_mode(False), torch.no_grad():
                # Keep a view of the table, so that no other table can be allocated at its address.
                self.__dict__["_cached_position_bias"] = key, position_bias(table, self.attn.window_size[0]), table.detach()
        return self.__dict__["_cached_position_bias"][1]

    add_up: Any = MoPESwinBlock.add_up
    enter: Any = MoPESwinBlock.enter

    def mlp_layers(self) -> list[nn.Module]:
        """Return the layers of the released Mlp without its inactive dropout; empty if the Mlp itself has to be called."""
        mlp: Any = self.mlp
        names = [name for name, _ in mlp.named_children()]
        known = type(mlp).__name__ == "Mlp" and names in (["fc1", "act", "fc2", "drop"], ["fc1", "act", "drop", "fc2"])
        return [] if not known or has_hooks(mlp) or _drops(mlp.drop) else [mlp.fc1, mlp.act, mlp.fc2]

    def step(self, x: Tensor, update: Tensor | None = None, own: dict[str, Any] | None = None) -> Any:
        """Run `MoPESwinBlock.step`. RuntimeError if dropout or DropPath is active, which is not supported."""
        if dropping := [name for name in _DROPOUTS if _drops(attrgetter(name)(self))]:
            raise RuntimeError(
                f"accelerate: {', '.join(dropping)} of a block would drop, which is not supported. The released encoder's "
                "train() and eval() both turn it off: call one of them first"
            )
        return MoPESwinBlock.step(cast(Any, self), x, update, own)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block: (B, P + R*R, C) -> (B, P + R*R, C)."""
        return MoPESwinBlock.forward(cast(Any, self), x)

    def of_cross(self) -> CrossPart:
        """Return the parameters that compute psi's part of the routing logits."""
        project, keys = self.mm_prompt_cross_proj, self.mm_frozen_expert_key_embed
        return CrossPart(project.weight, project.bias, keys[-project.out_features :])

    def own_prompts(self, static: Tensor, experts: Tensor, mapped: Tensor, cross_logits: Tensor) -> dict[str, Any]:
        """Return the prompt arguments of `step`; noise is added in eval mode too, as in the released code.

        Args:
            static: (l,C) static prompts.
            experts: (K,l,C) prompt experts.
            mapped: (B,1,C) mapped prompt.
            cross_logits: (B,K) psi's part of the routing logits.
        """
        project, keys = self.mm_prompt_self_proj, self.mm_frozen_expert_key_embed
        own = {"self_weight": project.weight, "self_bias": project.bias, "self_keys": keys[: project.out_features]}
        noise = torch.randn(cross_logits.shape, device=cross_logits.device) * NOISE_STD
        prompts = {"static": static, "experts": experts, "mapped": mapped}
        return {**prompts, **own, "cross_logits": cross_logits, "noise": noise, "temperature": TEMPERATURE}


class Encoder(Accelerated):
    """Encoder whose routed forward neither copies the experts for each item nor synchronizes with the device.

    The other methods of the released encoder run unchanged on accelerated blocks.
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
        """Encode images (B, 3, S, S) with psi (B, Cc) to features (B, C), all rows (B, N, C) and {"importance_loss": ()}."""
        self.put_in_order(x)
        x = self.incorporate_prompt(x)
        mapper_input = self.mm_prompt_instruction_proj(y)
        # Compute all mapped prompts before the first block, so that random numbers are drawn in the released order.
        mapped = [
            self.prompt_dropout(self.prompt_proj_act(getattr(self, f"prompt_proj_{stage}")(mapper_input)))[:, None]
            for stage in range(len(self.layers))
        ]
        of_cross = iter(cross_logits([block.of_cross() for layer in self.layers for block in layer.blocks[1:]], y))
        # Residual update of the last block that has not been added yet.
        update: Tensor | None = None
        probs = []
        for stage, layer in enumerate(self.layers):
            # (1 + K, depth, l, C), static prompts first.
            own = getattr(self, f"deep_prompt_embeddings_{stage}")
            for i, (block, static, experts) in enumerate(zip(layer.blocks, own[0].unbind(0), own[1:].unbind(1), strict=True)):
                prompts = None
                if i:
                    prompts = block.own_prompts(static, experts, mapped[stage], next(of_cross))
                    # Under autocast, concatenation with prompts would promote 16-bit rows in the same way.
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
    """Return whether a module is an active dropout or timm's DropPath."""
    return module.training and any(getattr(module, name, None) for name in ("p", "drop_prob"))


def _blocks(encoder: Any) -> Iterator[tuple[str, nn.Module]]:
    for stage, layer in enumerate(encoder.layers):
        for i, block in enumerate(layer.blocks):
            yield f"layers.{stage}.blocks.{i}", block


# Attributes that the code above reads.
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
    """Return whether a module looks like the released prompted Swin Transformer."""
    return hasattr(module, "deep_prompt_embeddings_0")


def replaced(encoder: nn.Module) -> dict[str, tuple[nn.Module, type[Accelerated]]]:
    """Return the modules to accelerate, by name within the encoder."""
    return {"": (encoder, Encoder)} | {name: (block, Block) for name, block in _blocks(encoder)}


def differences(encoder: Any) -> Iterator[str]:
    """Yield the differences between a module with deep prompts and the released prompted Swin Transformer."""
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
            yield f".{name} is not a plain linear layer, and would not be called"
    if "forward" in vars(block) or "forward_mm_moe" in vars(block):
        yield " has its forward replaced on the instance"
