# mypy: allow-untyped-defs, allow-incomplete-defs
"""Backward kernels of the adapter.

The first computes the gradient of x and the factors of the parameter gradients, the second partial products of these factors, the
third sums them.
"""

import triton
import triton.language as tl

from ._forward import activate, load_rows, load_up, load_weight, mix, of_group, project, route


@triton.jit
def in_group(b_group, group, BM: tl.constexpr, BE: tl.constexpr, BG: tl.constexpr):
    """Invert `of_group`, with zeros in the other groups: (BM,BE) -> (BM,BG)."""
    b_is_it = tl.arange(0, BG // BE)[None, :, None] == group
    return tl.reshape(tl.where(b_is_it, b_group[:, None, :], 0.0), [BM, BG])


@triton.jit
def store_factor(p_factor, o_row, num_rows, b_factor, WIDTH: tl.constexpr, group=0, GROUPS: tl.constexpr = 1):
    """Store a group's WIDTH columns in rows of a contiguous (num_rows, GROUPS*WIDTH) matrix, in its dtype."""
    o_column = group * WIDTH + tl.arange(0, WIDTH)
    mask = (o_row < num_rows)[:, None]
    tl.store(p_factor + o_row[:, None] * (GROUPS * WIDTH) + o_column[None, :], b_factor.to(p_factor.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def adapter_backward(
    p_grad_out,
    p_grad_weights,
    p_x,
    p_down,
    p_down_bias,
    p_up,
    p_up_bias,
    p_router,
    p_router_bias,
    p_seed,
    p_grad_x,
    p_mixed,
    p_weights,
    p_grad_down,
    p_grad_logits,
    num_rows,
    stride_grad_out,
    stride_x,
    temperature,
    dropout_p,
    D: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    GELU: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
    BG: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute BM rows of the gradient of x and of the factors of the parameter gradients. Outputs with null pointers are skipped.

    The gradients of the up-projections and their biases are products of grad_out with mixed (num_rows, GROUPS*BE*BR) and with
    weights (num_rows, BG). Those of the down-projection and the router are products of x with grad_down (num_rows, BR) and with
    grad_logits (num_rows, BG); the gradients of their biases are column sums of these two factors.
    """
    o_row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    b_down, b_logits = project(
        p_x, p_down, p_down_bias, p_router, p_router_bias, o_row, num_rows, stride_x, D, R, E, BM, BD, BR, BG, EVEN, PRECISION
    )
    # (BM, BG)
    b_weights = route(b_logits, temperature, p_router is not None, E, BG)
    b_hidden, b_slope = activate(b_down, p_seed, o_row, dropout_p, GELU, BR)
    if p_mixed is not None:
        for group in tl.range(0, GROUPS):
            b_mixed = mix(of_group(b_weights, group, BM, BE, BG), b_hidden, BM, BR, BE)
            store_factor(p_mixed, o_row, num_rows, b_mixed, BE * BR, group, GROUPS)
    if p_weights is not None:
        store_factor(p_weights, o_row, num_rows, b_weights, BG)
    if p_grad_x is not None or p_grad_down is not None or p_grad_logits is not None:
        dtype = p_x.dtype.element_ty
        b_grad_hidden = tl.zeros([BM, BR], tl.float32)
        b_grad_weights = tl.zeros([BM, BG], tl.float32)
        if p_router is not None and GROUPS > 1:
            # In a separate loop: next to the groups' products, Triton would make every warp hold and compute all columns of both.
            for start in tl.range(0, D, BD):
                o_column = start + tl.arange(0, BD)
                # (BM, BD)
                b_grad_out = load_rows(p_grad_out, o_row, num_rows, stride_grad_out, o_column, D, EVEN)
                # (BG, BD)
                b_bias = load_weight(p_up_bias, o_column, E, BG, D, EVEN).to(dtype)
                b_grad_weights = tl.dot(b_grad_out, tl.trans(b_bias), b_grad_weights, input_precision=PRECISION)
        for group in tl.range(0, GROUPS):
            b_grad_mixed = tl.zeros([BM, BE * BR], tl.float32)
            for start in tl.range(0, D, BD):
                o_column = start + tl.arange(0, BD)
                # (BM, BD)
                b_grad_out = load_rows(p_grad_out, o_row, num_rows, stride_grad_out, o_column, D, EVEN)
                # (BD, BE*BR)
                b_up = load_up(p_up, o_column, group, D, R, E, BR, BE, EVEN).to(dtype)
                b_grad_mixed = tl.dot(b_grad_out, b_up, b_grad_mixed, input_precision=PRECISION)
                if p_router is not None and GROUPS == 1:
                    # (BG, BD)
                    b_bias = load_weight(p_up_bias, o_column, E, BG, D, EVEN).to(dtype)
                    b_grad_weights = tl.dot(b_grad_out, tl.trans(b_bias), b_grad_weights, input_precision=PRECISION)
            # (BM, BE, BR)
            b_by_expert = tl.reshape(b_grad_mixed, [BM, BE, BR])
            b_grad_hidden += tl.sum(b_by_expert * of_group(b_weights, group, BM, BE, BG)[:, :, None], 1)
            if p_router is not None:
                b_grad_weights += in_group(tl.sum(b_by_expert * b_hidden[:, None, :], 2), group, BM, BE, BG)
        b_grad_down = (b_grad_hidden * b_slope).to(dtype)
        if p_router is not None:
            if p_grad_weights is not None:
                o_expert = tl.arange(0, BG)
                m_weights = (o_row < num_rows)[:, None] & (o_expert < E)[None, :]
                b_grad_weights += tl.load(p_grad_weights + o_row[:, None] * E + o_expert[None, :], mask=m_weights, other=0.0)
            b_mean = tl.sum(b_weights * b_grad_weights, 1)
            b_grad_logits = (b_weights * (b_grad_weights - b_mean[:, None]) / temperature).to(dtype)
        if p_grad_down is not None:
            store_factor(p_grad_down, o_row, num_rows, b_grad_down, BR)
        if p_grad_logits is not None:
            store_factor(p_grad_logits, o_row, num_rows, b_grad_logits, BG)
        if p_grad_x is not None:
            for start in tl.range(0, D, BD):
                o_column = start + tl.arange(0, BD)
                # (BR, BD)
                b_weight = load_weight(p_down, o_column, R, BR, D, EVEN).to(dtype)
                b_grad_x = tl.dot(b_grad_down, b_weight, input_precision=PRECISION)
                if p_router is not None:
                    # (BG, BD)
                    b_weight = load_weight(p_router, o_column, E, BG, D, EVEN).to(dtype)
                    b_grad_x = tl.dot(b_grad_logits, b_weight, b_grad_x, input_precision=PRECISION)
                # (BM, BD), in the L2 cache since the previous pass
                b_grad_x += load_rows(p_grad_out, o_row, num_rows, stride_grad_out, o_column, D, EVEN).to(tl.float32)
                mask = (o_row < num_rows)[:, None] & (o_column < D)[None, :]
                tl.store(p_grad_x + o_row[:, None] * D + o_column[None, :], b_grad_x.to(dtype), mask=mask)


@triton.jit
def add_product(p_factor, b_matrix, b_sum, o_row, m_row, WIDTH: tl.constexpr, STRIDE: tl.constexpr, PRECISION: tl.constexpr):
    """Add to b_sum (columns, WIDTH) the transpose of a (rows, columns) matrix times these rows of a (num_rows, WIDTH) factor."""
    # (rows, WIDTH)
    b_factor = tl.load(p_factor + o_row[:, None] * STRIDE + tl.arange(0, WIDTH)[None, :], mask=m_row[:, None], other=0.0)
    return tl.dot(tl.trans(b_matrix), b_factor, b_sum, input_precision=PRECISION)


@triton.jit
def column_sums(p_factor, o_row, m_row, WIDTH: tl.constexpr):
    """Sum some rows of a factor (num_rows, WIDTH) in float32: (WIDTH,)."""
    b_factor = tl.load(p_factor + o_row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], mask=m_row[:, None], other=0.0)
    return tl.sum(b_factor.to(tl.float32), 0)


@triton.jit(do_not_specialize=["num_rows", "rows_per_split"])
def parameter_products(
    p_grad_out,
    p_x,
    p_mixed,
    p_weights,
    p_grad_down,
    p_grad_logits,
    p_parts,
    num_rows,
    rows_per_split,
    stride_grad_out,
    stride_x,
    starts,
    total,
    D: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    NEED_DOWN: tl.constexpr,
    NEED_DOWN_BIAS: tl.constexpr,
    NEED_ROUTER: tl.constexpr,
    NEED_ROUTER_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
    BG: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the contribution of one split of the rows to the parameter gradients, for BD columns and one group of experts.

    A row of the parts (splits, total), float32, holds the gradients one after the other, each in its parameter's layout and
    starting at its entry of `starts`: up-projections, their biases, down-projection, router, bias of the down-projection, bias of
    the router.
    """
    column_blocks: tl.constexpr = (D + BD - 1) // BD
    block, group = tl.program_id(0) % column_blocks, tl.program_id(0) // column_blocks % GROUPS
    split = (tl.program_id(0) // (column_blocks * GROUPS)).to(tl.int64)
    o_column = block * BD + tl.arange(0, BD)
    first = split * rows_per_split
    if p_mixed is not None:
        p_mixed += group * (BE * BR)
    b_up = tl.zeros([BD, BE * BR], tl.float32)
    b_up_bias = tl.zeros([BD, BG], tl.float32)
    b_down = tl.zeros([BD, BR], tl.float32)
    b_router = tl.zeros([BD, BG], tl.float32)
    b_down_bias = tl.zeros([BR], tl.float32)
    b_router_bias = tl.zeros([BG], tl.float32)
    for start in tl.range(0, rows_per_split, BM):
        o_row = first + start + tl.arange(0, BM)
        m_row = o_row < num_rows
        if p_mixed is not None or p_weights is not None:
            # (BM, BD)
            b_grad_out = load_rows(p_grad_out, o_row, num_rows, stride_grad_out, o_column, D, EVEN)
            if p_mixed is not None:
                b_up = add_product(p_mixed, b_grad_out, b_up, o_row, m_row, BE * BR, GROUPS * BE * BR, PRECISION)
            if p_weights is not None:
                b_up_bias = add_product(p_weights, b_grad_out, b_up_bias, o_row, m_row, BG, BG, PRECISION)
        if NEED_DOWN or NEED_ROUTER:
            # (BM, BD)
            b_x = load_rows(p_x, o_row, num_rows, stride_x, o_column, D, EVEN)
            if NEED_DOWN:
                b_down = add_product(p_grad_down, b_x, b_down, o_row, m_row, BR, BR, PRECISION)
            if NEED_ROUTER:
                b_router = add_product(p_grad_logits, b_x, b_router, o_row, m_row, BG, BG, PRECISION)
        if NEED_DOWN_BIAS:
            b_down_bias += column_sums(p_grad_down, o_row, m_row, BR)
        if NEED_ROUTER_BIAS:
            b_router_bias += column_sums(p_grad_logits, o_row, m_row, BG)
    p_parts += split * total
    o_hidden, o_expert, o_side = tl.arange(0, BR), tl.arange(0, BG), tl.arange(0, BE * BR)
    if p_mixed is not None:
        o_of_group = group * BE + o_side // BR
        o_part = o_column[:, None] * R + (o_of_group * (D * R) + o_side % BR)[None, :]
        m_part = (o_column < D)[:, None] & ((o_of_group < E) & (o_side % BR < R))[None, :]
        tl.store(p_parts + starts[0] + o_part, b_up, mask=m_part)
    # The first group stores the parts shared by all groups, and its first program those without columns.
    m_column = (o_column < tl.where(group == 0, D, 0))[:, None]
    num_hidden, num_experts = tl.where(group + block == 0, R, 0), tl.where(group + block == 0, E, 0)
    o_row_of_hidden, o_row_of_expert = o_hidden[None, :] * D + o_column[:, None], o_expert[None, :] * D + o_column[:, None]
    if p_weights is not None:
        tl.store(p_parts + starts[1] + o_row_of_expert, b_up_bias, mask=m_column & (o_expert < E)[None, :])
    if NEED_DOWN:
        tl.store(p_parts + starts[2] + o_row_of_hidden, b_down, mask=m_column & (o_hidden < R)[None, :])
    if NEED_ROUTER:
        tl.store(p_parts + starts[3] + o_row_of_expert, b_router, mask=m_column & (o_expert < E)[None, :])
    if NEED_DOWN_BIAS:
        tl.store(p_parts + starts[4] + o_hidden, b_down_bias, mask=o_hidden < num_hidden)
    if NEED_ROUTER_BIAS:
        tl.store(p_parts + starts[5] + o_expert, b_router_bias, mask=o_expert < num_experts)


@triton.jit
def store_segment(p_to, o_part, b_sum, start, end):
    if p_to is not None:
        tl.store(p_to + o_part - start, b_sum.to(p_to.dtype.element_ty), mask=(o_part >= start) & (o_part < end))


@triton.jit(do_not_specialize=["num_splits"])
def sum_parts(p_parts, p_up, p_up_bias, p_down, p_router, p_down_bias, p_router_bias, num_splits, starts, total, BN: tl.constexpr):
    """Sum BN columns of the parts (num_splits, total) over the splits, in order, and store them in the parameter gradients."""
    o_part = tl.program_id(0) * BN + tl.arange(0, BN)
    b_sum = tl.zeros([BN], tl.float32)
    p_part = p_parts + o_part
    for _ in tl.range(0, num_splits):
        b_sum += tl.load(p_part, mask=o_part < total, other=0.0)
        p_part += total
    store_segment(p_up, o_part, b_sum, starts[0], starts[1])
    store_segment(p_up_bias, o_part, b_sum, starts[1], starts[2])
    store_segment(p_down, o_part, b_sum, starts[2], starts[3])
    store_segment(p_router, o_part, b_sum, starts[3], starts[4])
    store_segment(p_down_bias, o_part, b_sum, starts[4], starts[5])
    store_segment(p_router_bias, o_part, b_sum, starts[5], total)
