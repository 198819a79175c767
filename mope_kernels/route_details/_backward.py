# mypy: allow-untyped-defs, allow-incomplete-defs
"""Backward kernel of the routing, one item per program."""

import triton
import triton.language as tl


@triton.jit
def route_item_backward(
    p_grad_probs,
    p_grad_weights,
    p_probs,
    p_weights,
    p_indices,
    item,
    temperature,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
):
    """Return the gradient of an item's logits: (BK,). If p_indices is None, the weights are the probabilities."""
    o_expert = tl.arange(0, BK)
    m_expert = o_expert < K
    # (BK,)
    b_probs = tl.load(p_probs + item * K + o_expert, mask=m_expert, other=0.0)
    b_grad = tl.zeros([BK], tl.float32)
    if p_grad_probs is not None:
        b_grad += tl.load(p_grad_probs + item * K + o_expert, mask=m_expert, other=0.0).to(tl.float32)
    if p_grad_weights is not None and p_indices is None:
        b_grad += tl.load(p_grad_weights + item * K + o_expert, mask=m_expert, other=0.0).to(tl.float32)
    if p_grad_weights is not None and p_indices is not None:
        # weights = probs[indices] / total. Without renormalization, total is 1 and the weights share no gradient term.
        b_total = tl.full([BT], 1.0, tl.float32)
        b_common = tl.zeros([BT], tl.float32)
        if RENORMALIZE:
            b_total = tl.zeros([BT], tl.float32)
            for start in range(0, TOP_K, BT):
                o_slot = start + tl.arange(0, BT)
                m_slot = o_slot < TOP_K
                # (BT,) each
                b_index = tl.load(p_indices + item * TOP_K + o_slot, mask=m_slot, other=0)
                b_total += tl.load(p_probs + item * K + b_index, mask=m_slot, other=0.0)
                b_weight = tl.load(p_weights + item * TOP_K + o_slot, mask=m_slot, other=0.0)
                b_grad_weight = tl.load(p_grad_weights + item * TOP_K + o_slot, mask=m_slot, other=0.0).to(tl.float32)
                b_common += b_grad_weight * b_weight
            b_total = tl.zeros_like(b_total) + tl.sum(b_total, 0)
            b_common = tl.zeros_like(b_common) + tl.sum(b_common, 0)
        for start in range(0, TOP_K, BT):
            o_slot = start + tl.arange(0, BT)
            m_slot = o_slot < TOP_K
            # (BT,) each
            b_index = tl.load(p_indices + item * TOP_K + o_slot, mask=m_slot, other=-1)
            b_grad_weight = tl.load(p_grad_weights + item * TOP_K + o_slot, mask=m_slot, other=0.0).to(tl.float32)
            b_grad_selected = (b_grad_weight - b_common) / b_total
            b_grad += tl.sum(tl.where(b_index[None, :] == o_expert[:, None], b_grad_selected[None, :], 0.0), 1)
    return b_probs * (b_grad - tl.sum(b_grad * b_probs, 0)) / temperature


@triton.jit
def route_backward(
    p_grad_probs,
    p_grad_weights,
    p_probs,
    p_weights,
    p_indices,
    p_grad_logits,
    temperature,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    o_expert = tl.arange(0, BK)
    b_grad_logits = route_item_backward(
        p_grad_probs, p_grad_weights, p_probs, p_weights, p_indices, item, temperature, K, TOP_K, RENORMALIZE, BK, BT
    )
    tl.store(p_grad_logits + item * K + o_expert, b_grad_logits, mask=o_expert < K)
