"""The definition of `route`."""

from __future__ import annotations

import torch
from torch import Tensor

from .numbers import statistics_dtype, without_autocast


def dense_weights(weights: Tensor, indices: Tensor, num_experts: int) -> Tensor:
    """Routing weights as a full matrix: (B,k), (B,k) -> (B,K), zero where an expert was not selected."""
    return weights.new_zeros(weights.shape[0], num_experts).scatter_add(1, indices, weights)


@without_autocast
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
