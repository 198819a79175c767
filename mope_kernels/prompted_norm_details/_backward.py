# mypy: allow-untyped-defs, allow-incomplete-defs
"""Backward kernels of the prompts of a routed block: gradients of its router and of the inputs that all items share."""

import triton
import triton.language as tl

from mope_kernels.route_details._backward import route_item_backward


@triton.jit
def router_backward(
    p_grad_probs,
    p_grad_weights,
    p_probs,
    p_weights,
    p_indices,
    p_self_keys,
    p_grad_logits,
    p_grad_query,
    temperature,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    QUERY: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
):
    """Compute the gradients of an item's logits and, if keys are given, of its query pool(x) W' + b."""
    item = tl.program_id(0).to(tl.int64)
    o_expert = tl.arange(0, BK)
    m_expert = o_expert < K
    b_grad_logits = route_item_backward(
        p_grad_probs, p_grad_weights, p_probs, p_weights, p_indices, item, temperature, K, TOP_K, RENORMALIZE, BK, BT
    )
    tl.store(p_grad_logits + item * K + o_expert, b_grad_logits, mask=m_expert)
    for query in range(QUERY):
        b_key = tl.load(p_self_keys + query * K + o_expert, mask=m_expert, other=0.0).to(tl.float32)
        tl.store(p_grad_query + item * QUERY + query, tl.sum(b_grad_logits * b_key, 0))


@triton.jit(do_not_specialize=["batch"])
def shared_backward(
    p_grad_prompts,
    p_weights,
    p_indices,
    p_grad_query,
    p_pooled,
    p_grad_static,
    p_grad_experts,
    p_grad_self_weight,
    p_grad_self_bias,
    batch,
    stride_weights,
    stride_indices,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    STATIC_ROWS: tl.constexpr,
    EXPERT_ROWS: tl.constexpr,
    QUERY: tl.constexpr,
    SELECTED: tl.constexpr,
    BB: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """Compute BC columns of one row of the gradient of static prompts, experts or W, summed over the batch in order.

    Each is a weighted sum over items, with one factor per item, of rows of the prompt gradients (B,ROWS,C) or of pooled (B,C).
    STATIC_ROWS, EXPERT_ROWS and QUERY are the numbers of rows requested of the three. Without indices, p_weights has one weight per
    expert.
    """
    blocks: tl.constexpr = (C + BC - 1) // BC
    row = tl.program_id(0) // blocks
    o_column = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    m_column = o_column < C
    expert_row = row - STATIC_ROWS
    query = expert_row - EXPERT_ROWS
    of_expert = (row >= STATIC_ROWS) & (query < 0)
    expert = expert_row // P
    p_rows = p_grad_prompts + tl.where(of_expert, S + expert_row % P, row) * C
    b_sum = tl.zeros([BC], tl.float32)
    b_factors = tl.zeros([BB], tl.float32)
    for start in range(0, batch, BB):
        o_item = (start + tl.arange(0, BB)).to(tl.int64)
        b_used = o_item < batch
        b_factor = tl.full([BB], 1.0, tl.float32)
        if of_expert:
            if p_indices is None:
                b_factor = tl.load(p_weights + o_item * stride_weights + expert, mask=b_used, other=0.0).to(tl.float32)
            else:
                b_factor = tl.zeros([BB], tl.float32)
                b_count = tl.zeros([BB], tl.int32)
                for first in range(0, SELECTED, BT):
                    o_slot = first + tl.arange(0, BT)
                    mask = (o_item < batch)[:, None] & (o_slot < SELECTED)[None, :]
                    # (BB, BT) each
                    b_index = tl.load(p_indices + o_item[:, None] * stride_indices + o_slot[None, :], mask=mask, other=-1)
                    b_weight = tl.load(p_weights + o_item[:, None] * stride_weights + o_slot[None, :], mask=mask, other=0.0)
                    b_factor += tl.sum(tl.where(b_index == expert, b_weight.to(tl.float32), 0.0), 1)
                    b_count += tl.sum((b_index == expert).to(tl.int32), 1)
                b_used = b_count > 0
        if query >= 0:
            b_factor = tl.load(p_grad_query + o_item * QUERY + query, mask=b_used, other=0.0)
        mask = b_used[:, None] & m_column[None, :]
        # (BB, BC); items that do not use an expert are not read, because they may hold NaN.
        # Use two loads, because Triton 3.6 cannot compile one load from either of two pointers for AMD GPUs.
        if query >= 0:
            b_rows = tl.load(p_pooled + o_item[:, None] * C + o_column[None, :], mask=mask, other=0.0)
        else:
            b_rows = tl.load(p_rows + o_item[:, None] * (ROWS * C) + o_column[None, :], mask=mask, other=0.0)
        b_sum += tl.sum(tl.where(mask, b_factor[:, None] * b_rows, 0.0), 0)
        b_factors += tl.where(b_used, b_factor, 0.0)
    if query >= 0:
        tl.store(p_grad_self_weight + query * C + o_column, b_sum, mask=m_column)
        tl.store(p_grad_self_bias + query, tl.sum(b_factors, 0))
    elif of_expert:
        b_grad = b_sum.to(p_grad_experts.dtype.element_ty)
        tl.store(p_grad_experts + expert_row.to(tl.int64) * C + o_column, b_grad, mask=m_column)
    else:
        tl.store(p_grad_static + row * C + o_column, b_sum, mask=m_column)
