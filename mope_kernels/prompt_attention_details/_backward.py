# mypy: allow-untyped-defs, allow-incomplete-defs
"""Backward kernels of attention over [prompts; tokens]. One program computes each sum in a fixed order, without atomics.

The probabilities P are recomputed from the saved lse and the scores, rounded as in the forward. With dP the gradient of the
probabilities and delta = sum_d out * grad_out, the gradient of the scores is dS = P * (dP - delta), and
grad_query = scale * dS K, grad_key = scale * dS' Q, grad_value = P' grad_out.
"""

import triton
import triton.language as tl

from ._forward import item_rows, keep_mask, load_bias, load_tile, matrix_offset, store_tile, visible_tokens


@triton.jit(do_not_specialize=["num_queries"])
def output_products(
    p_out,
    p_grad_out,
    p_offsets,
    p_delta,
    grad_out_strides,
    num_queries,
    H: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
):
    """Compute delta (B,H,Lq) = sum_d out * grad_out for BM queries of one item and head; out has layout (B,Lq,H,D)."""
    blocks = tl.cdiv(num_queries, BM)
    item_head = tl.program_id(0) // blocks
    item = (item_head // H).to(tl.int64)
    head = (item_head % H).to(tl.int64)
    o_query = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    first, queries, row = item_rows(p_offsets, item, num_queries)
    m_query = o_query < queries
    # (BM, BD) each
    b_out = load_tile(p_out + (row * H + head) * D, o_query, m_query, H * D, D, BD, WIDE).to(tl.float32)
    p_grad_out += matrix_offset(item, head, grad_out_strides, first)
    b_grad_out = load_tile(p_grad_out, o_query, m_query, grad_out_strides[2], D, BD, WIDE).to(tl.float32)
    tl.store(p_delta + item_head.to(tl.int64) * num_queries + o_query, tl.sum(b_out * b_grad_out, 1), mask=m_query)


@triton.jit
def rebuild_probs(b_scores_log2, b_lse, PRECISION: tl.constexpr):
    """Return exp2(score - lse) for broadcastable scores and float64 lse."""
    b_lse_high = b_lse.to(tl.float32)
    b_difference = b_scores_log2 - b_lse_high
    if PRECISION == "ieee":
        # Subtract the part of lse that float32 cannot represent. With 16-bit operands, larger errors hide it.
        b_difference -= tl.where(b_lse_high == float("inf"), 0.0, b_lse - b_lse_high.to(tl.float64)).to(tl.float32)
    return tl.exp2(b_difference)


@triton.jit
def query_gradient_step(
    b_query,
    b_grad_out,
    b_lse,
    b_delta,
    b_key,
    b_value,
    b_grad,
    m_score,
    p_bias,
    b_bias,
    o_query,
    o_column,
    scale_log2,
    p_seed,
    item_head,
    dropout_p,
    keep_scale,
    PRECISION: tl.constexpr,
):
    """Add the contribution of one block of keys (BN,BD), masked by `m_score` (1|BM,BN), to grad_query / scale (BM,BD)."""
    # (BM, BN) each
    b_scores = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION) * scale_log2
    if p_bias is not None:
        b_scores += b_bias * 1.4426950408889634
    b_probs = tl.where(m_score, rebuild_probs(b_scores, b_lse[:, None], PRECISION), 0.0)
    b_grad_probs = tl.dot(b_grad_out, tl.trans(b_value), input_precision=PRECISION)
    if p_seed is not None:
        keep = keep_mask(p_seed, item_head, o_query[:, None], o_column[None, :], dropout_p)
        b_grad_probs = tl.where(keep, b_grad_probs * keep_scale, 0.0)
    b_grad_scores = b_probs * (b_grad_probs - b_delta[:, None])
    return tl.dot(b_grad_scores.to(b_key.dtype), b_key, b_grad, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def query_gradient(
    p_query,
    p_key,
    p_value,
    p_prompt_key,
    p_prompt_value,
    p_lengths,
    p_bias,
    p_seed,
    p_offsets,
    p_lse,
    p_delta,
    p_grad_out,
    p_grad_query,
    query_strides,
    key_strides,
    value_strides,
    prompt_strides,
    bias_strides,
    grad_out_strides,
    num_queries,
    num_keys,
    scale,
    scale_log2,
    dropout_p,
    keep_scale,
    IS_CAUSAL: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
    BP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute grad_query, in layout (B,Lq,H,D), for BM queries of one item and head."""
    blocks = tl.cdiv(num_queries, BM)
    item_head = tl.program_id(0) // blocks
    item = (item_head // H).to(tl.int64)
    head = (item_head % H).to(tl.int64)
    block = tl.program_id(0) % blocks
    first, queries, row = item_rows(p_offsets, item, num_queries)
    _, keys, _ = item_rows(p_offsets, item, num_keys)
    if p_offsets is not None and block * BM >= queries:
        return
    o_query = block * BM + tl.arange(0, BM)
    m_query = o_query < queries
    # (BM, BD) each
    p_query += matrix_offset(item, head, query_strides, first)
    b_query = load_tile(p_query, o_query, m_query, query_strides[2], D, BD, WIDE)
    p_grad_out += matrix_offset(item, head, grad_out_strides, first)
    b_grad_out = load_tile(p_grad_out, o_query, m_query, grad_out_strides[2], D, BD, WIDE)
    # (BM,) each; exp2(score - inf) = 0 for rows out of bounds
    o_row = item_head.to(tl.int64) * num_queries + o_query
    b_lse = tl.load(p_lse + o_row, mask=m_query, other=float("inf"))
    b_delta = tl.load(p_delta + o_row, mask=m_query, other=0.0)
    b_grad = tl.zeros([BM, BD], tl.float32)

    p_prompt_key += matrix_offset(item, head, prompt_strides)
    p_prompt_value += matrix_offset(item, head, prompt_strides)
    for start in tl.range(0, N, BP, num_stages=1):
        o_prompt = start + tl.arange(0, BP)
        # (BP, BD) each
        b_prompt_key = load_tile(p_prompt_key, o_prompt, o_prompt < N, prompt_strides[2], D, BD, WIDE)
        b_prompt_value = load_tile(p_prompt_value, o_prompt, o_prompt < N, prompt_strides[2], D, BD, WIDE)
        b_grad = query_gradient_step(
            b_query,
            b_grad_out,
            b_lse,
            b_delta,
            b_prompt_key,
            b_prompt_value,
            b_grad,
            (o_prompt < N)[None, :],
            None,
            0.0,
            o_query,
            o_prompt,
            scale_log2,
            p_seed,
            item_head,
            dropout_p,
            keep_scale,
            PRECISION,
        )

    p_key += matrix_offset(item, head, key_strides, first)
    p_value += matrix_offset(item, head, value_strides, first)
    visible = visible_tokens(p_lengths, item, keys)
    if IS_CAUSAL:
        # No query of this block attends to keys after its last query.
        visible = tl.minimum(visible, block * BM + BM)
    if p_bias is not None:
        p_bias += item * bias_strides[0] + head * bias_strides[1] + block.to(tl.int64) * BM * bias_strides[2]
    for start in tl.range(0, visible, BN):
        o_key = start + tl.arange(0, BN)
        # (1, BN) or (BM, BN)
        m_score = (o_key < visible)[None, :]
        if IS_CAUSAL:
            m_score = m_score & (o_key[None, :] <= o_query[:, None])
        # (BN, BD) each
        b_key = load_tile(p_key, o_key, o_key < visible, key_strides[2], D, BD, WIDE)
        b_value = load_tile(p_value, o_key, o_key < visible, value_strides[2], D, BD, WIDE)
        m_bias = m_score & m_query[:, None]
        b_bias = load_bias(p_bias, tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :], m_bias, bias_strides, start, 3)
        b_grad = query_gradient_step(
            b_query,
            b_grad_out,
            b_lse,
            b_delta,
            b_key,
            b_value,
            b_grad,
            m_score,
            p_bias,
            b_bias,
            o_query,
            N + o_key,
            scale_log2,
            p_seed,
            item_head,
            dropout_p,
            keep_scale,
            PRECISION,
        )
    p_grad_query += (row * H + head) * D
    store_tile(p_grad_query, o_query, m_query, H * D, b_grad * scale, D, BD, WIDE)


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def key_value_gradient(
    p_query,
    p_key,
    p_value,
    p_lengths,
    p_bias,
    p_seed,
    p_offsets,
    p_key_offsets,
    p_lse,
    p_delta,
    p_grad_out,
    p_grad_key,
    p_grad_value,
    query_strides,
    key_strides,
    value_strides,
    bias_strides,
    grad_out_strides,
    grad_strides,
    num_queries,
    num_keys,
    scale,
    scale_log2,
    dropout_p,
    keep_scale,
    IS_CAUSAL: tl.constexpr,
    FIRST_COLUMN: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute grad_key and grad_value, each if its pointer is not None, for BN tokens or prompts of one item and head.

    FIRST_COLUMN is the position of the first key in [prompts; tokens]. Hidden keys get zeros. With packed items, p_offsets holds
    the offsets of the queries and p_key_offsets those of the keys, if the keys are tokens.
    """
    blocks = tl.cdiv(num_keys, BN)
    item_head = tl.program_id(0) // blocks
    item = (item_head // H).to(tl.int64)
    head = (item_head % H).to(tl.int64)
    block = tl.program_id(0) % blocks
    o_key = block * BN + tl.arange(0, BN)
    first, queries, _ = item_rows(p_offsets, item, num_queries)
    first_key, keys, _ = item_rows(p_key_offsets, item, num_keys)
    if p_key_offsets is not None and block * BN >= keys:
        return
    visible = visible_tokens(p_lengths, item, keys)
    m_key = o_key < visible
    # (BN, BD) each
    p_key += matrix_offset(item, head, key_strides, first_key)
    b_key = load_tile(p_key, o_key, m_key, key_strides[2], D, BD, WIDE)
    p_value += matrix_offset(item, head, value_strides, first_key)
    b_value = load_tile(p_value, o_key, m_key, value_strides[2], D, BD, WIDE)
    b_grad_key = tl.zeros([BN, BD], tl.float32)
    b_grad_value = tl.zeros([BN, BD], tl.float32)

    p_query += matrix_offset(item, head, query_strides, first)
    p_grad_out += matrix_offset(item, head, grad_out_strides, first)
    p_lse += item_head.to(tl.int64) * num_queries
    p_delta += item_head.to(tl.int64) * num_queries
    if p_bias is not None:
        p_bias += item * bias_strides[0] + head * bias_strides[1] + block.to(tl.int64) * BN * bias_strides[3]
    start_query = 0
    if IS_CAUSAL:
        # No query before these keys attends to any of them.
        start_query = block * BN
    for start in tl.range(start_query, tl.where(block * BN < visible, queries, 0), BM):
        o_query = start + tl.arange(0, BM)
        m_query = o_query < queries
        # (BN, 1) or (BN, BM)
        m_score = m_key[:, None]
        if IS_CAUSAL:
            m_score = m_score & (o_key[:, None] <= o_query[None, :])
        # (BM, BD) each
        b_query = load_tile(p_query, o_query, m_query, query_strides[2], D, BD, WIDE)
        b_grad_out = load_tile(p_grad_out, o_query, m_query, grad_out_strides[2], D, BD, WIDE)
        # (BM,); exp2(score - inf) = 0 for rows out of bounds
        b_lse = tl.load(p_lse + o_query, mask=m_query, other=float("inf"))
        # (BN, BM)
        b_scores = tl.dot(b_key, tl.trans(b_query), input_precision=PRECISION) * scale_log2
        m_bias = m_score & m_query[None, :]
        b_bias = load_bias(p_bias, tl.arange(0, BM)[None, :], tl.arange(0, BN)[:, None], m_bias, bias_strides, start, 2)
        if p_bias is not None:
            b_scores += b_bias * 1.4426950408889634
        b_probs = tl.where(m_score, rebuild_probs(b_scores, b_lse[None, :], PRECISION), 0.0)
        if p_seed is not None:
            keep = keep_mask(p_seed, item_head, o_query[None, :], FIRST_COLUMN + o_key[:, None], dropout_p)
            b_dropped = tl.where(keep, b_probs * keep_scale, 0.0)
        else:
            b_dropped = b_probs
        if p_grad_value is not None:
            b_grad_value = tl.dot(b_dropped.to(b_grad_out.dtype), b_grad_out, b_grad_value, input_precision=PRECISION)
        if p_grad_key is not None:
            b_delta = tl.load(p_delta + o_query, mask=m_query, other=0.0)
            # (BN, BM)
            b_grad_probs = tl.dot(b_value, tl.trans(b_grad_out), input_precision=PRECISION)
            b_grad_scores = b_dropped * b_grad_probs - b_probs * b_delta[None, :]
            b_grad_key = tl.dot(b_grad_scores.to(b_query.dtype), b_query, b_grad_key, input_precision=PRECISION)

    o_grad = matrix_offset(item, head, grad_strides, first_key)
    if p_grad_key is not None:
        store_tile(p_grad_key + o_grad, o_key, o_key < keys, grad_strides[2], b_grad_key * scale, D, BD, WIDE)
    if p_grad_value is not None:
        store_tile(p_grad_value + o_grad, o_key, o_key < keys, grad_strides[2], b_grad_value, D, BD, WIDE)
