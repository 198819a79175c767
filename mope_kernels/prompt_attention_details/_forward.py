# mypy: allow-untyped-defs, allow-incomplete-defs
"""Blocks of attention kernels: tiles, dropout, and the online softmax."""

import triton
import triton.language as tl


@triton.jit
def load_tile(p_matrix, o_row, m_row, stride_row, D: tl.constexpr, BD: tl.constexpr):
    """Rows of an (L,D) matrix: (rows, BD), zero where masked and beyond column D."""
    o_column = tl.arange(0, BD)
    mask = m_row[:, None]
    if D != BD:
        mask = mask & (o_column < D)[None, :]
    return tl.load(p_matrix + o_row[:, None] * stride_row + o_column[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(p_matrix, o_row, m_row, stride_row, b_tile, D: tl.constexpr, BD: tl.constexpr):
    """Write a (rows, BD) tile into rows of an (L,D) matrix, in its dtype."""
    o_column = tl.arange(0, BD)
    mask = m_row[:, None]
    if D != BD:
        mask = mask & (o_column < D)[None, :]
    tl.store(p_matrix + o_row[:, None] * stride_row + o_column[None, :], b_tile.to(p_matrix.dtype.element_ty), mask=mask)


@triton.jit
def visible_tokens(p_lengths, item, num_keys):
    """How many tokens of an item may be attended."""
    if p_lengths is None:
        return num_keys
    else:
        return tl.minimum(tl.load(p_lengths + item).to(tl.int32), num_keys)


@triton.jit
def keep_mask(p_seed, item_head, o_query, o_column, dropout_p):
    """Which of the attention probabilities at o_query x o_column survive dropout; one of the two is a row, the other a column.

    The counter is (column, query, item and head), so forward and backward agree whatever their blocks are.
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
    m_key,
    o_query,
    o_column,
    scale_log2,
    p_seed,
    item_head,
    dropout_p,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax: attend to a block of keys (BN,BD); columns where `m_key` is false are hidden.

    b_out (BM,BD) sums exp2(score - b_max) * value, b_sum (BM,) the same without value.
    """
    # (BM, BN), in units of log 2
    b_scores = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION) * scale_log2
    b_scores = tl.where(m_key[None, :], b_scores, float("-inf"))
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
