"""What a user would write instead, on the same tensors: the honest opponents."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def mix_prompts(experts: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """The released code's way for dense routing, gather and sum for selected experts."""
    if weights.shape[1] == experts.shape[0]:
        return torch.einsum("bk,kpd->bpd", weights.to(experts.dtype), experts)
    return (experts[indices] * weights.to(experts.dtype)[:, :, None, None]).sum(1)


def route(logits: Tensor, top_k: int | None, temperature: float) -> tuple[Tensor, Tensor | None]:
    probs = (logits.float() / temperature).softmax(-1)
    return (probs, None) if top_k is None else tuple(probs.topk(top_k))


def cat_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logits: Tensor,
    bank_key: Tensor,
    bank_value: Tensor,
    gram: Tensor | None = None,
    key_offset: Tensor | None = None,
    value_offset: Tensor | None = None,
    static_key: Tensor | None = None,
    static_value: Tensor | None = None,
    instance_key: Tensor | None = None,
    instance_value: Tensor | None = None,
    lengths: Tensor | None = None,
    top_k: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The best combination of library calls from the same expert bank: mix, concatenate, scaled_dot_product_attention."""
    batch, tokens = query.shape[0], key.shape[2]
    weights, indices = route(logits, top_k, temperature)
    dense = weights if indices is None else torch.zeros_like(logits, dtype=weights.dtype).scatter(1, indices, weights)
    scale = 1.0
    if gram is not None:
        scale = (torch.einsum("bi,pij,bj->bp", dense, gram, dense) + 1e-5).rsqrt()[:, None, :, None]

    def prompts(bank: Tensor, offset: Tensor | None, static: Tensor, instance: Tensor) -> Tensor:
        mixed = torch.einsum("bk,khpd->bhpd", dense, bank) * scale
        mixed = mixed if offset is None else mixed + offset[:, None, :]
        return torch.cat([static.expand(batch, -1, -1, -1), instance, mixed.to(query.dtype)], 2)

    keys = torch.cat([prompts(bank_key, key_offset, static_key, instance_key), key], 2)
    values = torch.cat([prompts(bank_value, value_offset, static_value, instance_value), value], 2)
    mask = None
    if lengths is not None:
        hidden = torch.arange(tokens, device=query.device) >= lengths[:, None]
        mask = F.pad(torch.zeros_like(hidden, dtype=query.dtype).masked_fill(hidden, -math.inf), (keys.shape[2] - tokens, 0))
        mask = mask[:, None, None, :].expand(-1, -1, query.shape[2], -1)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
