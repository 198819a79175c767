"""Reference implementation of `window_prompt_attention`, with the partition of images into windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from .numbers import statistics_dtype, without_autocast


def window_partition(tokens: Tensor, resolution: int, window_size: int, shift: int) -> Tensor:
    """Partition an image's tokens, given row by row, into shifted windows: (B, R*R, C) -> (B, nW, w*w, C)."""
    image = rearrange(tokens, "b (y x) c -> b y x c", y=resolution)
    image = image.roll((-shift, -shift), dims=(1, 2))
    return rearrange(image, "b (wy ny) (wx nx) c -> b (wy wx) (ny nx) c", ny=window_size, nx=window_size)


def window_reverse(windows: Tensor, resolution: int, window_size: int, shift: int) -> Tensor:
    """Invert `window_partition`: (B, nW, w*w, C) -> (B, R*R, C)."""
    per_side = resolution // window_size
    image = rearrange(windows, "b (wy wx) (ny nx) c -> b (wy ny) (wx nx) c", wy=per_side, ny=window_size)
    return rearrange(image.roll((shift, shift), dims=(1, 2)), "b y x c -> b (y x) c")


def shift_mask(resolution: int, window_size: int, shift: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the score mask of shifted windows, -100 between tokens of different image regions -> (nW, w*w, w*w)."""
    place = torch.arange(resolution, device=device)
    # Number the bands of rows and columns that are adjacent only because of the shift, instead of copying a table from the host.
    band = (place >= resolution - window_size).long() + (place >= resolution - shift).long()
    region = rearrange(3 * band[:, None] + band[None, :], "y x -> 1 (y x) 1")
    region = rearrange(window_partition(region, resolution, window_size, 0), "1 w n 1 -> w n")
    return torch.where(region[:, :, None] == region[:, None, :], 0.0, -100.0).to(dtype)


@without_autocast
def window_prompt_attention(
    qkv: Tensor,
    position_bias: Tensor,
    *,
    num_prompts: int,
    num_heads: int,
    resolution: int,
    window_size: int,
    shift: int = 0,
    prompt_owner: str = "instance",
) -> Tensor:
    """Attend within (shifted) windows, each extended by the prompts: (B, P+R*R, 3C), (H, w*w, w*w) -> (B, P+R*R, C)."""
    batch, owner_is_instance = qkv.shape[0], prompt_owner == "instance"
    if resolution <= window_size:
        window_size, shift = resolution, 0
    num_windows, tokens_per_window = (resolution // window_size) ** 2, window_size**2
    prompts, tokens = qkv[:, :num_prompts], qkv[:, num_prompts:]

    # Window i = b * nW + w uses the prompts of item b, or, in the order of the released code, those of item i % B.
    windows = rearrange(window_partition(tokens, resolution, window_size, shift), "b w n c -> (b w) n c")
    order = "(b w)" if owner_is_instance else "(w b)"
    rows = torch.cat([repeat(prompts, f"b p c -> {order} p c", w=num_windows), windows], dim=1)
    query, key, value = rearrange(rows, "i n (three h d) -> three i h n d", three=3, h=num_heads)

    scores = (query @ key.mT).to(statistics_dtype(qkv)) * query.shape[-1] ** -0.5
    bias = repeat(position_bias.to(scores.dtype), "h q k -> w h q k", w=num_windows)
    if shift:
        mask = shift_mask(resolution, window_size, shift, device=qkv.device, dtype=scores.dtype)
        bias = bias + rearrange(mask, "w q k -> w 1 q k")
    scores = scores + repeat(F.pad(bias, (num_prompts, 0, num_prompts, 0)), "w h q k -> (b w) h q k", b=batch)
    out = rearrange(scores.softmax(-1).to(value.dtype) @ value, "i h n d -> i n (h d)")

    prompt_out, token_out = out.split([num_prompts, tokens_per_window], dim=1)
    prompt_out = rearrange(prompt_out, f"{order} p c -> w b p c", w=num_windows).mean(0)
    token_out = rearrange(token_out, "(b w) n c -> b w n c", w=num_windows)
    return torch.cat([prompt_out, window_reverse(token_out, resolution, window_size, shift)], dim=1)
