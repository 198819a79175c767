"""Launchers of the attention kernels, with their configurations. The first call imports Triton."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mope_kernels import configs
from mope_kernels._ops import empty_heads_last, not_needed, triton_kernel
from mope_kernels._triton import cdiv, launch, next_power_of_2, on_amd
from mope_kernels.configs.prompt_attention import Blocks

from .spec import GRADIENTS


def options(blocks: Blocks, query: Tensor, *, dropped: bool = False) -> dict[str, int]:
    """Return the compiler options."""
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    if (query.dtype == torch.float32 or dropped) and not on_amd():
        # Without a limit, NVIDIA's assembler spills a few registers in these kernels to run more warps at once.
        options["maxnreg"] = 255
    return options


def blocks_for(
    kernel: str, query: Tensor, *, dropped: bool, biased: bool = False, is_causal: bool = False, num_queries: int | None = None
) -> Blocks:
    """Return the configuration of "forward", "query_gradient" or "key_gradient", with smaller blocks for few queries.

    With packed items, `num_queries` is the number of queries of the longest item.
    """
    if query.dtype == torch.float32:
        scores = "masked" if biased or is_causal or dropped else "plain"
    else:
        scores = "biased" if biased else "dropped" if dropped else "plain"
    key = (configs.dtype_key(query.dtype), scores, query.shape[3], kernel)
    blocks: Blocks = configs.find("prompt_attention", key, query.device)
    if kernel == "forward" and biased and dropped:
        blocks = blocks._replace(keys=min(blocks.keys, 32))
    queries = max(next_power_of_2(query.shape[2] if num_queries is None else num_queries), 16)
    return blocks._replace(queries=min(blocks.queries, queries))


def prompt_block(num_prompts: int, query: Tensor) -> int:
    """Return the number of prompts per block: all, unless the tile gets too large. Tensor cores need at least 16."""
    largest = 4096 // (query.element_size() * next_power_of_2(query.shape[3]))
    return max(min(next_power_of_2(num_prompts), 64, largest), 16)


def dot_precision(query: Tensor) -> str:
    """Return the precision of float32 products; it does not affect 16-bit operands, whose products are exact."""
    return "ieee" if query.dtype == torch.float32 else "tf32"


def keep_scale(dropout_p: float) -> float:
    """Return the factor by which dropout scales the probabilities it keeps."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def aligned_rows(tensor: Tensor) -> Tensor:
    """Return the tensor if its last axis is contiguous and its rows start at multiples of 8 elements, else a contiguous copy.

    Unaligned rows would be read element by element, with more than twice the instructions. Every head_dim of the kernels is a
    multiple of 8.
    """
    steps = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size > 1]
    aligned = tensor.stride(-1) == 1 and all(step % 8 == 0 for step in (tensor.storage_offset(), *steps))
    return tensor if aligned else tensor.clone(memory_format=torch.contiguous_format)


def same_strides(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return aligned keys and values with equal strides, copied if necessary."""
    key, value = aligned_rows(key), aligned_rows(value)
    return (key, value) if key.stride() == value.stride() else (key.contiguous(), value.contiguous())


def item_strides(tensor: Tensor, offsets: Tensor | None) -> tuple[int, ...]:
    """Return the strides of (B,H,L); the item stride is 0 for packed items, which are located by `offsets`."""
    return tensor.stride()[:3] if offsets is None else (0, *tensor.stride()[1:3])


def needs_wide_offsets(*matrices: Tensor | None) -> bool:
    """Tell whether an offset within an (L,D) matrix of these tensors (...,L,D) can need more than 32 bits.

    The start of a matrix always has 64 bits. The row offsets are computed in every loop, where 64 bits cost up to an eighth more
    instructions on sm_90 with 16-bit operands, and hardly more with float32.
    """
    return any(t is not None and (t.shape[-2] - 1) * t.stride(-2) + t.shape[-1] > 2**31 for t in matrices)


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
    *,
    bias: Tensor | None = None,
    is_causal: bool = False,
    offsets: Tensor | None = None,
    max_length: int = 0,
) -> dict[str, Tensor]:
    """Compute the gradients in `need` (query, key, value, prompt_key, prompt_value) of attention over [prompts; tokens].

    prompt_key and prompt_value are (B,H,N,D) in the dtype of query and have equal strides; their gradients are float32. Gradients
    of query, key and value have layout (B,L,H,D). `bias` is (B,H,Lq,Lk). With `offsets` (B+1,), the items are packed.
    """
    from ._backward import key_value_gradient, output_products, query_gradient

    heads, width = query.shape[1], query.shape[3]
    batch, num_prompts = len(prompt_key), prompt_key.shape[2]
    num_queries, num_keys = (query.shape[2], key.shape[2]) if offsets is None else (max_length, max_length)
    grad_out = aligned_rows(grad_out)
    # The forward writes them contiguously, but saved-tensor hooks may have changed that.
    out, lse = out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()
    scores: dict[str, Any] = {"dropped": seed is not None, "biased": bias is not None, "is_causal": is_causal}
    found = {
        name: empty_heads_last(like, *like.shape)
        for name, like in (("query", query), ("key", key), ("value", value))
        if name in need
    }
    found |= {
        name: prompt_key.new_empty(prompt_key.shape, dtype=torch.float32) for name in ("prompt_key", "prompt_value") if name in need
    }
    matrices = (query, key, value, prompt_key, prompt_value, out, grad_out, *found.values())
    sizes = {"H": heads, "D": width, "BD": next_power_of_2(width), "WIDE": needs_wide_offsets(*matrices)}
    precision = dot_precision(query)

    delta = torch.empty_like(lse, dtype=torch.float32)
    if not {"query", "key", "prompt_key"}.isdisjoint(need):
        rows = 2048 // sizes["BD"]
        launch(
            output_products,
            batch * heads * cdiv(num_queries, rows),
            out,
            grad_out,
            offsets,
            delta,
            item_strides(grad_out, offsets),
            num_queries,
            **sizes,
            BM=rows,
            num_warps=4,
        )

    if "query" in need:
        query_blocks = blocks_for("query_gradient", query, num_queries=num_queries, **scores)
        launch(
            query_gradient,
            batch * heads * cdiv(num_queries, query_blocks.queries),
            query,
            key,
            value,
            prompt_key,
            prompt_value,
            lengths,
            bias,
            seed,
            offsets,
            lse,
            delta,
            grad_out,
            found["query"],
            item_strides(query, offsets),
            item_strides(key, offsets),
            item_strides(value, offsets),
            prompt_key.stride()[:3],
            None if bias is None else bias.stride(),
            item_strides(grad_out, offsets),
            num_queries,
            num_keys,
            scale,
            scale * math.log2(math.e),
            dropout_p,
            keep_scale(dropout_p),
            IS_CAUSAL=is_causal,
            N=num_prompts,
            **sizes,
            # With fewer columns for 8 warps, exchanging rows between warps would need more shared memory than AMD GPUs have.
            BP=max(prompt_block(num_prompts, query), 4 * query_blocks.num_warps),
            BM=query_blocks.queries,
            BN=query_blocks.keys,
            PRECISION=precision,
            **options(query_blocks, query),
        )

    def keys_and_values(
        prefix: str,
        key: Tensor,
        value: Tensor,
        num_keys: int,
        lengths: Tensor | None,
        bias: Tensor | None,
        key_offsets: Tensor | None,
        is_causal: bool,
        first: int,
        block: int,
    ) -> None:
        grad_key, grad_value = found.get(f"{prefix}key"), found.get(f"{prefix}value")
        grad = grad_key if grad_value is None else grad_value
        if grad is None:
            return
        launch(
            key_value_gradient,
            batch * heads * cdiv(num_keys, block),
            query,
            key,
            value,
            lengths,
            bias,
            seed,
            offsets,
            key_offsets,
            lse,
            delta,
            grad_out,
            grad_key,
            grad_value,
            item_strides(query, offsets),
            item_strides(key, key_offsets),
            item_strides(value, key_offsets),
            None if bias is None else bias.stride(),
            item_strides(grad_out, offsets),
            item_strides(grad, key_offsets),
            num_queries,
            num_keys,
            scale,
            scale * math.log2(math.e),
            dropout_p,
            keep_scale(dropout_p),
            IS_CAUSAL=is_causal,
            FIRST_COLUMN=first,
            **sizes,
            BM=key_blocks.queries,
            BN=block,
            PRECISION=precision,
            **options(key_blocks, query),
        )

    if set(need) <= {"query"}:
        return found
    key_blocks = blocks_for("key_gradient", query, num_queries=num_queries, **scores)
    keys_and_values("", key, value, num_keys, lengths, bias, offsets, is_causal, num_prompts, key_blocks.keys)
    # The prompts are another block of keys, visible to every query.
    prompt_keys = min(prompt_block(num_prompts, query), key_blocks.keys)
    keys_and_values("prompt_", prompt_key, prompt_value, num_prompts, None, None, None, False, 0, prompt_keys)
    return found


class _Inputs(NamedTuple):
    """Arguments of `prompt_attention`, prepared for the kernels."""

    query: Tensor
    key: Tensor
    value: Tensor
    # (B,H,P,D), with item stride 0 if the items share their prompts
    prompt_key: Tensor
    prompt_value: Tensor
    lengths: Tensor | None
    # (B,H,Lq,Lk), with stride 0 along broadcast axes
    bias: Tensor | None
    seed: Tensor | None
    # (B+1,) if query, key and value are packed, (1,H,T,D)
    offsets: Tensor | None


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    lengths: Tensor | None,
    attn_bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    offsets: Tensor | None = None,
) -> _Inputs:
    if dropout_p and seed is None:
        raise ValueError(f"prompt_attention: dropout_p={dropout_p} needs a seed, an int64 tensor of shape (1,) on {query.device}")
    query, key, value = (aligned_rows(t) for t in (query, key, value))
    batch = len(query) if offsets is None else len(offsets) - 1
    prompt_key, prompt_value = (t.expand(batch, -1, -1, -1) for t in same_strides(prompt_key, prompt_value))
    bias = None if attn_bias is None else attn_bias.expand(*query.shape[:3], key.shape[2])
    # Offsets within a block have 32 bits, and blocks have at most 128 rows and columns.
    if bias is not None and max(bias.stride()[2:]) >= 2**24:
        bias = bias.contiguous()
    return _Inputs(query, key, value, prompt_key, prompt_value, lengths, bias, seed if dropout_p else None, offsets)


def _forward(inputs: _Inputs, max_length: int, is_causal: bool, scale: float, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Compute out and lse. `max_length` is used only with packed items."""
    from ._forward import prompt_attention_forward

    query, key, _, prompt_key, _, _, bias, _, offsets = inputs
    batch, num_prompts = prompt_key.shape[0], prompt_key.shape[2]
    heads, width = query.shape[1], query.shape[3]
    num_queries, num_keys = (query.shape[2], key.shape[2]) if offsets is None else (max_length, max_length)
    out = empty_heads_last(query, *query.shape)
    lse = torch.empty(batch, heads, num_queries, dtype=torch.float64, device=query.device)
    dropped = dropout_p > 0.0
    blocks = blocks_for("forward", query, dropped=dropped, biased=bias is not None, is_causal=is_causal, num_queries=num_queries)
    launch(
        prompt_attention_forward,
        batch * heads * cdiv(num_queries, blocks.queries),
        *inputs,
        out,
        lse,
        *(item_strides(t, offsets) for t in inputs[:3]),
        prompt_key.stride()[:3],
        None if bias is None else bias.stride(),
        num_queries,
        num_keys,
        scale * math.log2(math.e),
        dropout_p,
        keep_scale(dropout_p),
        IS_CAUSAL=is_causal,
        H=heads,
        N=num_prompts,
        D=width,
        BD=next_power_of_2(width),
        WIDE=needs_wide_offsets(*inputs[:5], out),
        BP=prompt_block(num_prompts, query),
        BM=blocks.queries,
        BN=blocks.keys,
        PRECISION=dot_precision(query),
        **options(blocks, query, dropped=dropped),
    )
    return out, lse


def _backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    prompts: tuple[Tensor, Tensor],
    inputs: _Inputs,
    max_length: int,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    needs: int,
) -> tuple[Tensor, ...]:
    """Compute the gradients requested by `needs`. `prompts` are the original arguments of the op."""
    need = GRADIENTS.asked(needs)
    found = attention_backward(
        grad_out,
        out,
        lse,
        *inputs[:6],
        inputs.seed,
        scale,
        dropout_p,
        need,
        bias=inputs.bias,
        is_causal=is_causal,
        offsets=inputs.offsets,
        max_length=max_length,
    )
    for name, like in zip(("prompt_key", "prompt_value"), prompts, strict=True):
        if name in need:
            # The gradient of shared prompts is the sum over the items.
            found[name] = found[name].sum_to_size(like.shape).to(like.dtype)
    return tuple(found[name] if name in need else not_needed(grad_out) for name in GRADIENTS.names)


@triton_kernel("prompt_attention")
def prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    lengths: Tensor | None,
    attn_bias: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    inputs = _prepare(query, key, value, prompt_key, prompt_value, lengths, attn_bias, seed, dropout_p)
    return _forward(inputs, 0, is_causal, scale, dropout_p)


@triton_kernel("prompt_attention_backward")
def prompt_attention_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    lengths: Tensor | None,
    attn_bias: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    needs: int,
) -> tuple[Tensor, ...]:
    # Convert the prompts here, because the backward kernels have no registers left for it.
    prompts = (prompt_key.to(query.dtype), prompt_value.to(query.dtype))
    inputs = _prepare(query, key, value, *prompts, lengths, attn_bias, seed, dropout_p)
    return _backward(grad_out, out, lse, (prompt_key, prompt_value), inputs, 0, is_causal, scale, dropout_p, needs)


@triton_kernel("packed_attention")
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    offsets: Tensor,
    seed: Tensor | None,
    max_length: int,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    inputs = _prepare(query, key, value, prompt_key, prompt_value, None, None, seed, dropout_p, offsets)
    return _forward(inputs, max_length, is_causal, scale, dropout_p)


@triton_kernel("packed_attention_backward")
def packed_attention_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    offsets: Tensor,
    seed: Tensor | None,
    max_length: int,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    needs: int,
) -> tuple[Tensor, ...]:
    prompts = (prompt_key.to(query.dtype), prompt_value.to(query.dtype))
    inputs = _prepare(query, key, value, *prompts, None, None, seed, dropout_p, offsets)
    return _backward(grad_out, out, lse, (prompt_key, prompt_value), inputs, max_length, is_causal, scale, dropout_p, needs)
