"""What a user would write instead, on the same tensors: the honest opponents.

*released* is the algorithm of the released systems, written plainly: experts are mixed for each item, then projected, put before
the tokens, and attended with a softmax of its own. *cat+sdpa*, *flex* and *xformers* start from the same expert bank as ours,
mix, concatenate and call the library. All compute what the op computes and are checked as ours is. Masks are made beforehand.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mope_kernels.reference import shift_mask, window_partition, window_reverse

from .shapes import Windows

# query (B,H,Lq,D), keys and values (B,H,P+Lk,D) -> (B,H,Lq,D)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# "cat+sdpa" leaves the choice to torch.
BACKENDS = {
    "cat+sdpa flash": SDPBackend.FLASH_ATTENTION,
    "cat+sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cat+sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "cat+sdpa math": SDPBackend.MATH,
}
# Of attention.
KINDS = ("released", "cat+sdpa", *BACKENDS, "flex", "xformers")


class Unavailable(Exception):
    """Why an opponent cannot run here."""


def released_route(logits: Tensor, top_k: int | None, temperature: float, threshold: float = 0.1) -> tuple[Tensor, ...]:
    """Weights, probabilities, and an importance loss whose threshold the host looks at."""
    probs = (logits.float() / temperature).softmax(-1)
    weights = probs if top_k is None else probs.topk(top_k).values
    load = probs.sum(0)
    loss = (load.std() / load.mean()) ** 2
    return weights, probs, loss if loss > threshold else loss * 0


def branchless_route(logits: Tensor, top_k: int | None, temperature: float, threshold: float = 0.1) -> tuple[Tensor, ...]:
    """The same without waiting for the device."""
    probs = (logits.float() / temperature).softmax(-1)
    weights = probs if top_k is None else probs.topk(top_k).values
    load = probs.sum(0)
    loss = load.var() / load.mean().square()
    return weights, probs, torch.where(loss > threshold, loss, 0.0)


def released_beginning(
    x: Tensor,
    update: Tensor,
    static: Tensor,
    experts: Tensor,
    mapped: Tensor,
    cross_logits: Tensor,
    self_weight: Tensor,
    self_bias: Tensor,
    self_keys: Tensor,
    norm: tuple[Tensor, Tensor],
    temperature: float,
    waits: bool = True,
) -> tuple[Tensor, ...]:
    """The end of a block and the beginning of a routed one as released: residual, prompts and their concatenation, LayerNorm.

    waits: the host draws noise and makes a mask that nobody uses, and copies both to the device. As results are compared, the
        noise is scaled to nothing here.
    """
    batch, prompts = x.shape[0], static.shape[0] + experts.shape[1] + mapped.shape[1]
    x = x + update
    pooled = F.adaptive_avg_pool1d(x.float().transpose(1, 2), 1).squeeze(-1)
    logits = F.linear(pooled, self_weight, self_bias) @ self_keys + cross_logits
    noise = torch.randn(logits.shape).to(logits.device) if waits else torch.randn_like(logits)
    probs = F.softmax(logits / temperature + 0.0 * noise, dim=-1)
    if waits:
        torch.zeros(probs.shape).to(probs.device).scatter_(1, probs.detach().topk(1, dim=-1).indices, 1)
    dynamic = torch.einsum("bk,bkpc->bpc", probs, experts.expand(batch, -1, -1, -1))
    own = (part.to(x.dtype) for part in (static.expand(batch, -1, -1), dynamic, mapped))
    x = torch.cat([*own, x[:, prompts:]], dim=1)
    return x, F.layer_norm(x, x.shape[-1:], *norm), probs


def mix_einsum(experts: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Dense routing as the released code does it; gather and sum where experts were selected."""
    if weights.shape[1] == experts.shape[0]:
        return torch.einsum("bk,kpd->bpd", weights.to(experts.dtype), experts)
    return (experts[indices] * weights.to(experts.dtype)[:, :, None, None]).sum(1)


def mix_embedding_bag(experts: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """A weighted sum of rows of a table."""
    flat = F.embedding_bag(indices, experts.flatten(1), per_sample_weights=weights.to(experts.dtype), mode="sum")
    return flat.unflatten(1, experts.shape[1:])


def released_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    router_weight: Tensor | None = None,
    router_bias: Tensor | None = None,
) -> Tensor:
    """A linear layer for each expert."""
    hidden = F.relu(F.linear(x, down_weight, down_bias))
    ups = [F.linear(hidden, weight, bias) for weight, bias in zip(up_weight, up_bias, strict=True)]
    if router_weight is None:
        return x + ups[0]
    weights = (F.linear(x, router_weight, router_bias) / 10.0).softmax(-1).to(x.dtype)
    for e, up in enumerate(ups):
        x = x + weights[..., e, None] * up
    return x


def adapters_of_a_library(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    router_weight: Tensor | None = None,
    router_bias: Tensor | None = None,
) -> Tensor:
    """As adapter libraries compose theirs: every expert a whole adapter of its own, and a weighted sum of what they give."""
    changes = [F.linear(F.relu(F.linear(x, down_weight, down_bias)), *up) for up in zip(up_weight, up_bias, strict=True)]
    if router_weight is None:
        return x + changes[0]
    weights = (F.linear(x, router_weight, router_bias) / 10.0).softmax(-1).to(x.dtype)
    return x + (weights[..., None] * torch.stack(changes, dim=-2)).sum(-2)


def adapter_in_two_products(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    router_weight: Tensor | None = None,
    router_bias: Tensor | None = None,
) -> Tensor:
    """What a careful user would write: down-projection and router in one product, all experts in another."""
    if router_weight is None or router_bias is None:
        return x + F.linear(F.relu(F.linear(x, down_weight, down_bias)), up_weight[0], up_bias[0])
    inner = F.linear(x, torch.cat([down_weight, router_weight]), torch.cat([down_bias, router_bias]))
    hidden, logits = inner.split([len(down_weight), len(router_weight)], dim=-1)
    weights = (logits / 10.0).softmax(-1).to(x.dtype)
    mixed = torch.cat([(weights[..., None] * F.relu(hidden)[..., None, :]).flatten(-2), weights], dim=-1)
    return x + mixed @ torch.cat([up_weight.mT.flatten(0, 1), up_bias])


def selected_weights(logits: Tensor, top_k: int | None, temperature: float) -> Tensor:
    """(B,K), zero where an expert was not selected."""
    probs = (logits.float() / temperature).softmax(-1)
    if top_k is None:
        return probs
    weights, indices = probs.topk(top_k)
    return torch.zeros_like(probs).scatter(1, indices, weights)


def prompts_from_bank(
    logits: Tensor,
    key: Tensor,
    value: Tensor,
    gram: Tensor | None,
    key_offset: Tensor,
    value_offset: Tensor,
    top_k: int | None,
    temperature: float,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Keys and values of the routed prompts, (B,H,P,D) float32: mixtures of the bank (K,H,P,D), LayerNorm folded in."""
    weights = selected_weights(logits, top_k, temperature)
    scale: Tensor | float = 1.0
    if gram is not None:
        scale = (torch.einsum("bi,pij,bj->bp", weights, gram, weights) + eps).rsqrt()[:, None, :, None]
    mixed_key, mixed_value = (torch.einsum("bk,khpd->bhpd", weights, bank) * scale for bank in (key, value))
    return mixed_key + key_offset[:, None], mixed_value + value_offset[:, None]


def prompts_of_items(
    logits: Tensor,
    experts: Tensor,
    norm: nn.Module,
    to_key: nn.Module,
    to_value: nn.Module,
    heads: int,
    top_k: int | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The same the released way: mix (K,P,C), then normalise and project the prompts of each item."""
    weights = selected_weights(logits, top_k, temperature)
    rows = norm(torch.einsum("bk,kpc->bpc", weights.to(experts.dtype), experts))
    key, value = (project(rows).unflatten(-1, (heads, -1)).transpose(1, 2) for project in (to_key, to_value))
    return key, value


def concatenate(tokens: Tensor, *prompts: Tensor) -> Tensor:
    """(B,H,L,D) behind prompts (B,H,P,D) or, for all items, (H,P,D)."""
    return torch.cat([*(p.to(tokens.dtype).expand(tokens.shape[0], -1, -1, -1) for p in prompts), tokens], dim=2)


def attention(kind: str, query: Tensor, num_keys: int, num_prompts: int, lengths: Tensor | None, training: bool) -> Attend:
    """Attention over prompts and tokens, keys beyond `lengths` hidden, its mask made here and now.

    kind: "released" (softmax of its own), "cat+sdpa" or one of `BACKENDS`, "flex" (to be compiled) or "xformers".

    Raises:
        Unavailable: it cannot run on this device.
    """
    total, mask = num_prompts + num_keys, None
    if lengths is not None:
        hidden = torch.arange(total, device=query.device) >= (lengths + num_prompts)[:, None]
        # In the dtype of the query: some kernels misread any other.
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill(hidden, -math.inf)
        mask = _aligned(mask)[:, None, None]
    if kind == "released":
        return lambda q, k, v: _own_softmax(q, k, v, mask)
    if kind.startswith("cat+sdpa"):
        return _sdpa(kind, None if mask is None else mask.expand(-1, query.shape[1], query.shape[2], -1))
    if kind == "flex":
        return _flex(query, total, lengths, num_prompts, training)
    if kind == "xformers":
        return _xformers(query, mask)
    raise ValueError(f"unknown attention {kind!r}")


def _aligned(mask: Tensor) -> Tensor:
    """The same in rows that start at multiples of 16 elements, which SDPA and xformers otherwise copy in every call, or refuse."""
    width = mask.shape[-1]
    return F.pad(mask, (0, -width % 16))[..., :width]


def _sdpa(kind: str, mask: Tensor | None) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if kind not in BACKENDS:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        with sdpa_kernel(BACKENDS[kind]):
            try:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            except RuntimeError as error:
                # On a CPU and on a GPU torch says so in other words.
                if re.search("No (viable backend|available kernel)", str(error)):
                    raise Unavailable("torch has no such kernel for these tensors") from error
                raise

    return attend


def _own_softmax(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    scores = query @ key.mT * query.shape[-1] ** -0.5
    return (scores if mask is None else scores + mask).softmax(-1) @ value


def _flex(query: Tensor, total: int, lengths: Tensor | None, num_prompts: int, training: bool) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if query.device.type == "cpu" and training:
        raise Unavailable("FlexAttention has no backward on the CPU")
    block_mask: Any = None
    if lengths is not None:
        ends = lengths + num_prompts
        block_mask = create_block_mask(
            lambda b, h, q, k: k < ends[b], query.shape[0], None, query.shape[2], total, device=query.device.type
        )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Any = flex_attention(q, k, v, block_mask=block_mask)
        return out

    return attend


def _xformers(query: Tensor, mask: Tensor | None) -> Attend:
    if importlib.util.find_spec("xformers") is None:
        raise Unavailable("xformers is not installed")
    if query.device.type == "cpu":
        raise Unavailable("xformers' kernels run on GPUs")
    from xformers.ops import memory_efficient_attention

    bias = None if mask is None else _aligned(mask.expand(-1, query.shape[1], query.shape[2], -1))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = memory_efficient_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_bias=bias)
        return out.transpose(1, 2)

    return attend


def windows_of(qkv: Tensor, shape: Windows) -> Tensor:
    """Rolled, cut into windows, and the image's prompts copied before the tokens of each: (3, B*nW, H, P + w*w, D)."""
    prompts, tokens = qkv[:, : shape.prompts], qkv[:, shape.prompts :]
    windows = window_partition(tokens, shape.resolution, shape.window, shape.shift)
    rows = torch.cat([prompts[:, None].expand(-1, windows.shape[1], -1, -1), windows], dim=2)
    return rearrange(rows, "b w n (three h d) -> three (b w) h n d", three=3, h=shape.heads)


def image_of(windows: Tensor, shape: Windows) -> Tensor:
    """Back again, prompts averaged over the windows: (B*nW, H, P + w*w, D) -> (B, P + R*R, C)."""
    rows = rearrange(windows, "(b w) h n d -> b w n (h d)", b=shape.batch)
    tokens = window_reverse(rows[:, :, shape.prompts :], shape.resolution, shape.window, shape.shift)
    return torch.cat([rows[:, :, : shape.prompts].mean(1), tokens], dim=1)


def window_attention(kind: str, position_bias: Tensor, shape: Windows, training: bool) -> Attend:
    """Attention in windows (B*nW, H, P + w*w, D), position bias and shift mask put together here and now.

    kind: as in `attention`.

    Raises:
        Unavailable: it cannot run on this device.
    """
    bias = position_bias[None]
    if shape.shift:
        mask = shift_mask(shape.resolution, shape.window, shape.shift, device=bias.device, dtype=bias.dtype)
        bias = bias + mask[:, None]
    # (1 or nW, H, P + w*w, P + w*w)
    bias = F.pad(bias, (shape.prompts, 0, shape.prompts, 0))
    if kind == "flex":
        return _flex_windows(bias, training)
    if kind == "released":

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (t.unflatten(0, (-1, len(bias))) for t in (query, key, value))
            return _own_softmax(query, key, value, bias).flatten(0, 1)

        return attend
    # One for all windows where none is masked.
    every, windows = _aligned(bias), shape.batch * (shape.resolution // shape.window) ** 2
    if shape.shift:
        every = F.pad(bias, (0, -bias.shape[3] % 16)).repeat(shape.batch, 1, 1, 1)[..., : bias.shape[3]]
    every = every.expand(windows, -1, -1, -1)
    if kind.startswith("cat+sdpa"):
        return _sdpa(kind, every)
    if kind == "xformers":
        return _xformers(every.new_empty(*every.shape[:3], 0), every)
    raise ValueError(f"unknown attention {kind!r}")


def _flex_windows(bias: Tensor, training: bool) -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    if bias.device.type == "cpu" and training:
        raise Unavailable("FlexAttention has no backward on the CPU")
    windows = len(bias)

    def add_bias(score: Tensor, window: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[window % windows, head, query, key]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Any = flex_attention(q, k, v, score_mod=add_bias)
        return out

    return attend


def released_layer(layer: Any, x: Tensor, cross: Tensor, mapped: Tensor, lengths: Tensor | None = None) -> Tensor:
    """One prompted layer as released: prompts before the tokens through the whole layer, their own outputs cut off again.

    layer: norm (or None), query, key, value, output, heads, and prompts with router, static (S,C) and experts.prompts (K,P,C).
    """
    batch, tokens, _ = x.shape
    router, visible = layer.prompts.router, None
    pooled = x.float().mean(1)
    if lengths is not None:
        visible = torch.arange(tokens, device=x.device) < lengths[:, None]
        pooled = (x.float() * visible[..., None]).sum(1) / lengths[:, None]
    query = torch.cat([router.self_projection(pooled), router.cross_projection(cross)], dim=-1)
    weights = (query @ router.expert_embedding / router.temperature).softmax(-1)
    dynamic = torch.einsum("bk,kpc->bpc", weights, layer.prompts.experts.prompts).to(x.dtype)
    rows = torch.cat([layer.prompts.static.to(x.dtype).expand(batch, -1, -1), mapped, dynamic, x], dim=1)
    prompts, mask = rows.shape[1] - tokens, None
    if visible is not None:
        hidden = torch.zeros(visible.shape, dtype=x.dtype, device=x.device).masked_fill(~visible, -math.inf)
        mask = F.pad(hidden, (prompts, 0))[:, None, None]
    rows = rows if layer.norm is None else layer.norm(rows)
    q, k, v = (p(rows).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for p in (layer.query, layer.key, layer.value))
    return layer.output(_own_softmax(q, k, v, mask).transpose(1, 2).flatten(2))[:, prompts:]
