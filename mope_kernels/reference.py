"""Every op in plain PyTorch: the specification that each implementation is tested against.

Written to be checked against the papers and to run in float64; speed is no aim. Softmax, selection and
statistics are computed in float32 (float64 for float64 input), matrix products in the input dtype. Autocast is
switched off inside, so that an op gives what its arguments' dtypes say.

Sizes: B batch, H heads, L tokens (Lq queries, Lk keys), D width of a head, C width of the model, P prompts, K experts,
k selected experts, S static prompts, M instance prompts, N rows, s width of a router's query.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

Params = ParamSpec("Params")
Result = TypeVar("Result")


def autocast_off(device: torch.device) -> AbstractContextManager[object]:
    """Computation in the dtypes of the arguments. The meta device knows no autocast, and needs nothing."""
    # torch.amp.is_autocast_available would ask for any device, but torch 2.11 cannot compile a call of it.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _without_autocast(function: Callable[Params, Result]) -> Callable[Params, Result]:
    @functools.wraps(function)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        device = next(a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        with autocast_off(device):
            return function(*args, **kwargs)

    return run


def statistics_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def dense_weights(weights: Tensor, indices: Tensor, num_experts: int) -> Tensor:
    """Routing weights as a full matrix: (B,k), (B,k) -> (B,K), zero where an expert was not selected."""
    return weights.new_zeros(weights.shape[0], num_experts).scatter_add(1, indices, weights)


@_without_autocast
def route(
    logits: Tensor, *, top_k: int | None = None, temperature: float = 1.0, noise: Tensor | None = None, renormalize: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """r = softmax(logits / temperature + noise) and the experts that it selects.

    (B,K) -> weights (B,k), indices (B,k), probs (B,K); k = K if `top_k` is None. MoPE, arXiv 2403.10568, router equation.
    """
    z = logits.to(statistics_dtype(logits)) / temperature
    if noise is not None:
        z = z + noise.to(z.dtype)
    probs = z.softmax(-1)
    num_experts = logits.shape[1]
    if top_k is None:
        return probs, torch.arange(num_experts, device=logits.device).expand_as(probs), probs
    # Selection is on z: at a low temperature the probabilities underflow to ties. A stable sort gives ties to the lowest index.
    ranked = torch.where(probs.isnan(), 0.0, z.detach())
    indices = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = probs.gather(1, indices)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, indices, probs


@_without_autocast
def mix_prompts(experts: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Dynamic prompts, the weighted sum of the selected experts: (K,P,D), (B,k), (B,k) -> (B,P,D)."""
    dtype = statistics_dtype(experts, weights)
    mixture = dense_weights(weights.to(dtype), indices, experts.shape[0])
    return torch.einsum("bk,kpd->bpd", mixture, experts.to(dtype)).to(experts.dtype)


@_without_autocast
def importance_loss(probs: Tensor, *, threshold: float = 0.1) -> Tensor:
    """Squared coefficient of variation of the experts' loads, counted only above `threshold`: (..., B, K) -> (...)."""
    probs = probs.to(statistics_dtype(probs))
    if probs.numel() == 0 or probs.shape[-1] == 1:
        return probs.sum((-2, -1)) * 0.0
    load = probs.sum(-2)
    cv2 = load.var(-1, unbiased=True) / load.mean(-1).square()
    return torch.where(cv2 <= threshold, 0.0, cv2)


def _visible_tokens(lengths: Tensor | None, num_keys: int) -> Tensor | None:
    """(B,) -> (B,1,1,Lk), True where a token may be attended."""
    if lengths is None:
        return None
    return rearrange(torch.arange(num_keys, device=lengths.device) < lengths[:, None], "b l -> b 1 1 l")


def _softmax_or_zero(scores: Tensor) -> Tensor:
    """Softmax over the last axis; a row that is all -inf (no visible key at all) gives zeros, and zero gradient."""
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    return torch.where(nothing, 0.0, torch.where(nothing, 0.0, scores).softmax(-1))


def pad_items(rows: Tensor, offsets: Tensor, max_length: int) -> Tensor:
    """Packed items, item b in rows offsets[b] to offsets[b+1], padded with zeros: (1,H,T,D), (B+1,) -> (B,H,max_length,D)."""
    place = offsets[:-1, None] + torch.arange(max_length, device=offsets.device)
    if rows.shape[2] == 0:
        # Something to point at.
        rows = F.pad(rows, (0, 0, 0, 1))
    padded = rows[0].transpose(0, 1)[place.clamp(max=rows.shape[2] - 1)]
    return padded.masked_fill((place >= offsets[1:, None])[..., None, None], 0.0).transpose(1, 2)


def pack_items(padded: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    """The inverse of `pad_items`: (B,H,L,D), (B+1,) -> (1,H,T,D), laid out as (1,T,H,D)."""
    row = torch.arange(num_rows, device=offsets.device)
    item = torch.searchsorted(offsets[1:].contiguous(), row, right=True)
    return padded.transpose(1, 2)[item, row - offsets[item]][None].transpose(1, 2)


@_without_autocast
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
    """Attention over [prompts; tokens]: (B,H,Lq,D), (B,H,Lk,D) x2, (B|1,H,P,D) x2 -> (B,H,Lq,D); packed, (1,H,T,D) each."""
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
        # Padding may hold anything, and 0 * NaN is NaN: it is left out of the products, not multiplied by zero.
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
    # Heads beside each other in memory, so that the output projection reads (B, Lq, H*D) without a copy.
    return (attention @ values).transpose(1, 2).contiguous().transpose(1, 2)


def mix_bank(
    weights: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gram: Tensor | None = None,
    key_offset: Tensor | None = None,
    value_offset: Tensor | None = None,
    eps: float = 1e-5,
    task_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys and values of the routed prompts from the projected experts: (B,K), (K,H,P,D) x2 -> (B,H,P,D) x2.

    With `gram` (P,K,K), G_p[i,j] = <Ec_i, Ec_j> / d of the centred experts, the LayerNorm in front of the projection is
    applied afterwards: LN is linear but for its standard deviation, and that is sqrt(w' G_p w + eps).
    With `task_ids` (B,) banks and Gram matrices are those of T tasks, (T*K,H,P,D) and (T,P,K,K): item b has those of its own.
    """
    each = "b"
    if task_ids is None:
        each = ""
    else:
        key, value = (rearrange(bank, "(t k) h p d -> t k h p d", k=weights.shape[1])[task_ids] for bank in (key, value))
        gram = None if gram is None else gram[task_ids]
    inverse_std: Tensor | float = 1.0
    if gram is not None:
        variance = torch.einsum(f"bi,{each}pij,bj->bp", weights, gram.to(weights.dtype), weights).clamp_min(0.0)
        inverse_std = rearrange((variance + eps).rsqrt(), "b p -> b 1 p 1")

    def project(bank: Tensor, offset: Tensor | None) -> Tensor:
        mixed = torch.einsum(f"bk,{each}khpd->bhpd", weights, bank.to(weights.dtype)) * inverse_std
        return mixed if offset is None else mixed + rearrange(offset.to(weights.dtype), "h d -> 1 h 1 d")

    return project(key, key_offset), project(value, value_offset)


@_without_autocast
def mope_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logits: Tensor,
    bank_key: Tensor,
    bank_value: Tensor,
    *,
    gram: Tensor | None = None,
    key_offset: Tensor | None = None,
    value_offset: Tensor | None = None,
    eps: float = 1e-5,
    static_key: Tensor | None = None,
    static_value: Tensor | None = None,
    instance_key: Tensor | None = None,
    instance_value: Tensor | None = None,
    top_k: int | None = None,
    temperature: float = 1.0,
    noise: Tensor | None = None,
    renormalize: bool = False,
    lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    task_ids: Tensor | None = None,
    attend: Callable[..., Tensor] = prompt_attention,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention over [static; instance; routed prompts; tokens] -> out (B,H,Lq,D), weights, indices, probs.

    With `task_ids` (B,) banks (T*K,H,P,D), Gram matrices (T,P,K,K) and static prompts (T,H,S,D) are those of T tasks side by side.
    `attend` is given the prompts when they are mixed, as `prompt_attention` is.
    """
    batch = query.shape[0]
    weights, indices, probs = route(logits, top_k=top_k, temperature=temperature, noise=noise, renormalize=renormalize)
    mixture = dense_weights(weights, indices, logits.shape[1]).to(statistics_dtype(query, weights))
    routed_key, routed_value = mix_bank(
        mixture,
        bank_key,
        bank_value,
        gram=gram,
        key_offset=key_offset,
        value_offset=value_offset,
        eps=eps,
        task_ids=task_ids,
    )

    def prompts(static: Tensor | None, instance: Tensor | None, routed: Tensor) -> Tensor:
        parts = []
        if static is not None:
            parts.append(repeat(static, "h s d -> b h s d", b=batch) if task_ids is None else static[task_ids])
        parts += [] if instance is None else [instance]
        return torch.cat([*(part.to(routed.dtype) for part in parts), routed], dim=2)

    out = attend(
        query,
        key,
        value,
        prompts(static_key, instance_key, routed_key),
        prompts(static_value, instance_value, routed_value),
        lengths=lengths,
        dropout_p=dropout_p,
        scale=scale,
    )
    return out, weights, indices, probs


def window_partition(tokens: Tensor, resolution: int, window_size: int, shift: int) -> Tensor:
    """Tokens of an image, row by row, as shifted windows: (B, R*R, C) -> (B, nW, w*w, C)."""
    image = rearrange(tokens, "b (y x) c -> b y x c", y=resolution)
    image = image.roll((-shift, -shift), dims=(1, 2))
    return rearrange(image, "b (wy ny) (wx nx) c -> b (wy wx) (ny nx) c", ny=window_size, nx=window_size)


def window_reverse(windows: Tensor, resolution: int, window_size: int, shift: int) -> Tensor:
    """The inverse of `window_partition`: (B, nW, w*w, C) -> (B, R*R, C)."""
    per_side = resolution // window_size
    image = rearrange(windows, "b (wy wx) (ny nx) c -> b (wy ny) (wx nx) c", wy=per_side, ny=window_size)
    return rearrange(image.roll((shift, shift), dims=(1, 2)), "b y x c -> b (y x) c")


def shift_mask(resolution: int, window_size: int, shift: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What a shifted window adds to its scores: -100 between tokens of different regions of the image -> (nW, w*w, w*w)."""
    place = torch.arange(resolution, device=device)
    # Bands of rows, and of columns, that only meet because of the shift. Counted, not looked up: nothing is copied from the host.
    band = (place >= resolution - window_size).long() + (place >= resolution - shift).long()
    region = rearrange(3 * band[:, None] + band[None, :], "y x -> 1 (y x) 1")
    region = rearrange(window_partition(region, resolution, window_size, 0), "1 w n 1 -> w n")
    return torch.where(region[:, :, None] == region[:, None, :], 0.0, -100.0).to(dtype)


@_without_autocast
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
    """(Shifted) window attention in which every window also holds prompts: (B, P+R*R, 3C), (H, w*w, w*w) -> (B, P+R*R, C)."""
    batch, owner_is_instance = qkv.shape[0], prompt_owner == "instance"
    if resolution <= window_size:
        window_size, shift = resolution, 0
    num_windows, tokens_per_window = (resolution // window_size) ** 2, window_size**2
    prompts, tokens = qkv[:, :num_prompts], qkv[:, num_prompts:]

    # Window i = b * nW + w uses the prompts of item b, or in the released code's order of item i % B.
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


@_without_autocast
def add_norm(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    norm_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """A residual branch ends, the LayerNorm of the next one begins: (..., C) x2, (C,) x2 -> x + update, LN(x + update)."""
    total = x if update is None else x + update
    dtype = statistics_dtype(total)
    weight, bias = (t if t is None else t.to(dtype) for t in (weight, bias))
    normed = F.layer_norm(total.to(dtype), total.shape[-1:], weight, bias, eps)
    return total, normed.to(norm_dtype or total.dtype)


@_without_autocast
def prompted_norm(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    num_replaced: int,
    static: Tensor | None = None,
    experts: Tensor | None = None,
    mapped: Tensor | None = None,
    cross_logits: Tensor | None = None,
    self_weight: Tensor | None = None,
    self_bias: Tensor | None = None,
    self_keys: Tensor | None = None,
    noise: Tensor | None = None,
    routing: tuple[Tensor, Tensor, Tensor] | None = None,
    top_k: int | None = None,
    temperature: float = 1.0,
    renormalize: bool = False,
    eps: float = 1e-5,
    norm_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """Add, route by the mean of all rows and by psi, put prompts of one's own in front, normalise.

    (B,N,C) x2, (C,) x2, (S,C), (K,P,C), (B,M,C), (B,K), (s,C), (s,), (s,K) -> total and normed (B,S+P+M+N-num_replaced,C) each,
    (weights, indices, probs). MoPE, arXiv 2403.10568, the beginning of a routed block.
    """
    rows = x if update is None else x + update
    if experts is not None and routing is None:
        logits = cross_logits
        if self_weight is not None and self_keys is not None:
            dtype = statistics_dtype(rows, self_weight)
            query = F.linear(rows.mean(1, dtype=dtype), self_weight.to(dtype), None if self_bias is None else self_bias.to(dtype))
            self_logits = query @ self_keys.to(dtype)
            logits = self_logits if logits is None else self_logits + logits
        assert logits is not None
        routing = route(logits, top_k=top_k, temperature=temperature, noise=noise, renormalize=renormalize)
    prompts = [] if static is None else [static.expand(x.shape[0], -1, -1)]
    if experts is not None and routing is not None:
        prompts.append(mix_prompts(experts, routing[0], routing[1]))
    prompts += [] if mapped is None else [mapped]
    total = torch.cat([*(p.to(rows.dtype) for p in prompts), rows[:, num_replaced:]], dim=1)
    return *add_norm(total, None, weight, bias, eps=eps, norm_dtype=norm_dtype), routing


@_without_autocast
def expert_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    router_weight: Tensor | None = None,
    router_bias: Tensor | None = None,
    *,
    temperature: float = 10.0,
    activation: str = "relu",
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """x + sum_e w_e (U_e h + b_e), h = activation(W x + b), w = softmax(router(x) / temperature) per token (ModeX).

    (..., d), (r,d), (r,), (E,d,r), (E,d), (E,d), (E,) -> out (..., d), weights (..., E). Parameters are rounded to the dtype of x.
    """
    down_weight, down_bias, up_weight, up_bias = (t.to(x.dtype) for t in (down_weight, down_bias, up_weight, up_bias))
    activations: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}
    hidden = F.dropout(activations[activation](F.linear(x, down_weight, down_bias)), dropout_p)
    dtype = statistics_dtype(x)
    if router_weight is None or router_bias is None:
        weights = x.new_ones(*x.shape[:-1], 1, dtype=dtype)
    else:
        weights = (F.linear(x, router_weight.to(x.dtype), router_bias.to(x.dtype)).to(dtype) / temperature).softmax(-1)
    ups = torch.einsum("...r,edr->...ed", hidden, up_weight) + up_bias
    return x + torch.einsum("...e,...ed->...d", weights, ups.to(dtype)).to(x.dtype), weights


@_without_autocast
def gelu_mlp(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    """gelu(x W1' + b1) W2' + b2, gelu(h) = h Phi(h): (...,C), (F,C), (F,), (O,F), (O,) -> (...,O)."""
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)
