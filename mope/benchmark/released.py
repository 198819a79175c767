"""The Swin Transformer and BERT of the released systems, rewritten plainly over the weights of our modules.

Users of the released systems run this computation today. Prompts are copied into every window, in the released order: window i
of a batch of B images gets the prompts of image i mod B. They are projected again in each window. The image is rolled, cut into
windows, concatenated with the prompts, and put together again. Text prompts go through the whole layer, and their outputs are
cut off after it. In every routed block, the host draws noise, copies zeros to the device, and reads two values from it. With
`waits=False` it does none of that; this is how one would write the block by hand for torch.compile.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mope import MoPEForClassification
from mope.fused import MoPESwinBlock
from mope.fused.swin import position_table
from mope_kernels.reference import shift_mask


class ReleasedBlock(nn.Module):
    """A block of the prompted Swin Transformer.

    Args:
        block: our block, whose weights are used.
        waits: whether the host waits for the device, as in the released code.
        threshold: the largest importance loss that counts as 0.
    """

    table: Tensor
    index: Tensor
    mask: Tensor | None

    def __init__(self, block: MoPESwinBlock, *, waits: bool = True, threshold: float = 0.1) -> None:
        super().__init__()
        self.block, self.waits, self.threshold = block, waits, threshold
        assert block.position_bias is not None
        window, device = block.window_size, block.position_bias.device
        place = torch.arange(window, device=device)
        y, x = (t.flatten() for t in torch.meshgrid(place, place, indexing="ij"))
        distance = [t[:, None] - t[None, :] + window - 1 for t in (y, x)]
        self.register_buffer("table", position_table(block.position_bias, window))
        self.register_buffer("index", distance[0] * (2 * window - 1) + distance[1])
        mask = (
            shift_mask(block.resolution, window, block.shift, device=device, dtype=block.position_bias.dtype)
            if block.shift
            else None
        )
        self.register_buffer("mask", mask)

    def route(self, x: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
        """Route by tokens (B,N,C) and psi (B,Cc) -> scores (B,K), and the importance loss ()."""
        router: Any = self.block.router
        pooled = F.adaptive_avg_pool1d(x.transpose(1, 2), 1).squeeze(-1)
        query = torch.cat([router.self_projection(pooled), router.cross_projection(cross)], dim=1)
        logits = query @ router.expert_embedding
        # The noise is scaled by the model's noise_std, which is 0 when results are compared.
        if self.waits:
            noise = torch.randn(logits.shape).to(logits.device) * router.noise_std
        else:
            noise = torch.randn_like(logits) * router.noise_std
        scores = F.softmax(logits / router.temperature + noise, dim=-1)
        if self.waits:
            # The released code computes this selection but never uses it.
            selected = torch.zeros(scores.shape).to(scores.device)
            selected.scatter_(1, torch.topk(scores, k=1, dim=-1)[1], 1)
        load = scores.sum(0)
        std, mean = load.std(), load.mean()
        if not self.waits:
            unevenness = (std / mean) ** 2
            return scores, torch.where(unevenness > self.threshold, unevenness, 0.0)
        unevenness = (std / mean) ** 2 if mean > 0 else mean
        return scores, unevenness if unevenness > self.threshold else torch.zeros_like(unevenness)

    def forward(self, x: Tensor, cross: Tensor | None = None, mapped: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Run the block. The importance loss is None unless the block is routed.

        (B, P + R*R, C), psi (B,Cc), mapped prompts (B,1,C) -> (B, P + R*R, C), and the importance loss ().
        """
        block, unevenness = self.block, None
        if block.router is not None and cross is not None and mapped is not None:
            assert block.experts is not None and block.static is not None
            scores, unevenness = self.route(x, cross)
            # The experts, expanded for every image.
            experts = block.experts.prompts.expand(len(x), -1, -1, -1)
            dynamic = torch.einsum("bk,bkpc->bpc", scores.to(experts.dtype), experts)
            static = block.static.expand(len(x), -1, -1)
            x = torch.cat([static, dynamic, mapped, x[:, block.num_prompts :]], dim=1)
        x = x + self.attend(block.norm1(x))
        return x + block.mlp(block.norm2(x)), unevenness

    def attend(self, x: Tensor) -> Tensor:
        """Attend in windows, including partition and reversal: (B, P + R*R, C) -> (B, P + R*R, C)."""
        block, (batch, _, dim) = self.block, x.shape
        side, window, shift, count = block.resolution, block.window_size, block.shift, block.num_prompts
        prompts, image = x[:, :count], x[:, count:].view(batch, side, side, dim)
        if shift:
            image = torch.roll(image, (-shift, -shift), dims=(1, 2))
        cut = (batch, side // window, window, side // window, window, dim)
        windows = image.view(cut).permute(0, 1, 3, 2, 4, 5).reshape(-1, window**2, dim)
        windows_per_image = len(windows) // batch
        copies = prompts.unsqueeze(0).expand(windows_per_image, -1, -1, -1).reshape(-1, count, dim)
        out = self.attend_in_windows(torch.cat([copies, windows], dim=1), windows_per_image)
        prompts = out[:, :count].view(-1, batch, count, dim).mean(0)
        image = out[:, count:].reshape(batch, side // window, side // window, window, window, dim)
        image = image.permute(0, 1, 3, 2, 4, 5).reshape(batch, side, side, dim)
        if shift:
            image = torch.roll(image, (shift, shift), dims=(1, 2))
        return torch.cat([prompts, image.view(batch, -1, dim)], dim=1)

    def attend_in_windows(self, x: Tensor, windows_per_image: int) -> Tensor:
        """Attend in each window: (B*nW, P + w*w, C) -> (B*nW, P + w*w, C).

        As released, every call pads the position bias and the mask with rows and columns for the prompts.
        """
        block, (windows, rows, dim) = self.block, x.shape
        count, tokens, heads = block.num_prompts, block.window_size**2, block.num_heads
        query, key, value = block.qkv(x).reshape(windows, rows, 3, heads, -1).permute(2, 0, 3, 1, 4)
        scores = (query * (dim // heads) ** -0.5) @ key.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(tokens, tokens, heads).permute(2, 0, 1).contiguous()
        bias = torch.cat([bias.new_zeros(heads, count, tokens), bias], dim=1)
        bias = torch.cat([bias.new_zeros(heads, rows, count), bias], dim=-1)
        scores = scores + bias.unsqueeze(0)
        mask = self.mask
        if mask is None:
            mask = bias.new_zeros(windows_per_image, tokens, tokens)
        if self.waits:
            above = torch.zeros(windows_per_image, count, tokens, dtype=mask.dtype).to(x.device)
        else:
            above = mask.new_zeros(windows_per_image, count, tokens)
        mask = torch.cat([above, mask], dim=1)
        mask = torch.cat([mask.new_zeros(windows_per_image, rows, count), mask], dim=-1)
        scores = scores.view(-1, windows_per_image, heads, rows, rows) + mask.unsqueeze(1).unsqueeze(0)
        weights = F.softmax(scores.view(-1, heads, rows, rows), dim=-1)
        return block.proj((weights @ value).transpose(1, 2).reshape(windows, rows, dim))


class ReleasedModel(nn.Module):
    """The released fusion model of a Swin Transformer and a BERT, method "mope", with the weights of `model`.

    Args:
        model: our model. It needs `prompt_owner="released"`, so that both compute the same.
        waits: see `ReleasedBlock`.
    """

    def __init__(self, model: MoPEForClassification, *, waits: bool = True) -> None:
        super().__init__()
        self.model = model
        vision: Any = model.vision
        threshold = vision.importance_threshold
        self.stages = nn.ModuleList(
            nn.ModuleList(ReleasedBlock(block, waits=waits, threshold=threshold) for block in stage) for stage in vision.blocks()
        )

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B,num_labels), and the mean importance loss () of the routed blocks."""
        vision: Any = self.model.vision
        psi = self.encode_text(input_ids, attention_mask)
        hidden = vision.mapper(psi)
        mapped = [stage(hidden).unsqueeze(1) for stage in vision.stage_mappers]
        x = vision.patch_norm(vision.patch_embed(pixel_values).flatten(2).transpose(1, 2))
        x = torch.cat([vision.input_prompts.expand(len(x), -1, -1), x], dim=1)
        losses = []
        stages: Any = self.stages
        for i, blocks in enumerate(stages):
            for block in blocks:
                x, loss = block(x, psi, mapped[i])
                losses += [] if loss is None else [loss]
            if i < len(vision.merges):
                x = self.merge(vision.merges[i], x)
        features = F.adaptive_avg_pool1d(vision.norm(x).transpose(1, 2), 1).flatten(1)
        return self.model.head(features), torch.stack(losses).mean()

    @staticmethod
    def merge(merging: Any, x: Tensor) -> Tensor:
        """Merge patches, and prompts with copies of themselves: (B, P + R*R, C) -> (B, P + R*R/4, 2C)."""
        prompts, image = x[:, : merging.num_prompts], x[:, merging.num_prompts :]
        image = image.view(len(x), merging.resolution, merging.resolution, -1)
        corners = [image[:, y::2, z::2] for z in (0, 1) for y in (0, 1)]
        image = torch.cat(corners, dim=-1).view(len(x), -1, 4 * x.shape[2])
        return merging.reduction(merging.norm(torch.cat([torch.cat([prompts] * 4, dim=-1), image], dim=1)))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode tokens and mask, (B,L) each -> psi (B,Cc). Each layer inserts its prompts after the first token."""
        text: Any = self.model.text
        x = text.embeddings(input_ids)
        blocks: Any = self.model.cross_blocks
        count = len(blocks[0].static)
        visible = torch.cat([attention_mask[:, :1], attention_mask.new_ones(len(x), count), attention_mask[:, 1:]], dim=1)
        mask = ((1 - visible.to(x.dtype)) * torch.finfo(x.dtype).min)[:, None, None]
        for prompts, prompted in zip(blocks, text.encoder.layer, strict=True):
            x = torch.cat([x[:, :1], prompts.static.expand(len(x), -1, -1), x[:, 1:]], dim=1)
            x = self.text_layer(prompted.layer, x, mask)
            x = torch.cat([x[:, :1], x[:, 1 + count :]], dim=1)
        return x[:, 0]

    @staticmethod
    def text_layer(layer: Any, x: Tensor, mask: Tensor) -> Tensor:
        """Run a layer of the BERT. Attention weights are materialized, because the released code requests them."""
        attention = layer.attention
        heads = attention.self.num_attention_heads
        query, key, value = (
            project(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for project in (attention.self.query, attention.self.key, attention.self.value)
        )
        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5 + mask
        attended = (F.softmax(scores, dim=-1) @ value).transpose(1, 2).flatten(2)
        x = attention.output.LayerNorm(attention.output.dense(attended) + x)
        return layer.output.LayerNorm(layer.output.dense(layer.intermediate(x)) + x)
