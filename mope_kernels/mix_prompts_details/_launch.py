"""Launchers of the Triton kernels that mix expert prompts. The first call imports Triton."""

from __future__ import annotations

from torch import Tensor

from mope_kernels._checks import last_dim_contiguous
from mope_kernels._ops import not_needed, triton_kernel
from mope_kernels._triton import cdiv, launch, next_power_of_2

from .spec import GRADIENTS


@triton_kernel("mix_prompts")
def mix_prompts(experts: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    from ._forward import mix_forward

    experts, weights, indices = (last_dim_contiguous(t) for t in (experts, weights, indices))
    batch, top_k = weights.shape
    _, num_prompts, width = experts.shape
    out = experts.new_empty(batch, num_prompts, width)
    block = min(next_power_of_2(num_prompts * width), 1024)
    launch(
        mix_forward,
        batch * cdiv(num_prompts * width, block),
        experts,
        weights,
        indices,
        out,
        experts.stride(0),
        experts.stride(1),
        weights.stride(0),
        indices.stride(0),
        P=num_prompts,
        D=width,
        TOP_K=top_k,
        BE=block,
        num_warps=4,
    )
    return out


@triton_kernel("mix_prompts_backward")
def mix_prompts_backward(grad_out: Tensor, experts: Tensor, weights: Tensor, indices: Tensor, needs: int) -> tuple[Tensor, Tensor]:
    from ._backward import mix_backward_experts

    grad_out, experts, weights, indices = (last_dim_contiguous(t) for t in (grad_out, experts, weights, indices))
    batch, top_k = weights.shape
    num_experts, num_prompts, width = experts.shape
    grad_experts, grad_weights = not_needed(experts), not_needed(weights)
    asked = GRADIENTS.asked(needs)
    if "experts" in asked:
        grad_experts = experts.new_empty(experts.shape)
        block = min(next_power_of_2(num_prompts * width), 128)
        launch(
            mix_backward_experts,
            num_experts * cdiv(num_prompts * width, block),
            grad_out,
            weights,
            indices,
            grad_experts,
            batch,
            grad_out.stride(0),
            grad_out.stride(1),
            weights.stride(0),
            indices.stride(0),
            P=num_prompts,
            D=width,
            TOP_K=top_k,
            BB=16,
            BT=min(next_power_of_2(top_k), 32),
            BE=block,
            num_warps=4,
        )
    if "weights" in asked:
        grad_weights = mixture_backward(grad_out, experts, weights, indices)
    return grad_experts, grad_weights


def mixture_backward(grad_out: Tensor, experts: Tensor, weights: Tensor, indices: Tensor | None) -> Tensor:
    """Return the gradient of the weights (B,k). Without indices, there is one weight per expert."""
    from ._backward import mix_backward_weights

    batch, top_k = weights.shape
    _, num_prompts, width = experts.shape
    grad_weights = weights.new_empty(weights.shape)
    launch(
        mix_backward_weights,
        batch * top_k,
        grad_out,
        experts,
        indices,
        grad_weights,
        grad_out.stride(0),
        grad_out.stride(1),
        experts.stride(0),
        experts.stride(1),
        0 if indices is None else indices.stride(0),
        P=num_prompts,
        D=width,
        TOP_K=top_k,
        BE=min(next_power_of_2(num_prompts * width), 1024),
        num_warps=4,
    )
    return grad_weights
