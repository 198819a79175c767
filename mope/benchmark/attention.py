"""Common parts of the attention benchmarks: inputs, opponents, and the number of pieces in which the definition is computed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import baselines
from .baselines import Attend, Unavailable
from .problems import Way
from .shapes import Attention

# Ways with " compiled", and FlexAttention, run under torch.compile, once per shape.
WAYS = ("ours", "released", "released compiled", "cat+sdpa", *baselines.BACKENDS, "cat+sdpa compiled", "flex", "xformers")


def projected(shape: Attention, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Draw query, key and value as views of (B,L,3,H,D), as a fused projection returns them."""
    query, key, value = torch.randn(shape.batch, shape.tokens, 3, shape.heads, shape.width, dtype=dtype).permute(2, 0, 3, 1, 4)
    return {"query": query, "key": key, "value": value}


def opponents(attention: Callable[[str], Attend], around: Callable[[Attend], Way], *kinds: str) -> dict[str, Way | str]:
    """Return `around` applied to each kind of attention, or the reason why that kind cannot run."""
    ways: dict[str, Way | str] = {}
    for kind in kinds or baselines.KINDS:
        try:
            ways[kind] = around(attention(kind))
        except Unavailable as reason:
            ways[kind] = str(reason)
    return ways


def over_prompts(shape: Attention, tensors: dict[str, Tensor | None], training: bool) -> Callable[[str], Attend]:
    """Return a function from a kind to its attention over all prompts and the tokens."""
    query = tensors["query"]
    assert query is not None
    return lambda kind: baselines.attention(kind, query, shape.tokens, shape.all_prompts, tensors["lengths"], training)


def pieces(batch: int, scores: int) -> int:
    """Return the number of pieces of a batch so that the float64 scores of each need about 1 GiB. `scores`: of the whole batch."""
    return min(batch, -(-scores * 8 // 2**30))
