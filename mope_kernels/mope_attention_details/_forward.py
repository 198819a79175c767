# mypy: allow-untyped-defs, allow-incomplete-defs
"""Fused forward kernel: route, build the prompts from the expert bank, and attend to prompts and tokens."""

import triton
import triton.language as tl

from mope_kernels.prompt_attention_details._forward import (
    attend,
    attend_tokens,
    load_tile,
    matrix_offset,
    store_output,
    visible_tokens,
)
from mope_kernels.route_details._forward import route_item, store_routing

from ._prompts import inverse_std, prompt_tile


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def mope_attention_forward(
    p_query,
    p_key,
    p_value,
    p_logits,
    p_noise,
    p_bank_key,
    p_bank_value,
    p_gram,
    p_key_offset,
    p_value_offset,
    p_static_key,
    p_static_value,
    p_instance_key,
    p_instance_value,
    p_lengths,
    p_seed,
    p_task_ids,
    p_out,
    p_lse,
    p_probs,
    p_weights,
    p_indices,
    query_strides,
    key_strides,
    value_strides,
    prompt_strides,
    num_queries,
    num_keys,
    temperature,
    eps,
    scale_log2,
    dropout_p,
    keep_scale,
    H: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SIZES: tl.constexpr,
    D: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
    BP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the attention of BM queries of one item and head.

    scale_log2 is the score scale times log2(e), keep_scale is 1 / (1 - dropout_p).
    """
    N: tl.constexpr = SIZES[0] + SIZES[1] + SIZES[2]
    SELECTED: tl.constexpr = TOP_K if TOP_K > 0 else K
    # Items without queries still need routing.
    blocks = tl.maximum(tl.cdiv(num_queries, BM), 1)
    item_head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    item = (item_head // H).to(tl.int64)
    head = (item_head % H).to(tl.int64)
    o_query = block * BM + tl.arange(0, BM)
    m_query = o_query < num_queries

    task = item * 0
    if p_task_ids is not None:
        task = tl.load(p_task_ids + item)
    if p_noise is not None:
        p_noise += item * K
    b_probs, b_weights, b_rank = route_item(p_logits + item * K, p_noise, temperature, K, TOP_K, RENORMALIZE, BK)
    if (block == 0) & (head == 0):
        store_routing(p_probs, p_weights, p_indices, item, b_probs, b_weights, b_rank, K, TOP_K, BK)
    selection = (b_rank, tl.arange(0, BK), b_weights)

    # (BM, BD)
    p_query += matrix_offset(item, head, query_strides)
    b_query = load_tile(p_query, o_query, m_query, query_strides[2], D, BD, WIDE)
    b_out = tl.zeros([BM, BD], tl.float32)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)

    for first in tl.range(0, N, BP, num_stages=1):
        o_prompt = first + tl.arange(0, BP)
        b_inverse_std = inverse_std(p_gram, selection, task, o_prompt, eps, K, SELECTED, SIZES, BP)
        sources = (p_bank_key, p_key_offset, p_static_key, p_instance_key)
        # (BP, BD) each
        b_prompt_key = prompt_tile(
            sources, prompt_strides, selection, b_inverse_std, item, task, head, o_prompt, K, SELECTED, SIZES, D, BD, WIDE, BP
        )
        sources = (p_bank_value, p_value_offset, p_static_value, p_instance_value)
        b_prompt_value = prompt_tile(
            sources, prompt_strides, selection, b_inverse_std, item, task, head, o_prompt, K, SELECTED, SIZES, D, BD, WIDE, BP
        )
        b_out, b_max, b_sum = attend(
            b_query,
            b_prompt_key.to(b_query.dtype),
            b_prompt_value.to(b_query.dtype),
            b_out,
            b_max,
            b_sum,
            (o_prompt < N)[None, :],
            None,
            0.0,
            o_query,
            o_prompt,
            scale_log2,
            p_seed,
            item_head,
            dropout_p,
            PRECISION,
        )

    b_out, b_max, b_sum = attend_tokens(
        b_query,
        p_key,
        p_value,
        None,
        p_seed,
        b_out,
        b_max,
        b_sum,
        key_strides,
        value_strides,
        None,
        item_head,
        block,
        num_queries,
        visible_tokens(p_lengths, item, num_keys),
        scale_log2,
        dropout_p,
        False,
        H,
        N,
        D,
        BD,
        WIDE,
        BM,
        BN,
        PRECISION,
    )
    store_output(p_out, p_lse, p_seed, b_out, b_max, b_sum, item_head, o_query, num_queries, keep_scale, H, D, BD, WIDE)
