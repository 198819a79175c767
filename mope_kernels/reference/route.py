"""Reference implementation of `route`."""

from __future__ import annotations

import torch
from torch import Tensor

from .numbers import statistics_dtype, without_autocast


def dense_weights(weights: Tensor, indices: Tensor, num_experts: int) -> Tensor:
    """Return the routing weights as a full matrix, zero for unselected experts: (B,k), (B,k) -> (B,K)."""
    return weights.new_zeros(weights.shape[0], num_experts).scatter_add(1, indices, weights)


@without_autocast
def route(
    logits: Tensor, *, top_k: int | None = None, temperature: float = 1.0, noise: Tensor | None = None, renormalize: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute probs = softmax(logits / temperature + noise) and select the `top_k` most probable experts.

    (B,K) -> weights (B,k), indices (B,k), probs (B,K); k = K if `top_k` is None. MoPE, arXiv 2403.10568, router equation.
    """
    z = logits.to(statistics_dtype(logits)) / temperature
    if noise is not None:
        z = z + noise.to(z.dtype)
    probs = z.softmax(-1)
    num_experts = logits.shape[1]
    if top_k is None:
        return probs, torch.arange(num_experts, device=logits.device).expand_as(probs), probs
    # Select by z, because at low temperatures the probabilities underflow to ties. The stable sort resolves ties in favour of the
    # lowest index.
    ranked = torch.where(probs.isnan(), 0.0, z.detach())
    indices = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = probs.gather(1, indices)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, indices, probs
