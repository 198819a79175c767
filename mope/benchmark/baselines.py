"""Opponents of our attention on the same tensors, as a user would write them. Other opponents are in the modules of the ops.

*released* is the algorithm of the released systems, written plainly: experts are mixed for each item, projected, put before the
tokens, and attended with an explicit softmax. *cat+sdpa*, *flex* and *xformers* start from the same expert bank as ours, mix,
concatenate, and call the library. All compute what the op computes and are checked like ours. Masks are made beforehand.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# query (B,H,Lq,D), keys and values (B,H,P+Lk,D) -> (B,H,Lq,D)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# The backends of torch's attention. With plain "cat+sdpa", torch chooses one.
BACKENDS = {
    "cat+sdpa flash": SDPBackend.FLASH_ATTENTION,
    "cat+sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cat+sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "cat+sdpa math": SDPBackend.MATH,
}
# The kinds of attention.
KINDS = ("released", "cat+sdpa", *BACKENDS, "flex", "xformers")


class Unavailable(Exception):
    """Raised if an opponent cannot run here; the message says why."""


def concatenate(tokens: Tensor, *prompts: Tensor) -> Tensor:
    """Put prompts, (B,H,P,D) or for all items (H,P,D), before tokens (B,H,L,D)."""
    return torch.cat([*(p.to(tokens.dtype).expand(tokens.shape[0], -1, -1, -1) for p in prompts), tokens], dim=2)


def attention(kind: str, query: Tensor, num_keys: int, num_prompts: int, lengths: Tensor | None, training: bool) -> Attend:
    """Return an attention over prompts and tokens that hides keys beyond `lengths`. Its mask is made in this call.

    kind: "released" (an explicit softmax), "cat+sdpa" or one of `BACKENDS`, "flex" (to be compiled) or "xformers".

    Raises:
        Unavailable: it cannot run on this device.
    """
    total, mask = num_prompts + num_keys, None
    if lengths is not None:
        hidden = torch.arange(total, device=query.device) >= (lengths + num_prompts)[:, None]
        # The mask must have the query's dtype, because some kernels misread any other.
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill(hidden, -math.inf)
        mask = aligned(mask)[:, None, None]
    if kind == "released":
        return lambda q, k, v: own_softmax(q, k, v, mask)
    if kind.startswith("cat+sdpa"):
        return sdpa(kind, None if mask is None else mask.expand(-1, query.shape[1], query.shape[2], -1))
    if kind == "flex":
        return _flex(query, total, lengths, num_prompts, training)
    if kind == "xformers":
        return xformers(query, mask)
    raise ValueError(f"unknown attention {kind!r}")


def aligned(mask: Tensor) -> Tensor:
    """Align the rows of a mask to 16 elements, because SDPA and xformers otherwise copy it in each call or refuse it."""
    width = mask.shape[-1]
    return F.pad(mask, (0, -width % 16))[..., :width]


def sdpa(kind: str, mask: Tensor | None) -> Attend:
    """Return torch's attention with a mask to add. `kind`: one of `BACKENDS`, or anything else to let torch choose."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if kind not in BACKENDS:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        with sdpa_kernel(BACKENDS[kind]):
            try:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            except RuntimeError as error:
                # Torch's message differs between CPU and GPU.
                if re.search("No (viable backend|available kernel)", str(error)):
                    raise Unavailable("torch has no such kernel for these tensors") from error
                raise

    return attend


def own_softmax(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attend with an explicit softmax and a mask to add."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    return (scores if mask is None else scores + mask).softmax(-1) @ value


def _flex(query: Tensor, total: int, lengths: Tensor | None, num_prompts: int, training: bool) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if query.device.type == "cpu" and training:
        raise Unavailable("FlexAttention has no backward on the CPU")
    block_mask: Any = None
    if lengths is not None:
        ends = lengths + num_prompts
        block_mask = create_block_mask(
            lambda b, h, q, k: k < ends[b], query.shape[0], None, query.shape[2], total, device=query.device.type
        )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Any = flex_attention(q, k, v, block_mask=block_mask)
        return out

    return attend


def xformers(query: Tensor, mask: Tensor | None) -> Attend:
    """Return xformers' attention with a mask to add.

    Raises:
        Unavailable: xformers is not installed, or the device is a CPU.
    """
    if importlib.util.find_spec("xformers") is None:
        raise Unavailable("xformers is not installed")
    if query.device.type == "cpu":
        raise Unavailable("xformers' kernels run on GPUs")
    from xformers.ops import memory_efficient_attention

    bias = None if mask is None else aligned(mask.expand(-1, query.shape[1], query.shape[2], -1))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = memory_efficient_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_bias=bias)
        return out.transpose(1, 2)

    return attend
