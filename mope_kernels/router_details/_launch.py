"""Launchers of the router's Triton kernels. Triton is imported by the first call."""

from __future__ import annotations

import torch
from torch import Tensor

from mope_kernels._checks import last_dim_contiguous
from mope_kernels._ops import triton_kernel
from mope_kernels._triton import launch, next_power_of_2


def _warps(num_experts: int) -> int:
    # Ranking holds 16 scores for each expert in registers.
    return min(max(next_power_of_2(num_experts) // 64, 1), 8)


def empty_routing(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised probs (B,K), weights and indices (B,k)."""
    probs = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    return probs, probs.new_empty(len(logits), top_k), probs.new_empty(len(logits), top_k, dtype=torch.int64)


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


@triton_kernel("importance_loss")
def importance_loss(probs: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    from ._importance import importance_forward

    probs = last_dim_contiguous(probs)
    blocks, batch, num_experts = probs.shape
    loss, load = (torch.empty(shape, dtype=torch.float32, device=probs.device) for shape in ((blocks,), (blocks, num_experts)))
    block = next_power_of_2(num_experts)
    launch(
        importance_forward,
        blocks,
        probs,
        loss,
        load,
        batch,
        probs.stride(0),
        probs.stride(1),
        threshold,
        K=num_experts,
        BB=max(4096 // block, 1),
        BK=block,
        num_warps=4,
    )
    return loss, load


@triton_kernel("importance_loss_backward")
def importance_loss_backward(grad_loss: Tensor, load: Tensor, threshold: float) -> Tensor:
    from ._importance import importance_backward

    blocks, num_experts = load.shape
    grad, block = torch.empty_like(load), next_power_of_2(num_experts)
    launch(importance_backward, blocks, grad_loss.contiguous(), load, grad, threshold, K=num_experts, BK=block, num_warps=1)
    return grad
