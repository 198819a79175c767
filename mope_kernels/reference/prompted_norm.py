"""Reference implementation of `prompted_norm`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .add_norm import add_norm
from .mix_prompts import mix_prompts
from .numbers import statistics_dtype, without_autocast
from .route import route


@without_autocast
def prompted_norm(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    num_replaced: int,
    static: Tensor | None = None,
    experts: Tensor | None = None,
    mapped: Tensor | None = None,
    cross_logits: Tensor | None = None,
    self_weight: Tensor | None = None,
    self_bias: Tensor | None = None,
    self_keys: Tensor | None = None,
    noise: Tensor | None = None,
    routing: tuple[Tensor, Tensor, Tensor] | None = None,
    top_k: int | None = None,
    temperature: float = 1.0,
    renormalize: bool = False,
    eps: float = 1e-5,
    norm_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """Add the update, route, replace the prompts at the front of the rows, and apply LayerNorm.

    Routing uses the mean of all rows and `cross_logits`. The first `num_replaced` rows are replaced by the static, dynamic and
    mapped prompts. (B,N,C) x2, (C,) x2, (S,C), (K,P,C), (B,M,C), (B,K), (s,C), (s,), (s,K) -> total and normed
    (B,S+P+M+N-num_replaced,C) each, (weights, indices, probs). This is the start of a routed block of MoPE, arXiv 2403.10568.
    """
    rows = x if update is None else x + update
    if experts is not None and routing is None:
        logits = cross_logits
        if self_weight is not None and self_keys is not None:
            dtype = statistics_dtype(rows, self_weight)
            query = F.linear(rows.mean(1, dtype=dtype), self_weight.to(dtype), None if self_bias is None else self_bias.to(dtype))
            self_logits = query @ self_keys.to(dtype)
            logits = self_logits if logits is None else self_logits + logits
        assert logits is not None
        routing = route(logits, top_k=top_k, temperature=temperature, noise=noise, renormalize=renormalize)
    prompts = [] if static is None else [static.expand(x.shape[0], -1, -1)]
    if experts is not None and routing is not None:
        prompts.append(mix_prompts(experts, routing[0], routing[1]))
    prompts += [] if mapped is None else [mapped]
    total = torch.cat([*(p.to(rows.dtype) for p in prompts), rows[:, num_replaced:]], dim=1)
    return *add_norm(total, None, weight, bias, eps=eps, norm_dtype=norm_dtype), routing
