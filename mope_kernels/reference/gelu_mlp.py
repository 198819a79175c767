"""Reference implementation of `gelu_mlp`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .numbers import without_autocast


@without_autocast
def gelu_mlp(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    """Compute gelu(x W1' + b1) W2' + b2, gelu(h) = h Phi(h): (...,C), (F,C), (F,), (O,F), (O,) -> (...,O)."""
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)
