"""Reference implementation of `mope_attention`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange, repeat
from torch import Tensor

from .numbers import statistics_dtype, without_autocast
from .prompt_attention import prompt_attention
from .route import dense_weights, route


def mix_bank(
    weights: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gram: Tensor | None = None,
    key_offset: Tensor | None = None,
    value_offset: Tensor | None = None,
    eps: float = 1e-5,
    task_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mix the projected experts into keys and values of the routed prompts: (B,K), (K,H,P,D) x2 -> (B,H,P,D) x2.

    With `gram` (P,K,K), the LayerNorm before the projection is applied after mixing. G_p[i,j] = <Ec_i, Ec_j> / d for the centred
    experts Ec: LayerNorm is linear except for the division by its standard deviation, which is sqrt(w' G_p w + eps).
    With `task_ids` (B,), the banks (T*K,H,P,D) and Gram matrices (T,P,K,K) hold T tasks, and item b uses those of its own task.
    """
    each = "b"
    if task_ids is None:
        each = ""
    else:
        key, value = (rearrange(bank, "(t k) h p d -> t k h p d", k=weights.shape[1])[task_ids] for bank in (key, value))
        gram = None if gram is None else gram[task_ids]
    inverse_std: Tensor | float = 1.0
    if gram is not None:
        variance = torch.einsum(f"bi,{each}pij,bj->bp", weights, gram.to(weights.dtype), weights).clamp_min(0.0)
        inverse_std = rearrange((variance + eps).rsqrt(), "b p -> b 1 p 1")

    def project(bank: Tensor, offset: Tensor | None) -> Tensor:
        mixed = torch.einsum(f"bk,{each}khpd->bhpd", weights, bank.to(weights.dtype)) * inverse_std
        return mixed if offset is None else mixed + rearrange(offset.to(weights.dtype), "h d -> 1 h 1 d")

    return project(key, key_offset), project(value, value_offset)


@without_autocast
def mope_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logits: Tensor,
    bank_key: Tensor,
    bank_value: Tensor,
    *,
    gram: Tensor | None = None,
    key_offset: Tensor | None = None,
    value_offset: Tensor | None = None,
    eps: float = 1e-5,
    static_key: Tensor | None = None,
    static_value: Tensor | None = None,
    instance_key: Tensor | None = None,
    instance_value: Tensor | None = None,
    top_k: int | None = None,
    temperature: float = 1.0,
    noise: Tensor | None = None,
    renormalize: bool = False,
    lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    task_ids: Tensor | None = None,
    attend: Callable[..., Tensor] = prompt_attention,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend to [static; instance; routed prompts; tokens] -> out (B,H,Lq,D), weights, indices, probs.

    With `task_ids` (B,), the banks (T*K,H,P,D), Gram matrices (T,P,K,K) and static prompts (T,H,S,D) hold T tasks.
    `attend` computes attention over the mixed prompts and the tokens; it has the signature of `prompt_attention`.
    """
    batch = query.shape[0]
    weights, indices, probs = route(logits, top_k=top_k, temperature=temperature, noise=noise, renormalize=renormalize)
    mixture = dense_weights(weights, indices, logits.shape[1]).to(statistics_dtype(query, weights))
    routed_key, routed_value = mix_bank(
        mixture,
        bank_key,
        bank_value,
        gram=gram,
        key_offset=key_offset,
        value_offset=value_offset,
        eps=eps,
        task_ids=task_ids,
    )

    def prompts(static: Tensor | None, instance: Tensor | None, routed: Tensor) -> Tensor:
        parts = []
        if static is not None:
            parts.append(repeat(static, "h s d -> b h s d", b=batch) if task_ids is None else static[task_ids])
        parts += [] if instance is None else [instance]
        return torch.cat([*(part.to(routed.dtype) for part in parts), routed], dim=2)

    out = attend(
        query,
        key,
        value,
        prompts(static_key, instance_key, routed_key),
        prompts(static_value, instance_value, routed_value),
        lengths=lengths,
        dropout_p=dropout_p,
        scale=scale,
    )
    return out, weights, indices, probs
