# mypy: allow-untyped-defs, allow-incomplete-defs
"""Matrix products with the exact GELU or its derivative in the epilogue, which saves rereading the product."""

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
# 1 / sqrt(2 pi)
NORMAL_PEAK = tl.constexpr(0.3989422804014327)
HALF_LOG2_E = tl.constexpr(0.7213475204444817)


@triton.jit
def this_tile(num_rows, num_columns, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Return the row block and the column block of a program."""
    row_blocks = tl.cdiv(num_rows, BM)
    column_blocks = tl.cdiv(num_columns, BN)
    # GROUP row blocks use a column block before moving on to the next, so concurrent programs find their rows and weights in L2.
    group = tl.program_id(0) // (GROUP * column_blocks)
    within = tl.program_id(0) % (GROUP * column_blocks)
    rows_in_group = tl.minimum(row_blocks - group * GROUP, GROUP)
    return group * GROUP + within % rows_in_group, within // rows_in_group


@triton.jit
def product(
    p_a,
    p_b,
    o_row,
    o_column,
    num_rows,
    num_columns,
    depth,
    stride_a,
    b_strides,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
):
    """Compute a block of A (num_rows, depth) times B (depth, num_columns), zero beyond the last column: (BM, BN), float32."""
    # Rows out of bounds repeat the last one, so that loads of A need no row mask; they are never stored.
    o_a_row = tl.minimum(o_row, num_rows - 1).to(tl.int64)
    o_depth = tl.arange(0, BK)
    p_a_tile = p_a + o_a_row[:, None] * stride_a + o_depth[None, :]
    p_b_tile = p_b + o_depth.to(tl.int64)[:, None] * b_strides[0] + o_column.to(tl.int64)[None, :] * b_strides[1]
    b_product = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(0, depth, BK):
        # (BM, BK)
        b_a = tl.load(p_a_tile) if EVEN_DEPTH else tl.load(p_a_tile, mask=(o_depth < depth - start)[None, :], other=0.0)
        # (BK, BN)
        if EVEN_DEPTH and EVEN_COLUMNS:
            b_b = tl.load(p_b_tile)
        else:
            b_b = tl.load(p_b_tile, mask=(o_depth < depth - start)[:, None] & (o_column < num_columns)[None, :], other=0.0)
        b_product = tl.dot(b_a, b_b, b_product, input_precision="ieee")
        p_a_tile += BK
        p_b_tile += tl.full([1, 1], BK, tl.int64) * b_strides[0]
    return b_product


@triton.jit
def normal_tail(b_x, PRECISE: tl.constexpr):
    """Return Phi(-|x|), the tail of the normal distribution beyond |x|."""
    b_distance = tl.abs(b_x)
    if PRECISE:
        return 0.5 - 0.5 * tl.erf(b_distance * SQRT_HALF)
    # Fit the logarithm of the tail, which is nearly a parabola, because with erf the epilogue would take as long as the product.
    # |x| times the error is below 2.2e-7, as good as erf in float32; the relative error is below 2e-5 up to 3 and 1.5e-4 up to 6.
    b_distance = tl.minimum(b_distance, 16.0)
    b_log2 = -1.097168e-06 * b_distance + 4.87022792e-05
    b_log2 = b_log2 * b_distance - 0.000845257836
    b_log2 = b_log2 * b_distance + 0.00824098209
    b_log2 = b_log2 * b_distance - 0.0535528353
    b_log2 = b_log2 * b_distance - 0.45874636
    b_log2 = b_log2 * b_distance - 1.15117849
    return tl.exp2(b_log2 * b_distance - 1.0)


@triton.jit
def gelu(b_x, PRECISE: tl.constexpr):
    """Return x Phi(x)."""
    b_tail = normal_tail(b_x, PRECISE)
    return tl.maximum(b_x, 0.0, propagate_nan=tl.PropagateNan.ALL) - tl.minimum(tl.abs(b_x), 16.0) * b_tail


@triton.jit
def gelu_derivative(b_x, PRECISE: tl.constexpr):
    """Return Phi(x) + x phi(x)."""
    b_tail = normal_tail(b_x, PRECISE)
    b_density = tl.exp2(b_x * b_x * -HALF_LOG2_E) * NORMAL_PEAK
    return tl.where(b_x > 0.0, 1.0 - b_tail, b_tail) + b_x * b_density


@triton.jit(do_not_specialize=["num_rows"])
def gelu_forward(
    p_x,
    p_weight,
    p_bias,
    p_hidden,
    p_out,
    num_rows,
    num_columns,
    depth,
    stride_x,
    weight_strides,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
):
    """Compute a block of out = gelu(h), h = x W' + b, and of h if p_hidden is given.

    x is (num_rows, depth), weight (num_columns, depth); out and h are (num_rows, num_columns) and contiguous.
    """
    row_block, column_block = this_tile(num_rows, num_columns, BM, BN, GROUP)
    o_row = row_block * BM + tl.arange(0, BM)
    o_column = column_block * BN + tl.arange(0, BN)
    b_hidden = product(
        p_x,
        p_weight,
        o_row,
        o_column,
        num_rows,
        num_columns,
        depth,
        stride_x,
        (weight_strides[1], weight_strides[0]),
        BM,
        BN,
        BK,
        EVEN_COLUMNS,
        EVEN_DEPTH,
    )
    if p_bias is not None:
        b_hidden += tl.load(p_bias + o_column, mask=o_column < num_columns, other=0.0).to(tl.float32)[None, :]
    o_out = o_row.to(tl.int64)[:, None] * num_columns + o_column[None, :]
    m_out = (o_row < num_rows)[:, None] & (o_column < num_columns)[None, :]
    # Round as when saving, so that training and inference agree. This also leaves enough registers for two concurrent programs.
    b_hidden = b_hidden.to(p_out.dtype.element_ty)
    if p_hidden is not None:
        tl.store(p_hidden + o_out, b_hidden, mask=m_out)
    b_out = gelu(b_hidden.to(tl.float32), p_out.dtype.element_ty == tl.float32)
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def times_derivative(p_hidden, p_out, b_grad, o_row, o_column, num_rows, num_columns):
    """Store a block of a gradient (rows, columns), multiplied by gelu'(h)."""
    o_out = o_row.to(tl.int64)[:, None] * num_columns + o_column[None, :]
    m_out = (o_row < num_rows)[:, None] & (o_column < num_columns)[None, :]
    # (rows, columns)
    b_hidden = tl.load(p_hidden + o_out, mask=m_out, other=0.0).to(tl.float32)
    b_out = b_grad * gelu_derivative(b_hidden, p_out.dtype.element_ty == tl.float32)
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["num_rows"])
def gelu_gradient(
    p_grad_out,
    p_weight,
    p_hidden,
    p_grad_hidden,
    num_rows,
    num_columns,
    depth,
    stride_grad_out,
    weight_strides,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
):
    """Compute a block of (grad_out W) gelu'(h).

    grad_out is (num_rows, depth), weight (depth, num_columns); h and the result are (num_rows, num_columns) and contiguous.
    """
    row_block, column_block = this_tile(num_rows, num_columns, BM, BN, GROUP)
    o_row = row_block * BM + tl.arange(0, BM)
    o_column = column_block * BN + tl.arange(0, BN)
    b_grad = product(
        p_grad_out,
        p_weight,
        o_row,
        o_column,
        num_rows,
        num_columns,
        depth,
        stride_grad_out,
        weight_strides,
        BM,
        BN,
        BK,
        EVEN_COLUMNS,
        EVEN_DEPTH,
    )
    # Processing one half after the other needs fewer registers, so that on sm_90 two programs fit on a multiprocessor.
    b_left, b_right = tl.split(tl.permute(tl.reshape(b_grad, [BM, 2, BN // 2]), [0, 2, 1]))
    o_half = column_block * BN + tl.arange(0, BN // 2)
    times_derivative(p_hidden, p_grad_hidden, b_left, o_row, o_half, num_rows, num_columns)
    times_derivative(p_hidden, p_grad_hidden, b_right, o_row, o_half + BN // 2, num_rows, num_columns)


@triton.jit(do_not_specialize=["num_rows"])
def gelu_of_rows(p_hidden, p_out, num_rows, num_columns, BR: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr):
    """Compute BR x BC elements of out = gelu(h), both (num_rows, num_columns) and contiguous. out may alias h."""
    o_number, m_number = this_part(num_rows, num_columns, BR, BC, EVEN)
    b_hidden = tl.load(p_hidden + o_number, mask=m_number, other=0.0).to(tl.float32)
    b_out = gelu(b_hidden, p_out.dtype.element_ty == tl.float32)
    tl.store(p_out + o_number, b_out.to(p_out.dtype.element_ty), mask=m_number)


@triton.jit(do_not_specialize=["num_rows"])
def times_derivative_of_rows(p_hidden, p_grad, num_rows, num_columns, BR: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr):
    """Multiply BR x BC elements of a contiguous gradient (num_rows, num_columns) by gelu'(h), in place."""
    o_number, m_number = this_part(num_rows, num_columns, BR, BC, EVEN)
    b_hidden = tl.load(p_hidden + o_number, mask=m_number, other=0.0).to(tl.float32)
    b_grad = tl.load(p_grad + o_number, mask=m_number, other=0.0).to(tl.float32)
    b_grad *= gelu_derivative(b_hidden, p_grad.dtype.element_ty == tl.float32)
    tl.store(p_grad + o_number, b_grad.to(p_grad.dtype.element_ty), mask=m_number)


@triton.jit
def this_part(num_rows, num_columns, BR: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr):
    """Return a program's offsets into a contiguous (num_rows, num_columns) matrix and their mask: (BR, BC) each."""
    column_blocks = tl.cdiv(num_columns, BC)
    o_row = tl.program_id(0) // column_blocks * BR + tl.arange(0, BR)
    o_column = tl.program_id(0) % column_blocks * BC + tl.arange(0, BC)
    m_row = (o_row < num_rows)[:, None]
    m_number = m_row & tl.full([1, BC], 1, tl.int1) if EVEN else m_row & (o_column < num_columns)[None, :]
    return o_row.to(tl.int64)[:, None] * num_columns + o_column[None, :], m_number
