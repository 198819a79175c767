"""Launchers of the router's Triton kernels. The first call imports Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from mope_kernels._checks import last_dim_contiguous
from mope_kernels._ops import triton_kernel
from mope_kernels._triton import launch, next_power_of_2

from .spec import empty_routing as empty_routing


def _warps(num_experts: int) -> int:
    # Ranking keeps 16 scores per expert in registers.
    return min(max(next_power_of_2(num_experts) // 64, 1), 8)


@triton_kernel("route")
def route(logits: Tensor, noise: Tensor | None, top_k: int, temperature: float, renormalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    from ._forward import route_forward

    logits = last_dim_contiguous(logits)
    noise = None if noise is None else last_dim_contiguous(noise)
    batch, num_experts = logits.shape
    probs, weights, indices = empty_routing(logits, top_k)
    launch(
        route_forward,
        batch,
        logits,
        noise,
        probs,
        weights,
        indices,
        logits.stride(0),
        0 if noise is None else noise.stride(0),
        temperature,
        K=num_experts,
        TOP_K=top_k,
        RENORMALIZE=renormalize,
        BK=next_power_of_2(num_experts),
        num_warps=_warps(num_experts),
    )
    return probs, weights, indices


@triton_kernel("route_backward")
def route_backward(
    grad_probs: Tensor | None,
    grad_weights: Tensor | None,
    probs: Tensor,
    weights: Tensor,
    indices: Tensor,
    temperature: float,
    renormalize: bool,
) -> Tensor:
    from ._backward import route_backward

    batch, num_experts = probs.shape
    top_k = weights.shape[1]
    grad_logits = torch.empty_like(probs, memory_format=torch.contiguous_format)
    launch(
        route_backward,
        batch,
        None if grad_probs is None else grad_probs.contiguous(),
        None if grad_weights is None or top_k == 0 else grad_weights.contiguous(),
        probs.contiguous(),
        weights.contiguous(),
        indices.contiguous(),
        grad_logits,
        temperature,
        K=num_experts,
        TOP_K=top_k,
        RENORMALIZE=renormalize,
        BK=next_power_of_2(num_experts),
        BT=min(next_power_of_2(top_k), 16),
        num_warps=_warps(num_experts),
    )
    return grad_logits
