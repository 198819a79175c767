"""Reference implementation of `mix_prompts`."""

from __future__ import annotations

import torch
from torch import Tensor

from .numbers import statistics_dtype, without_autocast
from .route import dense_weights


@without_autocast
def mix_prompts(experts: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Return dynamic prompts, the weighted sum of the selected experts: (K,P,D), (B,k), (B,k) -> (B,P,D)."""
    dtype = statistics_dtype(experts, weights)
    mixture = dense_weights(weights.to(dtype), indices, experts.shape[0])
    return torch.einsum("bk,kpd->bpd", mixture, experts.to(dtype)).to(experts.dtype)
