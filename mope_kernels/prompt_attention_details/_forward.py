# mypy: allow-untyped-defs, allow-incomplete-defs
"""Forward kernel of attention over [prompts; tokens], and helpers shared by all attention kernels."""

import triton
import triton.language as tl


@triton.jit
def item_rows(p_offsets, item, num_rows):
    """Return an item's first row in its matrix, its number of rows, and its first row among the rows of all items.

    Each padded item has its own matrix of `num_rows` rows. Packed items share one matrix and start at the rows in `p_offsets`.
    """
    if p_offsets is None:
        return 0, num_rows, item * num_rows
    else:
        first = tl.load(p_offsets + item).to(tl.int64)
        return first, (tl.load(p_offsets + item + 1) - first).to(tl.int32), first


@triton.jit
def matrix_offset(item, head, strides, first=0):
    """Return the offset of row `first` in the (L,D) matrix of an item and a head, both int64."""
    # The launchers copy rows that do not start at multiples of 8 elements. Triton detects only multiples of 16 by itself and would
    # read heads of 72 or 88 columns element by element.
    offset = tl.multiple_of(item * strides[0] + head * strides[1], 8)
    # A separate term, because Triton forgets the alignment of a sum with 0; `item * 0` makes it a tensor if `first` is a number.
    return offset + tl.multiple_of((item * 0 + first) * strides[2], 8)


@triton.jit
def row_offsets(o_row, stride_row, WIDE: tl.constexpr):
    """Return the offsets of rows of an (L,D) matrix: (rows, 1), in 64 bits if WIDE."""
    if WIDE:
        o_row = o_row.to(tl.int64)
    return tl.multiple_of(o_row[:, None] * stride_row, (8, 8))


@triton.jit
def load_tile(p_matrix, o_row, m_row, stride_row, D: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr):
    """Load rows of an (L,D) matrix: (rows, BD), zero where masked and beyond column D."""
    o_column = tl.arange(0, BD)
    mask = m_row[:, None]
    if D != BD:
        mask = mask & (o_column < D)[None, :]
    return tl.load(p_matrix + row_offsets(o_row, stride_row, WIDE) + o_column[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(p_matrix, o_row, m_row, stride_row, b_tile, D: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr):
    """Store a (rows, BD) tile to rows of an (L,D) matrix, in its dtype."""
    o_column = tl.arange(0, BD)
    mask = m_row[:, None]
    if D != BD:
        mask = mask & (o_column < D)[None, :]
    tl.store(p_matrix + row_offsets(o_row, stride_row, WIDE) + o_column[None, :], b_tile.to(p_matrix.dtype.element_ty), mask=mask)


@triton.jit
def visible_tokens(p_lengths, item, num_keys):
    """Return the number of tokens of an item that may be attended to."""
    if p_lengths is None:
        return num_keys
    else:
        return tl.minimum(tl.load(p_lengths + item).to(tl.int32), num_keys)


@triton.jit
def load_bias(p_bias, i_query, i_key, mask, strides, start, AXIS: tl.constexpr):
    """Load the bias at i_query x i_key of the block starting at `start` along AXIS. Without a bias, return the scalar 0.

    One of i_query and i_key is a row vector, the other a column vector. Offsets within a block have 32 bits, because 64 bits per
    score would exhaust the registers. `p_bias` is not advanced, because Triton 3.6 cannot compile that in a loop for AMD GPUs.
    """
    # In Triton 3.6, a function called in a loop cannot return None.
    if p_bias is None:
        return 0.0
    else:
        p_block = p_bias + tl.full([], start, tl.int64) * strides[AXIS]
        return tl.load(p_block + (i_query * strides[2] + i_key * strides[3]), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def keep_mask(p_seed, item_head, o_query, o_column, dropout_p):
    """Return the dropout mask at o_query x o_column, True to keep. One of the two is a row vector, the other a column vector.

    The random counter is (column, query, item and head), so forward and backward agree regardless of block sizes.
    """
    b_column = o_column + tl.zeros_like(o_query)
    b_query = o_query + tl.zeros_like(o_column)
    b_random, _, _, _ = tl.philox(tl.load(p_seed), b_column, b_query, item_head, 0)
    return tl.uint_to_uniform_float(b_random) >= dropout_p


@triton.jit
def attend(
    b_query,
    b_key,
    b_value,
    b_out,
    b_max,
    b_sum,
    m_score,
    p_bias,
    b_bias,
    o_query,
    o_column,
    scale_log2,
    p_seed,
    item_head,
    dropout_p,
    PRECISION: tl.constexpr,
):
    """Attend to a block of keys (BN,BD), masked by `m_score` (1|BM,BN), in one step of the online softmax.

    b_out (BM,BD) accumulates exp2(score - b_max) * value, and b_sum (BM,) accumulates exp2(score - b_max).
    """
    # (BM, BN), in base 2
    b_scores = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION) * scale_log2
    if p_bias is not None:
        b_scores += b_bias * 1.4426950408889634
    b_scores = tl.where(m_score, b_scores, float("-inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_scores, 1))
    # A row whose scores are all -inf so far stays at zero; -inf - -inf would be NaN.
    b_base = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
    b_probs = tl.exp2(b_scores - b_base[:, None])
    b_decay = tl.exp2(b_max - b_base)
    b_sum = b_sum * b_decay + tl.sum(b_probs, 1)
    if p_seed is not None:
        b_probs = tl.where(keep_mask(p_seed, item_head, o_query[:, None], o_column[None, :], dropout_p), b_probs, 0.0)
    b_out = tl.dot(b_probs.to(b_value.dtype), b_value, b_out * b_decay[:, None], input_precision=PRECISION)
    return b_out, b_new_max, b_sum


@triton.jit
def attend_tokens(
    b_query,
    p_key,
    p_value,
    p_bias,
    p_seed,
    b_out,
    b_max,
    b_sum,
    key_strides,
    value_strides,
    bias_strides,
    item_head,
    block,
    num_queries,
    visible,
    scale_log2,
    dropout_p,
    IS_CAUSAL: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
    first=0,
):
    """Attend from query block `block` to the `visible` tokens from row `first` on, which follow N prompts."""
    item = (item_head // H).to(tl.int64)
    head = (item_head % H).to(tl.int64)
    o_query = block * BM + tl.arange(0, BM)
    p_key += matrix_offset(item, head, key_strides, first)
    p_value += matrix_offset(item, head, value_strides, first)
    if p_bias is not None:
        p_bias += item * bias_strides[0] + head * bias_strides[1] + block.to(tl.int64) * BM * bias_strides[2]
    for start in tl.range(0, visible, BN):
        o_key = start + tl.arange(0, BN)
        m_key = o_key < visible
        # (1, BN) or (BM, BN)
        m_score = m_key[None, :]
        if IS_CAUSAL:
            m_score = m_score & (o_key[None, :] <= o_query[:, None])
        # (BN, BD) each; hidden tokens are not read, because they may hold NaN
        b_key = load_tile(p_key, o_key, m_key, key_strides[2], D, BD, WIDE)
        b_value = load_tile(p_value, o_key, m_key, value_strides[2], D, BD, WIDE)
        m_bias = m_score & (o_query < num_queries)[:, None]
        b_bias = load_bias(p_bias, tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :], m_bias, bias_strides, start, 3)
        b_out, b_max, b_sum = attend(
            b_query,
            b_key,
            b_value,
            b_out,
            b_max,
            b_sum,
            m_score,
            p_bias,
            b_bias,
            o_query,
            N + o_key,
            scale_log2,
            p_seed,
            item_head,
            dropout_p,
            PRECISION,
        )
    return b_out, b_max, b_sum


@triton.jit
def store_output(
    p_out,
    p_lse,
    p_seed,
    b_out,
    b_max,
    b_sum,
    item_head,
    o_query,
    num_queries,
    keep_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
    p_offsets=None,
):
    """Finish the online softmax: store out, in layout (B,Lq,H,D), and lse (B,H,Lq) of BM queries of one item and head.

    lse is the log2 of the sum of exp2 of the scores. It is float64, because in float32 its rounding error would be as large as that
    of a score and would affect every probability of the row.
    """
    item = (item_head // H).to(tl.int64)
    head = (item_head % H).to(tl.int64)
    _, queries, row = item_rows(p_offsets, item, num_queries)
    m_query = o_query < queries
    # A row without visible keys sums to 0: its output is 0, and lse = +inf makes its gradients 0.
    b_lse = b_max.to(tl.float64) + tl.log2(tl.where(b_sum == 0.0, 1.0, b_sum)).to(tl.float64)
    b_lse = tl.where(b_sum == 0.0, float("inf"), b_lse)
    b_out /= tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    if p_seed is not None:
        b_out *= keep_scale
    p_out += (row * H + head) * D
    store_tile(p_out, o_query, m_query, H * D, b_out, D, BD, WIDE)
    tl.store(p_lse + item_head.to(tl.int64) * num_queries + o_query, b_lse, mask=m_query)


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def prompt_attention_forward(
    p_query,
    p_key,
    p_value,
    p_prompt_key,
    p_prompt_value,
    p_lengths,
    p_bias,
    p_seed,
    p_offsets,
    p_out,
    p_lse,
    query_strides,
    key_strides,
    value_strides,
    prompt_strides,
    bias_strides,
    num_queries,
    num_keys,
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
    """Compute the attention of BM queries of one item and head.

    scale_log2 is the score scale times log2(e), keep_scale is 1 / (1 - dropout_p). With packed items, num_queries and num_keys are
    those of the longest item.
    """
    blocks = tl.cdiv(num_queries, BM)
    item_head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    item = (item_head // H).to(tl.int64)
    head = (item_head % H).to(tl.int64)
    first, queries, _ = item_rows(p_offsets, item, num_queries)
    _, keys, _ = item_rows(p_offsets, item, num_keys)
    if p_offsets is not None and block * BM >= queries:
        return
    o_query = block * BM + tl.arange(0, BM)
    # (BM, BD)
    p_query += matrix_offset(item, head, query_strides, first)
    b_query = load_tile(p_query, o_query, o_query < queries, query_strides[2], D, BD, WIDE)
    b_out = tl.zeros([BM, BD], tl.float32)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)

    p_prompt_key += matrix_offset(item, head, prompt_strides)
    p_prompt_value += matrix_offset(item, head, prompt_strides)
    for start in tl.range(0, N, BP, num_stages=1):
        o_prompt = start + tl.arange(0, BP)
        m_prompt = o_prompt < N
        # (BP, BD) each
        b_prompt_key = load_tile(p_prompt_key, o_prompt, m_prompt, prompt_strides[2], D, BD, WIDE).to(b_query.dtype)
        b_prompt_value = load_tile(p_prompt_value, o_prompt, m_prompt, prompt_strides[2], D, BD, WIDE).to(b_query.dtype)
        b_out, b_max, b_sum = attend(
            b_query,
            b_prompt_key,
            b_prompt_value,
            b_out,
            b_max,
            b_sum,
            m_prompt[None, :],
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

    visible = visible_tokens(p_lengths, item, keys)
    if IS_CAUSAL:
        # No query of this block attends to keys after its last query.
        visible = tl.minimum(visible, block * BM + BM)
    b_out, b_max, b_sum = attend_tokens(
        b_query,
        p_key,
        p_value,
        p_bias,
        p_seed,
        b_out,
        b_max,
        b_sum,
        key_strides,
        value_strides,
        bias_strides,
        item_head,
        block,
        queries,
        visible,
        scale_log2,
        dropout_p,
        IS_CAUSAL,
        H,
        N,
        D,
        BD,
        WIDE,
        BM,
        BN,
        PRECISION,
        first,
    )
    store_output(p_out, p_lse, p_seed, b_out, b_max, b_sum, item_head, o_query, num_queries, keep_scale, H, D, BD, WIDE, p_offsets)
