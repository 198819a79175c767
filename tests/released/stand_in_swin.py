"""A prompted Swin Transformer with the parts and state-dict keys of the released code, implemented plainly.

Every window is a separate row with its own copy of the prompts, experts are copied for each item, and the threshold of the
importance loss is evaluated on the host. tests/released/test_accelerate.py compares it with numbers of the released code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2, self.drop = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x), 1, 1) > self.drop_prob) / (1 - self.drop_prob) if self.training else x


class PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(3, dim, 4, 4), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(rearrange(self.proj(x), "b c y x -> b (y x) c"))


class WindowAttention(nn.Module):
    def __init__(self, num_prompts: int, dim: int, window_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_prompts, self.num_heads, self.window_size = num_prompts, num_heads, (window_size, window_size)
        self.scale = (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window_size - 1) ** 2, num_heads))
        y, x = (t.flatten() for t in torch.meshgrid(torch.arange(window_size), torch.arange(window_size), indexing="ij"))
        dy, dx = y[:, None] - y[None] + window_size - 1, x[:, None] - x[None] + window_size - 1
        self.register_buffer("relative_position_index", dy * (2 * window_size - 1) + dx)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = rearrange(self.qkv(windows), "i n (three h d) -> three i h n d", three=3, h=self.num_heads)
        scores = query @ key.mT * self.scale
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(len(windows) // len(mask), 1, 1, 1)
        p = self.num_prompts
        scores = scores + nn.functional.pad(bias, (p, 0, p, 0))
        out = self.attn_drop(scores.softmax(-1)) @ value
        return self.proj_drop(self.proj(rearrange(out, "i h n d -> i n (h d)")))


class Block(nn.Module):
    def __init__(
        self, num_prompts: int, dim: int, resolution: int, num_heads: int, shift: int, window_size: int, num_experts: int
    ) -> None:
        super().__init__()
        self.num_prompts, self.input_resolution, self.num_heads = num_prompts, (resolution, resolution), num_heads
        self.prompt_location = "prepend"
        alone = resolution <= window_size
        self.window_size, self.shift_size = (resolution, 0) if alone else (window_size, shift)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(num_prompts, dim, self.window_size, num_heads)
        self.drop_path, self.mlp = DropPath(0.2), Mlp(dim)
        mask = None
        if self.shift_size:
            edges = torch.tensor([resolution - self.window_size, resolution - self.shift_size])
            band = torch.bucketize(torch.arange(resolution), edges, right=True)
            region = self.partition((3 * band[:, None] + band)[None, :, :, None])[..., 0]
            mask = -100.0 * (region[:, :, None] != region[:, None, :])
        self.register_buffer("attn_mask", mask)
        self.mm_prompt_self_proj, self.mm_prompt_cross_proj = nn.Linear(dim, 2), nn.Linear(768, 8)
        self.mm_frozen_expert_key_embed = nn.Parameter(nn.init.orthogonal_(torch.empty(10, num_experts)), requires_grad=False)

    def partition(self, image: Tensor) -> Tensor:
        return rearrange(image, "b (y v) (x u) c -> (b y x) (v u) c", v=self.window_size, u=self.window_size)

    def forward(self, x: Tensor) -> Tensor:
        p, (side, _), shift = self.num_prompts, self.input_resolution, self.shift_size
        normed = self.norm1(x)
        image = rearrange(normed[:, p:], "b (y x) c -> b y x c", y=side).roll((-shift, -shift), (1, 2))
        windows = self.partition(image)
        # Prompts are window-major and windows image-major, which is why items of a batch share prompts.
        prompts = normed[:, :p].repeat(len(windows) // len(x), 1, 1)
        out = self.attn(torch.cat([prompts, windows], dim=1), self.attn_mask)
        prompts = out[:, :p].reshape(-1, len(x), p, out.shape[2]).mean(0)
        per_side, w = side // self.window_size, self.window_size
        image = rearrange(out[:, p:], "(b y x) (v u) c -> b (y v) (x u) c", y=per_side, x=per_side, v=w)
        tokens = image.roll((shift, shift), (1, 2)).flatten(1, 2)
        x = x + self.drop_path(torch.cat([prompts, tokens], dim=1))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def forward_mm_moe(self, x: Tensor, static: Tensor, experts: Tensor, mapped: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
        query = torch.cat([self.mm_prompt_self_proj(x.mean(1)), self.mm_prompt_cross_proj(cross)], dim=1)
        logits = query @ self.mm_frozen_expert_key_embed
        scores = (logits / 0.1 + torch.randn(logits.shape) / 256).softmax(-1)
        dynamic = torch.einsum("bk,bklc->blc", scores, experts)
        total = scores.sum(0)
        loss = (total.std() / total.mean()) ** 2
        loss = loss if loss > 0.1 else torch.zeros_like(loss)
        return self(torch.cat([static, dynamic, mapped, x[:, self.num_prompts :]], dim=1)), loss


class PatchMerging(nn.Module):
    def __init__(self, num_prompts: int, dim: int, resolution: int) -> None:
        super().__init__()
        self.num_prompts, self.resolution = num_prompts, resolution
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        image = rearrange(x[:, self.num_prompts :], "b (y x) c -> b y x c", y=self.resolution)
        neighbours = [image[:, dy::2, dx::2] for dx in (0, 1) for dy in (0, 1)]
        tokens = torch.cat(neighbours, dim=-1).flatten(1, 2)
        return self.reduction(self.norm(torch.cat([x[:, : self.num_prompts].repeat(1, 1, 4), tokens], dim=1)))


class Layer(nn.Module):
    def __init__(self, blocks: list[Block], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks, self.downsample = nn.ModuleList(blocks), downsample


class PromptedSwin(nn.Module):
    def __init__(
        self,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        num_experts: int,
        prompt_length: int,
        image_size: int = 224,
    ) -> None:
        super().__init__()
        self.num_prompts = prompts = 2 * prompt_length + 1
        self.depths = depths
        self.patch_embed = PatchEmbed(embed_dim)
        bound = math.sqrt(3 / embed_dim)
        self.prompt_embeddings = nn.Parameter(torch.empty(1, prompts, embed_dim).uniform_(-bound, bound))
        self.layers = nn.ModuleList()
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim, resolution = embed_dim * 2**stage, image_size // 4 // 2**stage
            last = stage == len(depths) - 1
            blocks = [Block(prompts, dim, resolution, heads, 3 * (i % 2), 7, num_experts) for i in range(depth)]
            self.layers.append(Layer(blocks, None if last else PatchMerging(prompts, dim, resolution)))
            deep = nn.Parameter(torch.empty(1 + num_experts, depth, prompt_length, dim).uniform_(-bound, bound))
            self.register_parameter(f"deep_prompt_embeddings_{stage}", deep)
            self.add_module(f"prompt_proj_{stage}", nn.Linear(384, dim))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 101)
        self.prompt_proj_act, self.prompt_dropout = nn.GELU(), nn.Dropout(0.1)
        self.mm_prompt_instruction_proj = nn.Sequential(nn.Linear(768, 384), nn.BatchNorm1d(384), nn.GELU())
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("prompt" in name)

    def train(self, mode: bool = True) -> PromptedSwin:
        for child in self.children():
            child.train(False)
        self.prompt_dropout.train(mode)
        return self

    def incorporate_prompt(self, x: Tensor) -> Tensor:
        return torch.cat([self.prompt_dropout(self.prompt_embeddings.expand(len(x), -1, -1)), self.patch_embed(x)], dim=1)

    def mapped(self, y: Tensor) -> list[Tensor]:
        projections = [getattr(self, f"prompt_proj_{stage}") for stage in range(len(self.layers))]
        return [self.prompt_dropout(self.prompt_proj_act(project(y)))[:, None] for project in projections]

    def deep(self, batch: int) -> list[Tensor]:
        """Return (B, 1 + K, depth, l, C) of each stage."""
        stages = [getattr(self, f"deep_prompt_embeddings_{stage}") for stage in range(len(self.layers))]
        return [prompts.expand(batch, -1, -1, -1, -1) for prompts in stages]

    def forward_features_instruct_multimodal_moe(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        x = self.incorporate_prompt(x)
        losses: list[Tensor] = []
        for layer, own, mapped in zip(self.layers, self.deep(len(x)), self.mapped(self.mm_prompt_instruction_proj(y)), strict=True):
            x = layer.blocks[0](x)
            for i, block in list(enumerate(layer.blocks))[1:]:
                x, loss = block.forward_mm_moe(x, own[:, 0, i], own[:, 1:, i], mapped, y)
                losses.append(loss)
            x = x if layer.downsample is None else layer.downsample(x)
        rows = self.norm(x)
        return rows.mean(1), rows, {"importance_loss": torch.stack(losses).mean()}

    def forward_features_instruct_moe(self, x: Tensor, y: Tensor, route_score: Tensor) -> tuple[Tensor, Tensor, None]:
        x = self.incorporate_prompt(x)
        mapped, start = self.mapped(y), 0
        # The blocks of the first stage share one row of the scores.
        route_score = torch.cat([route_score[:, :1], route_score], dim=1)
        for stage, (layer, own) in enumerate(zip(self.layers, self.deep(len(x)), strict=True)):
            scores = route_score[:, start : start + len(layer.blocks)]
            start += len(layer.blocks)
            dynamic = torch.einsum("bik,bkilc->bilc", scores, own[:, 1:])
            prompts = self.prompt_dropout(torch.cat([dynamic, own[:, 0]], dim=2))
            for i, block in enumerate(layer.blocks):
                x = block(torch.cat([prompts[:, i], mapped[stage], x[:, self.num_prompts :]], dim=1))
            x = x if layer.downsample is None else layer.downsample(x)
        rows = self.norm(x)
        return rows.mean(1), rows, None


class VisionClassifier(nn.Module):
    def __init__(self, encoder: PromptedSwin) -> None:
        super().__init__()
        self.encoder, self.classifier = encoder, nn.Linear(encoder.norm.normalized_shape[0], 5)

    def forward_instruct_multimodal_moe(self, x: Tensor, text_feature: Tensor) -> tuple[Tensor, dict[str, Any]]:
        features, _, extra = self.encoder.forward_features_instruct_multimodal_moe(x, text_feature)
        return self.classifier(features), extra | {"cls": features}


class Fusion(nn.Module):
    def __init__(self, vision_model: VisionClassifier, text_model: nn.Module) -> None:
        super().__init__()
        self.vision_model, self.text_model = vision_model, text_model

    def forward(self, vision_input: Tensor, text_input: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return self.vision_model.forward_instruct_multimodal_moe(vision_input, self.text_model(text_input))
