"""Reference implementation of `prompt_attention`, with the packing of items."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .numbers import statistics_dtype, without_autocast


def _visible_tokens(lengths: Tensor | None, num_keys: int) -> Tensor | None:
    """Return a mask that is True for the tokens that may be attended to: (B,) -> (B,1,1,Lk)."""
    if lengths is None:
        return None
    return rearrange(torch.arange(num_keys, device=lengths.device) < lengths[:, None], "b l -> b 1 1 l")


def _softmax_or_zero(scores: Tensor) -> Tensor:
    """Compute the softmax over the last axis; a row that is all -inf (no visible key) gives zeros with zero gradient."""
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    return torch.where(nothing, 0.0, torch.where(nothing, 0.0, scores).softmax(-1))


def pad_items(rows: Tensor, offsets: Tensor, max_length: int) -> Tensor:
    """Pad packed items (item b in rows offsets[b] to offsets[b+1]) with zeros: (1,H,T,D), (B+1,) -> (B,H,max_length,D)."""
    place = offsets[:-1, None] + torch.arange(max_length, device=offsets.device)
    if rows.shape[2] == 0:
        # Add a row, because the indices need one to point to.
        rows = F.pad(rows, (0, 0, 0, 1))
    padded = rows[0].transpose(0, 1)[place.clamp(max=rows.shape[2] - 1)]
    return padded.masked_fill((place >= offsets[1:, None])[..., None, None], 0.0).transpose(1, 2)


def pack_items(padded: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    """Invert `pad_items`: (B,H,L,D), (B+1,) -> (1,H,T,D), in the memory layout of (1,T,H,D)."""
    row = torch.arange(num_rows, device=offsets.device)
    item = torch.searchsorted(offsets[1:].contiguous(), row, right=True)
    return padded.transpose(1, 2)[item, row - offsets[item]][None].transpose(1, 2)


@without_autocast
def prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    *,
    lengths: Tensor | None = None,
    attn_bias: Tensor | None = None,
    offsets: Tensor | None = None,
    max_length: int | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Attend to [prompts; tokens]: (B,H,Lq,D), (B,H,Lk,D) x2, (B|1,H,P,D) x2 -> (B,H,Lq,D).

    With `offsets` and `max_length`, the items are packed, and query, key, value and the result are (1,H,T,D).
    """
    if offsets is not None and max_length is not None:
        padded_query, padded_key, padded_value = (pad_items(t, offsets, max_length) for t in (query, key, value))
        out = prompt_attention(
            padded_query,
            padded_key,
            padded_value,
            prompt_key,
            prompt_value,
            lengths=offsets.diff(),
            is_causal=is_causal,
            dropout_p=dropout_p,
            scale=scale,
        )
        return pack_items(out, offsets, query.shape[2])

    batch, _, num_queries, width = query.shape
    num_keys, num_prompts = key.shape[2], prompt_key.shape[2]
    scale = width**-0.5 if scale is None else scale
    keys = torch.cat([prompt_key.to(key.dtype).expand(batch, -1, -1, -1), key], dim=2)
    values = torch.cat([prompt_value.to(value.dtype).expand(batch, -1, -1, -1), value], dim=2)

    visible = _visible_tokens(lengths, num_keys)
    if visible is not None:
        visible = F.pad(visible, (num_prompts, 0), value=True)
        # Padding may hold anything, and 0 * NaN is NaN, so replace it with zeros: masking the scores is not enough.
        keys, values = (t.masked_fill(~visible.mT, 0.0) for t in (keys, values))
    if is_causal:
        below = F.pad(torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(), (num_prompts, 0), value=True)
        visible = below if visible is None else visible & below

    scores = (query @ keys.mT).to(statistics_dtype(query)) * scale
    if attn_bias is not None:
        bias = attn_bias.to(scores.dtype).expand(batch, query.shape[1], num_queries, num_keys)
        scores = scores + F.pad(bias, (num_prompts, 0))
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    attention = F.dropout(_softmax_or_zero(scores), dropout_p).to(value.dtype)
    # Make heads adjacent in memory, so that the output projection reads (B, Lq, H*D) without a copy.
    return (attention @ values).transpose(1, 2).contiguous().transpose(1, 2)
