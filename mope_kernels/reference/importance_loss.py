"""Reference implementation of `importance_loss`."""

from __future__ import annotations

import torch
from torch import Tensor

from .numbers import statistics_dtype, without_autocast


@without_autocast
def importance_loss(probs: Tensor, *, threshold: float = 0.1) -> Tensor:
    """Return the squared coefficient of variation of the expert loads, or 0 up to `threshold`: (..., B, K) -> (...)."""
    probs = probs.to(statistics_dtype(probs))
    if probs.numel() == 0 or probs.shape[-1] == 1:
        return probs.sum((-2, -1)) * 0.0
    load = probs.sum(-2)
    cv2 = load.var(-1, unbiased=True) / load.mean(-1).square()
    return torch.where(cv2 <= threshold, 0.0, cv2)
