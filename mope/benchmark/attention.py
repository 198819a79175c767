"""What the benchmarks of attention have in common: their inputs, their opponents' ways, the pieces of their definitions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import baselines
from .baselines import Attend, Unavailable
from .problems import Way
from .shapes import Attention

# " compiled": under torch.compile, once for each shape. FlexAttention does not work otherwise.
WAYS = ("ours", "released", "released compiled", "cat+sdpa", *baselines.BACKENDS, "cat+sdpa compiled", "flex", "xformers")


def projected(shape: Attention, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Draw query, key and value as a fused projection leaves them, views of (B,L,3,H,D)."""
    query, key, value = torch.randn(shape.batch, shape.tokens, 3, shape.heads, shape.width, dtype=dtype).permute(2, 0, 3, 1, 4)
    return {"query": query, "key": key, "value": value}


def opponents(attention: Callable[[str], Attend], around: Callable[[Attend], Way], *kinds: str) -> dict[str, Way | str]:
    """Return each kind of attention with what is `around` it, or the reason why it cannot run."""
    ways: dict[str, Way | str] = {}
    for kind in kinds or baselines.KINDS:
        try:
            ways[kind] = around(attention(kind))
        except Unavailable as reason:
            ways[kind] = str(reason)
    return ways


def over_prompts(shape: Attention, tensors: dict[str, Tensor | None], training: bool) -> Callable[[str], Attend]:
    """Return what makes an attention of a kind over all prompts and the tokens."""
    query = tensors["query"]
    assert query is not None
    return lambda kind: baselines.attention(kind, query, shape.tokens, shape.all_prompts, tensors["lengths"], training)


def pieces(batch: int, scores: int) -> int:
    """Return so many that the scores of one, in float64, take a gigabyte."""
    return min(batch, -(-scores * 8 // 2**30))
