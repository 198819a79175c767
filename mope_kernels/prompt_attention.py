"""Attention over prompts and tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from ._checks import Arguments
from .impl import Operation, reference_check


def sdpa_prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    *,
    lengths: Tensor | None,
    attn_bias: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float | None,
) -> Tensor:
    """Concatenate prompts and tokens, and torch's scaled_dot_product_attention."""
    batch, heads, num_queries, _ = query.shape
    num_keys, num_prompts = key.shape[2], prompt_key.shape[2]
    mask = None if attn_bias is None else attn_bias.to(query.dtype).expand(batch, heads, num_queries, num_keys)
    if lengths is not None:
        hidden = (torch.arange(num_keys, device=query.device) >= lengths[:, None])[:, None]
        # The library multiplies what padding holds by zero, and 0 * NaN is NaN.
        key, value = (t.masked_fill(hidden[..., None], 0.0) for t in (key, value))
        mask = query.new_zeros(1, 1, 1, 1) if mask is None else mask
        mask = mask.masked_fill(hidden[:, None], -torch.inf)
    if is_causal:
        above = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).triu(1)
        mask = query.new_zeros(1, 1, 1, 1) if mask is None else mask
        mask = mask.masked_fill(above, -torch.inf)
    if mask is not None:
        # Only the last axis may not be broadcast.
        mask = F.pad(mask, (num_prompts, 0)).expand(-1, -1, num_queries, -1)
    keys = torch.cat([prompt_key.to(key.dtype).expand(batch, -1, -1, -1), key], dim=2)
    values = torch.cat([prompt_value.to(value.dtype).expand(batch, -1, -1, -1), value], dim=2)
    with torch.autocast(query.device.type, enabled=False):
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _sdpa_check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    *,
    lengths: Tensor | None = None,
    attn_bias: Tensor | None = None,
    **_: Any,
) -> list[str]:
    reasons = []
    if query.device.type == "cpu" and query.dtype == torch.float32:
        reasons.append("torch's CPU kernel approximates exp: in float32 its error is several times that of plain PyTorch")
    if prompt_key.shape[2] == 0 and (key.shape[2] == 0 or lengths is not None or attn_bias is not None):
        reasons.append("without prompts an item may see nothing at all, which scaled_dot_product_attention answers with NaN")
    return reasons


_PROMPT_ATTENTION = Operation("prompt_attention", sdpa=_sdpa_check, reference=reference_check)


def check_attention(
    arguments: Arguments, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, dropout_p: float
) -> None:
    """The checks that every attention over tokens shares."""
    arguments.tensor("query", query, "B H Lq D")
    arguments.tensor("key", key, "B H Lk D", dtype=query.dtype)
    arguments.tensor("value", value, "B H Lk D", dtype=query.dtype)
    arguments.tensor("lengths", lengths, "B", integer=True)
    arguments.probability("dropout_p", dropout_p)


def prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    *,
    lengths: Tensor | None = None,
    attn_bias: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """softmax(q [Kp; K]' * scale) [Vp; V]: scaled dot product attention whose first keys are prompts.

    Args:
        query: (B,H,Lq,D), floating point.
        key, value: (B,H,Lk,D), dtype of `query`.
        prompt_key, prompt_value: (B,H,P,D), or (1,H,P,D) where all items share their prompts; floating point.
        lengths: (B,) integer; the tokens of item b from lengths[b] on are hidden from it, prompts never are.
        attn_bias: floating point, broadcastable to (B,H,Lq,Lk); added to the scores of tokens. Not differentiable.
        is_causal: query i sees tokens 0..i and every prompt; needs Lq = Lk.
        dropout_p: of the attention probabilities, those of prompts too.
        scale: of the scores; D^-0.5 if None.
        impl: "auto", "sdpa" (concatenation and torch's scaled_dot_product_attention) or "reference".

    Returns:
        (B,H,Lq,D) in the dtype of `query`, in memory (B,Lq,H,D). Zero where an item has neither prompts nor tokens.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, `attn_bias` requires a gradient, or `impl` cannot run.
    """
    arguments = Arguments("prompt_attention")
    check_attention(arguments, query, key, value, lengths, dropout_p)
    owner = "B" if prompt_key.dim() != 4 or prompt_key.shape[0] != 1 else "1"
    arguments.tensor("prompt_key", prompt_key, f"{owner} H P D")
    arguments.tensor("prompt_value", prompt_value, f"{owner} H P D")
    if attn_bias is not None:
        wanted = (*query.shape[:3], key.shape[2])
        padded = (1,) * (4 - attn_bias.dim()) + tuple(attn_bias.shape)
        if len(padded) != 4 or any(size not in (1, want) for size, want in zip(padded, wanted, strict=True)):
            raise arguments.error(f"attn_bias must be broadcastable to (B,H,Lq,Lk) = {wanted}, got shape {tuple(attn_bias.shape)}")
        if not attn_bias.is_floating_point():
            raise arguments.error(f"attn_bias must be a floating point tensor (0 visible, -inf hidden), got {attn_bias.dtype}")
        if attn_bias.requires_grad:
            raise arguments.error("attn_bias gets no gradient: pass attn_bias.detach()")
    if is_causal and query.shape[2] != key.shape[2]:
        raise arguments.error(f"is_causal needs as many queries as tokens, got Lq={query.shape[2]} and Lk={key.shape[2]}")
    implementation = _PROMPT_ATTENTION.choose(
        impl, query, key, value, prompt_key, prompt_value, lengths=lengths, attn_bias=attn_bias
    )
    attend = sdpa_prompt_attention if implementation == "sdpa" else reference.prompt_attention
    return attend(
        query,
        key,
        value,
        prompt_key,
        prompt_value,
        lengths=lengths,
        attn_bias=attn_bias,
        is_causal=is_causal,
        dropout_p=dropout_p,
        scale=scale,
    )
