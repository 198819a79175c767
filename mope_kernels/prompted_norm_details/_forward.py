# mypy: allow-untyped-defs, allow-incomplete-defs
"""Forward kernel of the prompts of a routed block: router, mixture and LayerNorm. Each program writes one row of one item."""

import triton
import triton.language as tl

from mope_kernels.add_norm_details._forward import layer_norm, load_affine
from mope_kernels.route_details._forward import store_routing


@triton.jit
def router_scores(
    p_seen,
    p_self_bias,
    p_self_keys,
    p_cross_logits,
    p_noise,
    num_rows,
    num_chunks,
    temperature,
    K: tl.constexpr,
    QUERY: tl.constexpr,
    CHUNKS: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
):
    """Return the scores ((pool(x) W' + b) keys + cross_logits) / temperature + noise of an item's experts: (BK,)."""
    o_expert = tl.arange(0, BK)
    m_expert = o_expert < K
    b_logits = tl.zeros([BK], tl.float32)
    if p_cross_logits is not None:
        b_logits = tl.load(p_cross_logits + o_expert, mask=m_expert, other=0.0).to(tl.float32)
    if p_seen is not None:
        o_chunk = tl.arange(0, CHUNKS)
        for start in range(0, QUERY, BQ):
            o_query = start + tl.arange(0, BQ)
            m_query = o_query < QUERY
            mask = (o_chunk < num_chunks)[:, None] & m_query[None, :]
            # (CHUNKS, BQ)
            b_seen = tl.load(p_seen + o_chunk[:, None] * QUERY + o_query[None, :], mask=mask, other=0.0)
            b_query = tl.sum(b_seen, 0) / num_rows
            if p_self_bias is not None:
                b_query += tl.load(p_self_bias + o_query, mask=m_query, other=0.0).to(tl.float32)
            mask = m_query[:, None] & m_expert[None, :]
            # (BQ, BK)
            b_keys = tl.load(p_self_keys + o_query[:, None] * K + o_expert[None, :], mask=mask, other=0.0).to(tl.float32)
            b_logits += tl.sum(b_query[:, None] * b_keys, 0)
    b_scores = tl.div_rn(b_logits, temperature)
    if p_noise is not None:
        b_scores += tl.load(p_noise + o_expert, mask=m_expert, other=0.0).to(tl.float32)
    return tl.where(m_expert, b_scores, float("-inf"))


@triton.jit
def route_scores(b_scores, K: tl.constexpr, TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, BK: tl.constexpr):
    """Return probs, weights and rank of every expert, (BK,) each. Like `route_item`, but for scores in registers."""
    o_expert = tl.arange(0, BK)
    b_probs = tl.exp(b_scores - tl.max(b_scores, 0))
    total = tl.sum(b_probs, 0)
    b_probs = b_probs / total
    b_weights = b_probs
    b_rank = o_expert
    if TOP_K > 0:
        # NaN cannot be ranked, so an item with NaN ranks its experts by index.
        b_scores = tl.where(total != total, 0.0, b_scores)
        b_rank = tl.where(o_expert < K, 0, BK)
        for start in range(0, K, 16):
            o_other = start + tl.arange(0, 16)
            m_other = o_other < K
            # (16,): the same scores along the other axis; each sum has one term and zeros, so it is exact
            b_other = tl.sum(tl.where(o_other[:, None] == o_expert[None, :], b_scores[None, :], 0.0), 1)
            before = b_other[:, None] > b_scores[None, :]
            before |= (b_other[:, None] == b_scores[None, :]) & (o_other[:, None] < o_expert[None, :])
            b_rank += tl.sum((before & m_other[:, None]).to(tl.int32), 0)
        if RENORMALIZE:
            b_weights = b_probs / tl.sum(tl.where(b_rank < TOP_K, b_probs, 0.0), 0)
    return b_probs, b_weights, b_rank


@triton.jit
def add_slots(b_row, p_expert_row, o_slot, b_index, b_weight, stride_expert, o_column, SELECTED: tl.constexpr, C: tl.constexpr):
    """Add the contribution of the experts in some slots to a prompt: (BC,)."""
    mask = (o_slot < SELECTED)[:, None] & (o_column < C)[None, :]
    # (BT, BC)
    b_experts = tl.load(p_expert_row + b_index.to(tl.int64)[:, None] * stride_expert + o_column[None, :], mask=mask, other=0.0)
    return b_row + tl.sum(tl.where(mask, b_weight[:, None] * b_experts.to(tl.float32), 0.0), 0)


@triton.jit(do_not_specialize=["num_rows", "num_chunks"])
def place_prompts(
    p_static,
    p_experts,
    p_mapped,
    p_weight,
    p_bias,
    p_seen,
    p_sums,
    p_self_bias,
    p_self_keys,
    p_cross_logits,
    p_noise,
    p_routing_weights,
    p_routing_indices,
    p_total,
    p_normed,
    p_probs,
    p_weights,
    p_indices,
    p_pooled,
    stride_static,
    expert_strides,
    mapped_strides,
    stride_cross_logits,
    stride_noise,
    stride_routing_weights,
    stride_routing_indices,
    stride_out,
    num_rows,
    num_chunks,
    temperature,
    eps,
    C: tl.constexpr,
    SIZES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    K: tl.constexpr,
    QUERY: tl.constexpr,
    SELECTED: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Write row program_id % PROGRAMS of an item's prompts [static; routed; mapped], SIZES rows each, to total and normed.

    Each program with a routed row repeats the item's routing. The program of the first routed row, which exists even if there is no
    row to write, also writes the routing and, if p_pooled is given, the mean of the item's rows (B,C).
    """
    S: tl.constexpr = SIZES[0]
    P: tl.constexpr = SIZES[1]
    M: tl.constexpr = SIZES[2]
    item = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    row = tl.program_id(0) % PROGRAMS
    o_column = tl.arange(0, BC)
    m_column = o_column < C
    b_row = tl.zeros([BC], tl.float32)
    if K > 0:
        # Stay within the tensor even for rows that do not read it.
        prompt = tl.minimum(tl.maximum(row - S, 0), max(P - 1, 0))
        p_expert_row = p_experts + prompt.to(tl.int64) * expert_strides[1]
        if (row >= S) & (row < S + max(P, 1)):
            if p_routing_weights is not None:
                for start in range(0, SELECTED, BT):
                    o_slot = start + tl.arange(0, BT)
                    m_slot = o_slot < SELECTED
                    # (BT,) each
                    b_index = tl.load(p_routing_indices + item * stride_routing_indices + o_slot, mask=m_slot, other=0)
                    b_weight = tl.load(p_routing_weights + item * stride_routing_weights + o_slot, mask=m_slot, other=0.0)
                    if P > 0:
                        b_row = add_slots(
                            b_row, p_expert_row, o_slot, b_index, b_weight.to(tl.float32), expert_strides[0], o_column, SELECTED, C
                        )
            else:
                b_scores = router_scores(
                    None if p_seen is None else p_seen + item * (num_chunks * QUERY),
                    p_self_bias,
                    p_self_keys,
                    None if p_cross_logits is None else p_cross_logits + item * stride_cross_logits,
                    None if p_noise is None else p_noise + item * stride_noise,
                    num_rows,
                    num_chunks,
                    temperature,
                    K,
                    QUERY,
                    CHUNKS,
                    BQ,
                    BK,
                )
                b_probs, b_weights, b_rank = route_scores(b_scores, K, TOP_K, RENORMALIZE, BK)
                if row == S:
                    store_routing(p_probs, p_weights, p_indices, item, b_probs, b_weights, b_rank, K, TOP_K, BK)
                    if TOP_K == 0:
                        o_index = tl.arange(0, BK)
                        tl.store(p_indices + item * K + o_index, o_index.to(tl.int64), mask=o_index < K)
                    if p_pooled is not None:
                        b_sums = tl.zeros([BR, BC], tl.float32)
                        for start in range(0, num_chunks, BR):
                            o_chunk = start + tl.arange(0, BR)
                            mask = (o_chunk < num_chunks)[:, None] & m_column[None, :]
                            # (BR, BC)
                            o_sum = (item * num_chunks + o_chunk[:, None]) * C + o_column[None, :]
                            b_sums += tl.load(p_sums + o_sum, mask=mask, other=0.0)
                        tl.store(p_pooled + item * C + o_column, tl.sum(b_sums, 0) / num_rows, mask=m_column)
                if P > 0:
                    o_expert = tl.arange(0, BK)
                    for start in range(0, SELECTED, BT):
                        o_slot = start + tl.arange(0, BT)
                        # (BT, BK), and (BT,) each
                        in_slot = o_slot[:, None] == b_rank[None, :]
                        b_index = tl.sum(tl.where(in_slot, o_expert[None, :], 0), 1)
                        b_weight = tl.sum(tl.where(in_slot, b_weights[None, :], 0.0), 1)
                        b_row = add_slots(b_row, p_expert_row, o_slot, b_index, b_weight, expert_strides[0], o_column, SELECTED, C)
    if S > 0:
        p_static += row.to(tl.int64) * stride_static
        if row < S:
            b_row = tl.load(p_static + o_column, mask=m_column, other=0.0).to(tl.float32)
    if M > 0:
        p_mapped += item * mapped_strides[0] + (row - (S + P)).to(tl.int64) * mapped_strides[1]
        if row >= S + P:
            b_row = tl.load(p_mapped + o_column, mask=m_column, other=0.0).to(tl.float32)
    if row < S + P + M:
        o_out = item * stride_out + row.to(tl.int64) * C + o_column
        b_rounded = b_row.to(p_total.dtype.element_ty)
        tl.store(p_total + o_out, b_rounded, mask=m_column)
        b_weight, b_bias = load_affine(p_weight, p_bias, o_column, C, BC)
        b_normed = layer_norm(b_rounded.to(tl.float32)[None, :], b_weight, b_bias, m_column, eps, C)
        tl.store(p_normed + o_out[None, :], b_normed.to(p_normed.dtype.element_ty), mask=m_column[None, :])
