"""Launchers of the Triton kernels of the fused MoPE attention. The first call imports Triton."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from mope_kernels._ops import empty_heads_last, not_needed, triton_kernel
from mope_kernels._triton import cdiv, launch, next_power_of_2
from mope_kernels.prompt_attention_details._launch import (
    aligned_rows,
    attention_backward,
    blocks_for,
    dot_precision,
    keep_scale,
    needs_wide_offsets,
    options,
    prompt_block,
    same_strides,
)
from mope_kernels.route_details._launch import empty_routing, route_backward

from .spec import GRADIENTS, INSTANCE, SHARED


class _Prompts:
    """Sources of the prompts, ready to be passed to a kernel. Missing ones are None."""

    def __init__(
        self,
        bank_key: Tensor,
        bank_value: Tensor,
        gram: Tensor | None,
        key_offset: Tensor | None,
        value_offset: Tensor | None,
        static_key: Tensor | None,
        static_value: Tensor | None,
        instance_key: Tensor | None,
        instance_value: Tensor | None,
    ) -> None:
        num_static = 0 if static_key is None else static_key.shape[-2]
        num_instance = 0 if instance_key is None else instance_key.shape[2]
        num_routed = bank_key.shape[2]
        self.sizes = (num_static, num_instance, num_routed)
        self.strides: tuple[tuple[int, ...], ...] = ()
        pairs: list[Tensor | None] = []
        for key, value in ((bank_key, bank_value), (static_key, static_value), (instance_key, instance_value)):
            if key is None or value is None or key.numel() == 0:
                pairs += [None, None]
                self.strides += ((0, 0, 0),)
            else:
                key, value = same_strides(key, value)
                pairs += [key, value]
                # All items share the static prompts unless these are per task.
                self.strides += ((0,) * (4 - key.dim()) + key.stride()[:-1],)
        small = (t.contiguous() if t is not None and num_routed else None for t in (gram, key_offset, value_offset))
        self.matrices = tuple(pairs)
        self.tensors = (*pairs[:2], *small, *pairs[2:])


@triton_kernel("mope_attention")
def mope_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logits: Tensor,
    noise: Tensor | None,
    bank_key: Tensor,
    bank_value: Tensor,
    gram: Tensor | None,
    key_offset: Tensor | None,
    value_offset: Tensor | None,
    static_key: Tensor | None,
    static_value: Tensor | None,
    instance_key: Tensor | None,
    instance_value: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    top_k: int,
    temperature: float,
    renormalize: bool,
    eps: float,
    scale: float,
    dropout_p: float,
    task_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from ._forward import mope_attention_forward

    if dropout_p and seed is None:
        raise ValueError(f"mope_attention: dropout_p={dropout_p} needs a seed, an int64 tensor of shape (1,) on {query.device}")
    query, key, value = (aligned_rows(t) for t in (query, key, value))
    prompts = _Prompts(bank_key, bank_value, gram, key_offset, value_offset, static_key, static_value, instance_key, instance_value)
    batch, heads, num_queries, width = query.shape
    num_experts = logits.shape[1]
    out = empty_heads_last(query, batch, heads, num_queries, width)
    lse = torch.empty(batch, heads, num_queries, dtype=torch.float64, device=query.device)
    probs, weights, indices = empty_routing(logits, top_k)
    blocks = blocks_for("forward", query, dropped=dropout_p > 0.0)
    num_prompts, prompts_at_once = sum(prompts.sizes), prompt_block(sum(prompts.sizes), query)
    if num_prompts > prompts_at_once:
        # A loop over the prompts needs additional registers.
        blocks = blocks._replace(keys=min(blocks.keys, 64 // query.element_size()))
    launch(
        mope_attention_forward,
        batch * heads * max(cdiv(num_queries, blocks.queries), 1),
        query,
        key,
        value,
        logits.contiguous(),
        None if noise is None else noise.contiguous(),
        *prompts.tensors,
        lengths,
        seed if dropout_p else None,
        None if task_ids is None else task_ids.contiguous(),
        out,
        lse,
        probs,
        weights,
        indices,
        query.stride()[:3],
        key.stride()[:3],
        value.stride()[:3],
        prompts.strides,
        num_queries,
        key.shape[2],
        temperature,
        eps,
        scale * math.log2(math.e),
        dropout_p,
        keep_scale(dropout_p),
        H=heads,
        K=num_experts,
        TOP_K=top_k,
        RENORMALIZE=renormalize,
        SIZES=prompts.sizes,
        D=width,
        BK=next_power_of_2(num_experts),
        BD=next_power_of_2(width),
        WIDE=needs_wide_offsets(query, key, value, out, *prompts.matrices),
        BP=prompts_at_once,
        BM=blocks.queries,
        BN=blocks.keys,
        PRECISION=dot_precision(query),
        **options(blocks, query, dropped=dropout_p > 0.0),
    )
    return out, lse, probs, weights, indices


def _build_prompts(
    query: Tensor, probs: Tensor, weights: Tensor, indices: Tensor, prompts: _Prompts, eps: float
) -> tuple[Tensor, Tensor]:
    """Build the keys and values (B,H,N,D) of the prompts, which the forward kernel kept on chip."""
    from ._prompts import build_prompts

    (batch, heads, _, width), num_experts, top_k = query.shape, probs.shape[1], weights.shape[1]
    num_prompts = sum(prompts.sizes)
    prompt_key = torch.empty(batch, heads, num_prompts, width, dtype=query.dtype, device=query.device)
    prompt_value = torch.empty_like(prompt_key)
    selected = top_k or num_experts
    launch(
        build_prompts,
        batch * heads * cdiv(num_prompts, prompt_block(num_prompts, query)),
        weights.contiguous() if top_k else probs.contiguous(),
        indices.contiguous() if top_k else None,
        *prompts.tensors,
        prompt_key,
        prompt_value,
        prompts.strides,
        eps,
        H=heads,
        K=num_experts,
        SELECTED=selected,
        SIZES=prompts.sizes,
        D=width,
        BT=next_power_of_2(selected),
        BD=next_power_of_2(width),
        WIDE=needs_wide_offsets(prompt_key, *prompts.matrices),
        BP=prompt_block(num_prompts, query),
        num_warps=2,
    )
    return prompt_key, prompt_value


def _prompt_gradients(
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    weights: Tensor,
    bank_key: Tensor,
    bank_value: Tensor,
    gram: Tensor | None,
    eps: float,
    sizes: tuple[int, int, int],
    need: Collection[str],
) -> dict[str, Tensor]:
    """Propagate the gradients (B,H,N,D) of the prompts to their sources; "mixture" is the gradient of the weights (B,K).

    Let m = sum_j w_j B_j and s = (w' G w + eps)^-1/2. The routed prompt without its offset is s m, and
    dB_j = w_j s dP, dw_j = s <dP, B_j> + dv ((G + G') w)_j, dG = dv w w', where dv = -s^3 <dP, m> / 2.
    Everything is computed in float32 as matrix products over item or over (head, D), so the summation order is fixed.
    """
    found: dict[str, Tensor] = {}
    inverse_std = weights.new_ones(len(weights), sizes[2])
    if gram is not None:
        gram = gram.float()
        variance = torch.einsum("bi,pij,bj->bp", weights, gram, weights)
        inverse_std = (variance.clamp_min(0.0) + eps).rsqrt()

    # <dP, B_j> for each routed prompt: (B,K,P)
    products = weights.new_zeros(*weights.shape, sizes[2])
    for side, grad, bank in (("key", grad_key, bank_key), ("value", grad_value, bank_value)):
        if grad is None:
            continue
        static, instance, routed = grad.split(sizes, dim=2)
        if f"static_{side}" in need:
            found[f"static_{side}"] = static.sum(0)
        if f"instance_{side}" in need:
            found[f"instance_{side}"] = instance
        if f"{side}_offset" in need:
            found[f"{side}_offset"] = routed.sum((0, 2))
        if f"bank_{side}" in need:
            found[f"bank_{side}"] = torch.einsum("bk,bp,bhpd->khpd", weights, inverse_std, routed)
        if "logits" in need or "gram" in need:
            products += torch.einsum("bhpd,khpd->bkp", routed, bank.float())

    found["mixture"] = torch.einsum("bkp,bp->bk", products, inverse_std)
    if gram is not None:
        grad_variance = -0.5 * inverse_std**3 * torch.einsum("bk,bkp->bp", weights, products)
        grad_variance = torch.where(variance < 0.0, 0.0, grad_variance)
        found["mixture"] += torch.einsum("bp,pij,bj->bi", grad_variance, gram + gram.mT, weights)
        found["gram"] = torch.einsum("bp,bi,bj->pij", grad_variance, weights, weights)
    return found


@triton_kernel("mope_attention_backward")
def mope_attention_backward(
    grad_out: Tensor,
    grad_probs: Tensor | None,
    grad_weights: Tensor | None,
    out: Tensor,
    lse: Tensor,
    probs: Tensor,
    weights: Tensor,
    indices: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logits: Tensor,
    noise: Tensor | None,
    bank_key: Tensor,
    bank_value: Tensor,
    gram: Tensor | None,
    key_offset: Tensor | None,
    value_offset: Tensor | None,
    static_key: Tensor | None,
    static_value: Tensor | None,
    instance_key: Tensor | None,
    instance_value: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    top_k: int,
    temperature: float,
    renormalize: bool,
    eps: float,
    scale: float,
    dropout_p: float,
    needs: int,
) -> tuple[Tensor, ...]:
    need = GRADIENTS.asked(needs)
    query, key, value = (aligned_rows(t) for t in (query, key, value))
    prompts = _Prompts(bank_key, bank_value, gram, key_offset, value_offset, static_key, static_value, instance_key, instance_value)
    prompt_key, prompt_value = _build_prompts(query, probs, weights, indices, prompts, eps)

    need_prompts = set()
    for side in ("key", "value"):
        # The weights and the standard deviation affect both keys and values.
        if not need.isdisjoint({"logits", "gram", f"bank_{side}", f"{side}_offset", f"static_{side}", f"instance_{side}"}):
            need_prompts.add(f"prompt_{side}")
    found = attention_backward(
        grad_out,
        out,
        lse,
        query,
        key,
        value,
        prompt_key,
        prompt_value,
        lengths,
        seed if dropout_p else None,
        scale,
        dropout_p,
        need | need_prompts,
    )
    mixture = torch.zeros_like(probs).scatter(1, indices, weights) if top_k else probs
    grad_key, grad_value = found.get("prompt_key"), found.get("prompt_value")
    with torch.autocast(query.device.type, enabled=False):
        found |= _prompt_gradients(grad_key, grad_value, mixture, bank_key, bank_value, gram, eps, prompts.sizes, need)
    if "logits" in need:
        if top_k:
            selected = found["mixture"].gather(1, indices)
            grad_weights = selected if grad_weights is None else grad_weights + selected
        else:
            grad_probs = found["mixture"] if grad_probs is None else grad_probs + found["mixture"]
        found["logits"] = route_backward(grad_probs, grad_weights, probs, weights, indices, temperature, renormalize)

    # The gradient of the logits stays in float32, as the router's backward returns it.
    shared = (bank_key, bank_value, gram, key_offset, value_offset, static_key, static_value, instance_key, instance_value)
    for name, like in zip((*SHARED, *INSTANCE), shared, strict=True):
        if name in need and like is not None:
            found[name] = found[name].to(like.dtype).contiguous()
    return tuple(found[name] if name in need else not_needed(query) for name in GRADIENTS.names)
