"""Launchers of the Triton kernels at the start of a routed block. The first call imports Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from mope_kernels._checks import last_dim_contiguous
from mope_kernels._ops import triton_kernel
from mope_kernels._triton import cdiv, launch, next_power_of_2
from mope_kernels.add_norm_details._launch import add_norm_rows, add_norm_rows_backward, row_blocks
from mope_kernels.mix_prompts_details._launch import mixture_backward

from .spec import GRADIENTS, ROUTER

# Maximum number of partial sums per item, because the second kernel adds them up in one block.
MOST_CHUNKS = 64


@triton_kernel("prompted_norm")
def prompted_norm(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    static: Tensor | None,
    experts: Tensor | None,
    mapped: Tensor | None,
    cross_logits: Tensor | None,
    self_weight: Tensor | None,
    self_bias: Tensor | None,
    self_keys: Tensor | None,
    routing_weights: Tensor | None,
    routing_indices: Tensor | None,
    noise: Tensor | None,
    num_replaced: int,
    top_k: int,
    temperature: float,
    renormalize: bool,
    eps: float,
    norm_dtype: torch.dtype,
    keep_pooled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from ._forward import place_prompts

    batch, num_rows, width = x.shape
    static, experts, mapped = (None if t is None else last_dim_contiguous(t) for t in (static, experts, mapped))
    sizes = (
        0 if static is None else static.shape[0],
        0 if experts is None else experts.shape[1],
        0 if mapped is None else mapped.shape[1],
    )
    num_experts = 0 if experts is None else experts.shape[0]
    routed = experts is not None and routing_weights is None
    query = 0 if self_weight is None else self_weight.shape[0]
    dtype = x.dtype if update is None else torch.promote_types(x.dtype, update.dtype)
    shape = (batch, sum(sizes) + num_rows - num_replaced, width)
    total = torch.empty(shape, dtype=dtype, device=x.device)
    normed = torch.empty(shape, dtype=norm_dtype, device=x.device)
    probs = torch.empty(batch, num_experts if routed else 0, dtype=torch.float32, device=x.device)
    weights = probs.new_empty(batch, top_k if routed else 0)
    indices = probs.new_empty(batch, weights.shape[1] or probs.shape[1], dtype=torch.int64)
    pooled = probs.new_empty((batch, width) if keep_pooled else (0, width))

    # If the router uses the mean, each program writes a partial sum, so use longer chunks, and few enough to fit in one block.
    blocks = row_blocks(num_rows, width, steps=4 if query else 2, most_chunks=MOST_CHUNKS if query else None)
    seen = probs.new_empty(batch, blocks.chunks, query) if query else None
    sums = probs.new_empty(batch, blocks.chunks, width) if keep_pooled else None
    weight, bias, self_weight, self_bias, self_keys = (
        None if t is None else t.contiguous() for t in (weight, bias, self_weight, self_bias, self_keys)
    )
    add_norm_rows(
        last_dim_contiguous(x),
        None if update is None else last_dim_contiguous(update),
        weight,
        bias,
        total,
        normed,
        eps,
        blocks,
        num_replaced=num_replaced,
        first_out=sum(sizes),
        self_weight=self_weight,
        seen=seen,
        sums=sums,
    )
    # The program of the first routed row also stores the routing, so it runs even if there is no row to write.
    programs = max(sum(sizes), sizes[0] + 1) if routed else sum(sizes)
    selected = top_k or num_experts
    if routing_weights is not None:
        selected = routing_weights.shape[1]
    columns, slots = next_power_of_2(width), next_power_of_2(num_experts)
    num_warps = min(max(columns // 128, slots // 64, 1), 8 if columns <= 8192 else 16)
    experts_at_once = min(next_power_of_2(selected), max(1024 * num_warps // columns, 1), 16)
    others = tuple(None if t is None else last_dim_contiguous(t) for t in (cross_logits, noise, routing_weights, routing_indices))
    launch(
        place_prompts,
        batch * programs,
        static,
        experts,
        mapped,
        weight,
        bias,
        seen,
        sums,
        self_bias,
        self_keys,
        *others,
        total,
        normed,
        probs,
        weights,
        indices,
        pooled if keep_pooled else None,
        0 if static is None else static.stride(0),
        (0, 0) if experts is None else experts.stride()[:2],
        (0, 0) if mapped is None else mapped.stride()[:2],
        *(0 if t is None else t.stride(0) for t in others),
        total.stride(0),
        num_rows,
        blocks.chunks,
        temperature,
        eps,
        C=width,
        SIZES=sizes,
        PROGRAMS=programs,
        K=num_experts,
        QUERY=query,
        SELECTED=selected,
        TOP_K=top_k,
        RENORMALIZE=renormalize,
        CHUNKS=MOST_CHUNKS,
        BQ=min(next_power_of_2(query), 4),
        BK=slots,
        BT=experts_at_once,
        BR=max(512 * num_warps // columns, 1),
        BC=columns,
        num_warps=num_warps,
    )
    return total, normed, probs, weights, indices, pooled


@triton_kernel("prompted_norm_backward")
def prompted_norm_backward(
    grad_total: Tensor | None,
    grad_normed: Tensor | None,
    grad_probs: Tensor | None,
    grad_weights: Tensor | None,
    total: Tensor,
    probs: Tensor,
    weights: Tensor,
    indices: Tensor,
    pooled: Tensor,
    weight: Tensor | None,
    experts: Tensor | None,
    self_weight: Tensor | None,
    self_bias: Tensor | None,
    self_keys: Tensor | None,
    num_rows: int,
    num_replaced: int,
    num_static: int,
    num_mapped: int,
    temperature: float,
    renormalize: bool,
    eps: float,
    x_dtype: torch.dtype,
    update_dtype: torch.dtype,
    needs: int,
) -> tuple[Tensor, ...]:
    needed = GRADIENTS.asked(needs)
    # The forward writes them contiguously, but saved-tensor hooks may have changed that.
    total, experts = last_dim_contiguous(total), None if experts is None else last_dim_contiguous(experts)
    probs, weights, indices, pooled = (t.contiguous() for t in (probs, weights, indices, pooled))
    batch, num_out, width = total.shape
    num_prompts = num_out - (num_rows - num_replaced)
    need_weight, need_bias = "weight" in needed, "bias" in needed
    found: dict[str, Tensor | None] = {}

    through_router = {"cross_logits"} if self_keys is None else {"cross_logits", "x", "update", *ROUTER}
    need_logits = probs.shape[1] > 0 and not needed.isdisjoint(through_router)

    # First the prompt rows, in float32 because their gradients are summed over the batch.
    grad_prompts = torch.empty(batch, num_prompts, width, dtype=torch.float32, device=total.device)
    prompt_sums: tuple[Tensor | None, Tensor | None] = (None, None)
    if need_logits or needed - {"x", "update"}:
        prompt_sums = add_norm_rows_backward(
            grad_total,
            grad_normed,
            total,
            weight,
            grad_prompts,
            None,
            eps,
            num_rows=num_prompts,
            need_weight=need_weight,
            need_bias=need_bias,
        )
    if "mapped" in needed:
        found["mapped"] = grad_prompts[:, num_prompts - num_mapped :]

    # Dense routing uses every expert in order, weighted by its probability.
    dense = weights.shape[1] == 0
    mixture, chosen = (probs, None) if dense else (weights, indices)
    grad_mixture = grad_query = None
    if experts is not None and (need_logits or "routing_weights" in needed):
        grad_routed = grad_prompts[:, num_static : num_prompts - num_mapped]
        grad_mixture = found["routing_weights"] = mixture_backward(grad_routed, experts, mixture, chosen)
    if need_logits and grad_mixture is not None:
        if grad_weights is not None and not dense:
            grad_mixture = grad_mixture + grad_weights
        grad_logits, grad_query = _router_backward(
            grad_probs, grad_mixture, probs, mixture, chosen, self_keys, temperature, renormalize
        )
        found["cross_logits"] = grad_logits
        if "self_keys" in needed and self_weight is not None:
            with torch.autocast(total.device.type, enabled=False):
                query = pooled @ self_weight.float().T
                found["self_keys"] = (query if self_bias is None else query + self_bias).T @ grad_logits
    found |= _shared_backward(needed, grad_prompts, num_static, experts, mixture, chosen, grad_query, pooled)

    if not needed.isdisjoint(("x", "update", "weight", "bias")):
        for name, dtype in (("x", x_dtype), ("update", update_dtype)):
            if name in needed:
                found[name] = torch.empty(batch, num_rows, width, dtype=dtype, device=total.device)
        token_sums = add_norm_rows_backward(
            grad_total,
            grad_normed,
            total,
            weight,
            found.get("x"),
            found.get("update"),
            eps,
            num_rows=num_rows,
            num_replaced=num_replaced,
            first_out=num_prompts,
            grad_query=grad_query,
            self_weight=None if self_weight is None else self_weight.contiguous(),
            need_weight=need_weight,
            need_bias=need_bias,
        )
        for name, of_tokens, of_prompts in zip(("weight", "bias"), token_sums, prompt_sums, strict=True):
            found[name] = of_tokens if of_tokens is None or of_prompts is None else of_tokens + of_prompts
    return tuple(
        gradient
        if name in needed and (gradient := found[name]) is not None
        else torch.empty(0, dtype=torch.float32, device=total.device)
        for name in GRADIENTS.names
    )


def _router_backward(
    grad_probs: Tensor | None,
    grad_mixture: Tensor,
    probs: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    self_keys: Tensor | None,
    temperature: float,
    renormalize: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute the gradient of the logits (B,K) and, if there are keys, of the query (B,s)."""
    from ._backward import router_backward

    batch, num_experts = probs.shape
    selected = weights.shape[1]
    grad_logits = torch.empty_like(probs, memory_format=torch.contiguous_format)
    grad_query = None if self_keys is None else probs.new_empty(batch, self_keys.shape[0])
    launch(
        router_backward,
        batch,
        None if grad_probs is None else grad_probs.contiguous(),
        grad_mixture,
        probs,
        weights,
        indices,
        None if self_keys is None else self_keys.contiguous(),
        grad_logits,
        grad_query,
        temperature,
        K=num_experts,
        TOP_K=selected,
        RENORMALIZE=renormalize,
        QUERY=0 if self_keys is None else self_keys.shape[0],
        BK=next_power_of_2(num_experts),
        BT=min(next_power_of_2(selected), 16),
        num_warps=min(max(next_power_of_2(num_experts) // 64, 1), 8),
    )
    return grad_logits, grad_query


def _shared_backward(
    needed: set[str],
    grad_prompts: Tensor,
    num_static: int,
    experts: Tensor | None,
    weights: Tensor,
    indices: Tensor | None,
    grad_query: Tensor | None,
    pooled: Tensor,
) -> dict[str, Tensor]:
    """Compute, in one launch, the gradients that all items share: static prompts, experts, the router's weight and bias."""
    from ._backward import shared_backward

    batch, num_prompts, width = grad_prompts.shape
    found: dict[str, Tensor] = {}
    if "static" in needed:
        found["static"] = grad_prompts.new_empty(num_static, width)
    if "experts" in needed and experts is not None:
        found["experts"] = torch.empty_like(experts, memory_format=torch.contiguous_format)
    if grad_query is not None and not needed.isdisjoint(("self_weight", "self_bias")):
        found["self_weight"] = grad_prompts.new_empty(grad_query.shape[1], width)
        found["self_bias"] = grad_prompts.new_empty(grad_query.shape[1])
    sizes = {name: found[name].numel() // width if name in found else 0 for name in ("static", "experts", "self_weight")}
    block = min(next_power_of_2(width), 128)
    # Gradients that are not requested have no rows, so their placeholder pointers are never used.
    pointers = (found.get(name, grad_prompts) for name in ("static", "experts", "self_weight", "self_bias"))
    launch(
        shared_backward,
        sum(sizes.values()) * cdiv(width, block),
        grad_prompts,
        weights,
        indices,
        grad_prompts if grad_query is None else grad_query,
        pooled,
        *pointers,
        batch,
        weights.stride(0),
        0 if indices is None else indices.stride(0),
        C=width,
        ROWS=num_prompts,
        S=num_static,
        P=max(experts.shape[1], 1) if experts is not None else 1,
        STATIC_ROWS=sizes["static"],
        EXPERT_ROWS=sizes["experts"],
        QUERY=sizes["self_weight"],
        SELECTED=weights.shape[1],
        BB=16,
        BT=min(next_power_of_2(weights.shape[1]), 32),
        BC=block,
        num_warps=4,
    )
    return found
