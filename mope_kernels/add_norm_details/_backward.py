# mypy: allow-untyped-defs, allow-incomplete-defs
"""Backward kernel of the residual add and LayerNorm. Each program handles some rows of one item."""

import triton
import triton.language as tl

from ._forward import load_affine, statistics


@triton.jit(do_not_specialize=["num_rows", "num_replaced", "first_out", "num_chunks", "steps"])
def add_norm_backward(
    p_grad_total,
    p_grad_normed,
    p_total,
    p_weight,
    p_grad_query,
    p_self_weight,
    p_grad_x,
    p_grad_update,
    p_grad_weight,
    p_grad_bias,
    grad_total_strides,
    grad_normed_strides,
    total_strides,
    stride_grad,
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
):
    """Compute the gradients of `steps` * BR rows of x of one item.

    Row r of x corresponds to row r - num_replaced + first_out of total if r >= num_replaced. With p_grad_query (B,QUERY), the
    gradient of pool(x) W', its contribution is added to each row. p_grad_weight and p_grad_bias (B*chunks,C) hold sums over the
    rows of each program.
    """
    item = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    o_column = tl.arange(0, BC)
    m_column = o_column < C
    # (BC,)
    b_grad_mean = tl.zeros([BC], tl.float32)
    if p_grad_query is not None:
        for query in range(QUERY):
            b_self_weight = tl.load(p_self_weight + query * C + o_column, mask=m_column, other=0.0).to(tl.float32)
            b_grad_mean += tl.load(p_grad_query + item * QUERY + query) * b_self_weight
        b_grad_mean /= num_rows
    b_weight, _ = load_affine(p_weight, None, o_column, C, BC)
    b_weight_sums = tl.zeros([BR, BC], tl.float32)
    b_bias_sums = tl.zeros([BR, BC], tl.float32)
    for step in range(steps):
        o_row = ((chunk * steps + step) * BR + tl.arange(0, BR)).to(tl.int64)
        mask = (o_row < num_rows)[:, None] & m_column[None, :]
        m_out = mask & (o_row >= num_replaced)[:, None]
        o_out = (o_row - num_replaced + first_out)[:, None]
        b_grad = tl.zeros([BR, BC], tl.float32) + b_grad_mean[None, :]
        if p_grad_normed is not None:
            # (BR, BC) each
            p_rows = p_total + item * total_strides[0] + o_out * total_strides[1] + o_column[None, :]
            b_total = tl.load(p_rows, mask=m_out, other=0.0).to(tl.float32)
            p_rows = p_grad_normed + item * grad_normed_strides[0] + o_out * grad_normed_strides[1] + o_column[None, :]
            b_grad_normed = tl.load(p_rows, mask=m_out, other=0.0).to(tl.float32)
            b_deviation, b_inverse_std = statistics(b_total, m_column, eps, C)
            b_normed = b_deviation * b_inverse_std[:, None]
            if p_grad_weight is not None:
                b_weight_sums += b_grad_normed * b_normed
            if p_grad_bias is not None:
                b_bias_sums += b_grad_normed
            b_grad_normed *= b_weight[None, :]
            b_along = tl.sum(b_grad_normed * b_normed, 1) / C
            b_mean = tl.sum(b_grad_normed, 1) / C
            b_grad += (b_grad_normed - b_mean[:, None] - b_normed * b_along[:, None]) * b_inverse_std[:, None]
        if p_grad_total is not None:
            p_rows = p_grad_total + item * grad_total_strides[0] + o_out * grad_total_strides[1] + o_column[None, :]
            b_grad += tl.load(p_rows, mask=m_out, other=0.0).to(tl.float32)
        o_grad = item * stride_grad + o_row[:, None] * C + o_column[None, :]
        if p_grad_x is not None:
            tl.store(p_grad_x + o_grad, b_grad.to(p_grad_x.dtype.element_ty), mask=mask)
        if p_grad_update is not None:
            tl.store(p_grad_update + o_grad, b_grad.to(p_grad_update.dtype.element_ty), mask=mask)
    o_sum = tl.program_id(0).to(tl.int64) * C + o_column
    if p_grad_weight is not None:
        tl.store(p_grad_weight + o_sum, tl.sum(b_weight_sums, 0), mask=m_column)
    if p_grad_bias is not None:
        tl.store(p_grad_bias + o_sum, tl.sum(b_bias_sums, 0), mask=m_column)
