"""Launchers of the Triton kernels of the importance loss. The first call imports Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from mope_kernels._checks import last_dim_contiguous
from mope_kernels._ops import triton_kernel
from mope_kernels._triton import launch, next_power_of_2

from .spec import SPEC as SPEC


@triton_kernel("importance_loss")
def importance_loss(probs: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    from ._kernels import importance_forward

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
    from ._kernels import importance_backward

    # The forward writes it contiguously, but a saved-tensor hook may have changed that.
    load = load.contiguous()
    blocks, num_experts = load.shape
    grad, block = torch.empty_like(load), next_power_of_2(num_experts)
    launch(importance_backward, blocks, grad_loss.contiguous(), load, grad, threshold, K=num_experts, BK=block, num_warps=1)
    return grad
