"""Reference implementation of `add_norm`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .numbers import statistics_dtype, without_autocast


@without_autocast
def add_norm(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    norm_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a residual update and apply the next LayerNorm: (..., C) x2, (C,) x2 -> x + update, LN(x + update)."""
    total = x if update is None else x + update
    dtype = statistics_dtype(total)
    weight, bias = (t if t is None else t.to(dtype) for t in (weight, bias))
    normed = F.layer_norm(total.to(dtype), total.shape[-1:], weight, bias, eps)
    return total, normed.to(norm_dtype or total.dtype)
