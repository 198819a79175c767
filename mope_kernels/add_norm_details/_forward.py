# mypy: allow-untyped-defs, allow-incomplete-defs
"""Residual add and LayerNorm, with the router's partial sums over rows. Each program handles some rows of one item."""

import triton
import triton.language as tl


@triton.jit
def statistics(b_rows, m_column, eps, C: tl.constexpr):
    """Return deviations from the mean (BR,BC) and 1 / standard deviation (BR,) of rows that are 0 beyond column C."""
    b_mean = tl.sum(b_rows, 1) / C
    b_deviation = tl.where(m_column[None, :], b_rows - b_mean[:, None], 0.0)
    return b_deviation, 1.0 / tl.sqrt(tl.sum(b_deviation * b_deviation, 1) / C + eps)


@triton.jit
def load_affine(p_weight, p_bias, o_column, C: tl.constexpr, BC: tl.constexpr):
    """Load the weight and bias of a LayerNorm, by default 1 and 0: (BC,) each."""
    m_column = o_column < C
    b_weight = tl.full([BC], 1.0, tl.float32)
    b_bias = tl.zeros([BC], tl.float32)
    if p_weight is not None:
        b_weight = tl.load(p_weight + o_column, mask=m_column, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_column, mask=m_column, other=0.0).to(tl.float32)
    return b_weight, b_bias


@triton.jit
def layer_norm(b_rows, b_weight, b_bias, m_column, eps, C: tl.constexpr):
    """Apply LayerNorm to each row: (BR,BC) float32 -> (BR,BC) float32."""
    b_deviation, b_inverse_std = statistics(b_rows, m_column, eps, C)
    return b_deviation * b_inverse_std[:, None] * b_weight[None, :] + b_bias[None, :]


@triton.jit(do_not_specialize=["num_rows", "num_replaced", "first_out", "num_chunks", "steps"])
def add_norm_forward(
    p_x,
    p_update,
    p_weight,
    p_bias,
    p_self_weight,
    p_total,
    p_normed,
    p_sums,
    p_seen,
    x_strides,
    update_strides,
    stride_out,
    num_rows,
    num_replaced,
    first_out,
    num_chunks,
    steps,
    eps,
    C: tl.constexpr,
    QUERY: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BQ: tl.constexpr,
):
    """Process `steps` * BR rows of one item. Rows from `num_replaced` on are written, starting at output row `first_out`.

    With p_seen (B,chunks,QUERY), also write the contribution of the program's rows to pool(x) W', before the division by the number
    of rows; with p_sums (B,chunks,C), write the sum of the rows, which the gradient of W needs.
    """
    item = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    o_column = tl.arange(0, BC)
    m_column = o_column < C
    b_weight, b_bias = load_affine(p_weight, p_bias, o_column, C, BC)
    p_x += item * x_strides[0]
    p_normed += item * stride_out
    b_sums = tl.zeros([BR, BC], tl.float32)
    for step in range(steps):
        o_row = ((chunk * steps + step) * BR + tl.arange(0, BR)).to(tl.int64)
        mask = (o_row < num_rows)[:, None] & m_column[None, :]
        # (BR, BC)
        b_total = tl.load(p_x + o_row[:, None] * x_strides[1] + o_column[None, :], mask=mask, other=0.0).to(tl.float32)
        if p_update is not None:
            p_update_rows = p_update + item * update_strides[0] + o_row[:, None] * update_strides[1] + o_column[None, :]
            b_total += tl.load(p_update_rows, mask=mask, other=0.0).to(tl.float32)
        o_out = (o_row - num_replaced + first_out)[:, None] * C + o_column[None, :]
        m_out = mask & (o_row >= num_replaced)[:, None]
        if p_total is not None:
            # Normalise the rounded values, because the next block reads those.
            b_rounded = b_total.to(p_total.dtype.element_ty)
            tl.store(p_total + item * stride_out + o_out, b_rounded, mask=m_out)
            b_total = b_rounded.to(tl.float32)
        if p_seen is not None:
            b_sums += b_total
        b_normed = layer_norm(b_total, b_weight, b_bias, m_column, eps, C)
        tl.store(p_normed + o_out, b_normed.to(p_normed.dtype.element_ty), mask=m_out)
    if p_seen is not None:
        # (BC,)
        b_sum = tl.sum(b_sums, 0)
        o_chunk = item * num_chunks + chunk
        if p_sums is not None:
            tl.store(p_sums + o_chunk * C + o_column, b_sum, mask=m_column)
        for start in range(0, QUERY, BQ):
            o_query = start + tl.arange(0, BQ)
            mask = (o_query < QUERY)[:, None] & m_column[None, :]
            # (BQ, BC)
            b_self = tl.load(p_self_weight + o_query[:, None] * C + o_column[None, :], mask=mask, other=0.0).to(tl.float32)
            b_seen = tl.sum(b_self * b_sum[None, :], 1)
            tl.store(p_seen + o_chunk * QUERY + o_query, b_seen, mask=o_query < QUERY)
