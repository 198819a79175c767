"""Launch configurations of attention kernels, and the launcher of the backward. Triton is imported by the first call."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from mope_kernels._ops import empty_heads_last
from mope_kernels._triton import cdiv, last_contiguous, launch, next_power_of_2


class Blocks(NamedTuple):
    """Queries and keys in a block, warps, and stages of the software pipeline."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# Widest head -> blocks of the forward, of the gradient of the queries, and of the gradients of keys and values.
# 64 queries for each 4 warps is what Hopper's wgmma wants. Products of float32 use no tensor cores on NVIDIA, and their
# operands live in registers. None of these spills on sm_80, sm_90, sm_100 or gfx942 (python -m mope_kernels.aot).
_HALF = {
    64: (Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 2), Blocks(32, 64, 4, 2)),
    128: (Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(32, 64, 4, 2)),
}
_FLOAT = {
    32: (Blocks(32, 32, 4, 2), Blocks(32, 16, 4, 2), Blocks(32, 16, 4, 2)),
    64: (Blocks(16, 16, 4, 2), Blocks(32, 16, 4, 2), Blocks(16, 32, 4, 2)),
    128: (Blocks(16, 16, 4, 2), Blocks(32, 16, 4, 2), Blocks(16, 32, 4, 2)),
}


def blocks_for(query: Tensor) -> tuple[Blocks, Blocks, Blocks]:
    """Static configurations by head_dim and dtype; short queries get smaller blocks."""
    table = _FLOAT if query.dtype == torch.float32 else _HALF
    queries = max(next_power_of_2(query.shape[2]), 16)
    forward, query_gradient, key_gradient = next(blocks for width, blocks in table.items() if query.shape[3] <= width)
    return (
        forward._replace(queries=min(forward.queries, queries)),
        query_gradient._replace(queries=min(query_gradient.queries, queries)),
        key_gradient._replace(queries=min(key_gradient.queries, queries)),
    )


def prompt_block(num_prompts: int, width: int) -> int:
    """Prompts in a block: all of them, if that is not too large a tile. Tensor cores multiply at least 16."""
    return min(max(next_power_of_2(num_prompts), 16), 64, 4096 // next_power_of_2(width))


def dot_precision(query: Tensor) -> str:
    """How products of float32 are computed; those of 16 bits are exact anyway."""
    return "ieee" if query.dtype == torch.float32 else "tf32"


def keep_scale(dropout_p: float) -> float:
    """What dropout multiplies the probabilities that it keeps by."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def attention_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    lengths: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    need: Collection[str],
) -> dict[str, Tensor]:
    """Gradients of attention over [prompts; tokens] of those in `need`: query, key, value, prompt_key, prompt_value.

    prompt_key and prompt_value are (B,H,N,D) in the dtype of query and share their strides; their gradients are float32. Those
    of query, key and value are laid out as (B,L,H,D).
    """
    from ._backward import key_value_gradient, output_products, query_gradient

    batch, heads, num_queries, width = query.shape
    num_keys, num_prompts = key.shape[2], prompt_key.shape[2]
    grad_out = last_contiguous(grad_out)
    # As the forward wrote it, unless somebody saved a copy.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    _, query_blocks, key_blocks = blocks_for(query)
    sizes = {"H": heads, "D": width, "BD": next_power_of_2(width)}
    precision = dot_precision(query)
    found: dict[str, Tensor] = {}

    delta = torch.empty_like(lse)
    if not {"query", "key", "prompt_key"}.isdisjoint(need):
        rows = 2048 // sizes["BD"]
        launch(
            output_products,
            batch * heads * cdiv(num_queries, rows),
            out,
            grad_out,
            delta,
            grad_out.stride()[:3],
            num_queries,
            **sizes,
            BM=rows,
            num_warps=4,
        )

    if "query" in need:
        found["query"] = empty_heads_last(query, batch, heads, num_queries, width)
        launch(
            query_gradient,
            batch * heads * cdiv(num_queries, query_blocks.queries),
            query,
            key,
            value,
            prompt_key,
            prompt_value,
            lengths,
            seed,
            lse,
            delta,
            grad_out,
            found["query"],
            query.stride()[:3],
            key.stride()[:3],
            value.stride()[:3],
            prompt_key.stride()[:3],
            grad_out.stride()[:3],
            num_queries,
            num_keys,
            scale,
            dropout_p,
            keep_scale(dropout_p),
            N=num_prompts,
            **sizes,
            # Fewer columns for 8 warps would take more shared memory than AMD has, to hand rows over between warps.
            BP=max(prompt_block(num_prompts, width), 4 * query_blocks.num_warps),
            BM=query_blocks.queries,
            BN=query_blocks.keys,
            PRECISION=precision,
            num_warps=query_blocks.num_warps,
            num_stages=query_blocks.num_stages,
        )

    def keys_and_values(prefix: str, key: Tensor, value: Tensor, lengths: Tensor | None, first: int, block: int) -> None:
        grad_key, grad_value = found.get(f"{prefix}key"), found.get(f"{prefix}value")
        grad = grad_key if grad_value is None else grad_value
        if grad is None:
            return
        launch(
            key_value_gradient,
            batch * heads * cdiv(key.shape[2], block),
            query,
            key,
            value,
            lengths,
            seed,
            lse,
            delta,
            grad_out,
            grad_key,
            grad_value,
            query.stride()[:3],
            key.stride()[:3],
            value.stride()[:3],
            grad_out.stride()[:3],
            grad.stride()[:3],
            num_queries,
            key.shape[2],
            scale,
            dropout_p,
            keep_scale(dropout_p),
            FIRST_COLUMN=first,
            **sizes,
            BM=key_blocks.queries,
            BN=block,
            PRECISION=precision,
            num_warps=key_blocks.num_warps,
            num_stages=key_blocks.num_stages,
        )

    found |= {name: empty_heads_last(key, *key.shape) for name in ("key", "value") if name in need}
    keys_and_values("", key, value, lengths, num_prompts, key_blocks.keys)
    # The prompts are one more block of keys, which every query sees.
    found |= {name: torch.empty_like(prompt_key, dtype=torch.float32) for name in ("prompt_key", "prompt_value") if name in need}
    keys_and_values("prompt_", prompt_key, prompt_value, None, 0, min(prompt_block(num_prompts, width), key_blocks.keys))
    return found
