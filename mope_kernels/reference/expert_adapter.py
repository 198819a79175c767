"""Reference implementation of `expert_adapter`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .numbers import statistics_dtype, without_autocast


@without_autocast
def expert_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    router_weight: Tensor | None = None,
    router_bias: Tensor | None = None,
    *,
    temperature: float = 10.0,
    activation: str = "relu",
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Add to each token the routed sum of expert bottleneck adapters (ModeX).

    Computes x + sum_e w_e (U_e h + b_e) with h = activation(W x + b) and w = softmax(router(x) / temperature) for each token.
    (..., d), (r,d), (r,), (E,d,r), (E,d), (E,d), (E,) -> out (..., d), weights (..., E). Parameters are rounded to the dtype of x.
    """
    down_weight, down_bias, up_weight, up_bias = (t.to(x.dtype) for t in (down_weight, down_bias, up_weight, up_bias))
    activations: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}
    hidden = F.dropout(activations[activation](F.linear(x, down_weight, down_bias)), dropout_p)
    dtype = statistics_dtype(x)
    if router_weight is None or router_bias is None:
        weights = x.new_ones(*x.shape[:-1], 1, dtype=dtype)
    else:
        weights = (F.linear(x, router_weight.to(x.dtype), router_bias.to(x.dtype)).to(dtype) / temperature).softmax(-1)
    ups = torch.einsum("...r,edr->...ed", hidden, up_weight) + up_bias
    return x + torch.einsum("...e,...ed->...d", weights, ups.to(dtype)).to(x.dtype), weights
