# mypy: allow-untyped-defs, allow-incomplete-defs
"""Forward kernel of the adapter, one block of rows per program, and the parts that backward recomputes.

Sizes: D row width, R bottleneck width, E experts. Blocks are BM rows by BD columns. BR and BG are R and E rounded up to sizes that
tl.dot accepts. Experts are processed in GROUPS groups of BE, with their bottlenecks side by side: (BM, BE*BR).
"""

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
# 1 / sqrt(2 pi)
NORMAL_PEAK = tl.constexpr(0.3989422804014327)


@triton.jit
def load_rows(p_matrix, o_row, num_rows, stride_row, o_column, D: tl.constexpr, EVEN: tl.constexpr):
    """Load rows of a matrix at some columns, all valid if EVEN: (rows, columns), zero out of bounds."""
    mask = (o_row < num_rows)[:, None]
    if not EVEN:
        mask = mask & (o_column < D)[None, :]
    return tl.load(p_matrix + o_row[:, None] * stride_row + o_column[None, :], mask=mask, other=0.0)


@triton.jit
def load_weight(p_weight, o_column, N, BN: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr):
    """Load columns of a weight (N,D): (BN, columns), zero out of bounds."""
    o_out = tl.arange(0, BN)
    mask = (o_out < N)[:, None]
    if not EVEN:
        mask = mask & (o_column < D)[None, :]
    return tl.load(p_weight + o_out[:, None] * D + o_column[None, :], mask=mask, other=0.0)


@triton.jit
def load_up(
    p_up, o_column, group, D: tl.constexpr, R: tl.constexpr, E: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr, EVEN: tl.constexpr
):
    """Load the rows of a group's up-projections (E,D,R) for some output columns, side by side: (columns, BE*BR)."""
    o_side = tl.arange(0, BE * BR)
    o_expert, o_hidden = group * BE + o_side // BR, o_side % BR
    mask = ((o_expert < E) & (o_hidden < R))[None, :]
    if not EVEN:
        mask = mask & (o_column < D)[:, None]
    return tl.load(p_up + o_column[:, None] * R + (o_expert * (D * R) + o_hidden)[None, :], mask=mask, other=0.0)


@triton.jit
def project(
    p_x,
    p_down,
    p_down_bias,
    p_router,
    p_router_bias,
    o_row,
    num_rows,
    stride_x,
    D: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BG: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Apply the down-projection and the router to rows in one pass: (BM,BR) and (BM,BG), zero without a router; float32."""
    b_down = tl.zeros([BM, BR], tl.float32)
    b_logits = tl.zeros([BM, BG], tl.float32)
    for start in tl.range(0, D, BD):
        o_column = start + tl.arange(0, BD)
        # (BM, BD)
        b_x = load_rows(p_x, o_row, num_rows, stride_x, o_column, D, EVEN)
        # (BR, BD)
        b_weight = load_weight(p_down, o_column, R, BR, D, EVEN).to(b_x.dtype)
        b_down = tl.dot(b_x, tl.trans(b_weight), b_down, input_precision=PRECISION)
        if p_router is not None:
            # (BG, BD)
            b_weight = load_weight(p_router, o_column, E, BG, D, EVEN).to(b_x.dtype)
            b_logits = tl.dot(b_x, tl.trans(b_weight), b_logits, input_precision=PRECISION)
    o_hidden, o_expert = tl.arange(0, BR), tl.arange(0, BG)
    b_down += tl.load(p_down_bias + o_hidden, mask=o_hidden < R, other=0.0).to(tl.float32)[None, :]
    if p_router is not None:
        b_logits += tl.load(p_router_bias + o_expert, mask=o_expert < E, other=0.0).to(tl.float32)[None, :]
    return b_down, b_logits


@triton.jit
def route(b_logits, temperature, ROUTED: tl.constexpr, E: tl.constexpr, BG: tl.constexpr):
    """Return the expert weights: (BM,BG), zero beyond the last expert. Without a router, the first expert has weight 1."""
    o_expert = tl.arange(0, BG)
    if not ROUTED:
        return tl.where(o_expert[None, :] == 0, 1.0, b_logits)
    b_logits = tl.where((o_expert < E)[None, :], b_logits / temperature, float("-inf"))
    b_weights = tl.exp(b_logits - tl.max(b_logits, 1)[:, None])
    return b_weights / tl.sum(b_weights, 1)[:, None]


@triton.jit
def activate(b_down, p_seed, o_row, dropout_p, GELU: tl.constexpr, BR: tl.constexpr):
    """Return h = activation(down) after dropout, and its derivative: (BM,BR) each."""
    if GELU:
        b_cdf = 0.5 * (1.0 + tl.erf(b_down * SQRT_HALF))
        b_hidden, b_slope = b_down * b_cdf, b_cdf + b_down * NORMAL_PEAK * tl.exp(-0.5 * b_down * b_down)
    else:
        # tl.maximum would turn NaN into 0.
        b_hidden, b_slope = tl.where(b_down < 0.0, 0.0, b_down), tl.where(b_down <= 0.0, 0.0, 1.0)
    if p_seed is not None:
        # Use (row, column) as the counter, so that forward and backward agree.
        o_row, o_hidden = o_row.to(tl.int32)[:, None], tl.arange(0, BR)[None, :]
        b_random, _, _, _ = tl.philox(tl.load(p_seed), o_row + tl.zeros_like(o_hidden), o_hidden + tl.zeros_like(o_row), 0, 0)
        b_kept = tl.where(tl.uint_to_uniform_float(b_random) >= dropout_p, 1.0 / (1.0 - dropout_p), 0.0)
        b_hidden *= b_kept
        b_slope *= b_kept
    return b_hidden, b_slope


@triton.jit
def of_group(b_matrix, group, BM: tl.constexpr, BE: tl.constexpr, BG: tl.constexpr):
    """Select the columns of a group of experts: (BM,BG) -> (BM,BE)."""
    b_is_it = tl.arange(0, BG // BE)[None, :, None] == group
    return tl.sum(tl.where(b_is_it, tl.reshape(b_matrix, [BM, BG // BE, BE]), 0.0), 1)


@triton.jit
def mix(b_weights, b_hidden, BM: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr):
    """Multiply h by each expert's weight: (BM,BE), (BM,BR) -> (BM, BE*BR)."""
    return tl.reshape(b_weights[:, :, None] * b_hidden[:, None, :], [BM, BE * BR])


@triton.jit(do_not_specialize=["num_rows"])
def adapter_forward(
    p_x,
    p_down,
    p_down_bias,
    p_up,
    p_up_bias,
    p_router,
    p_router_bias,
    p_seed,
    p_out,
    p_weights,
    num_rows,
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
    """Compute BM rows of out (num_rows, D) and, if requested, of the expert weights (num_rows, E)."""
    o_row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    b_down, b_logits = project(
        p_x, p_down, p_down_bias, p_router, p_router_bias, o_row, num_rows, stride_x, D, R, E, BM, BD, BR, BG, EVEN, PRECISION
    )
    b_weights = route(b_logits, temperature, p_router is not None, E, BG)
    b_hidden, _ = activate(b_down, p_seed, o_row, dropout_p, GELU, BR)
    if p_weights is not None:
        o_expert = tl.arange(0, BG)
        m_weights = (o_row < num_rows)[:, None] & (o_expert < E)[None, :]
        tl.store(p_weights + o_row[:, None] * E + o_expert[None, :], b_weights, mask=m_weights)
    dtype = p_x.dtype.element_ty
    for start in tl.range(0, D, BD):
        o_column = start + tl.arange(0, BD)
        # (BG, BD)
        b_bias = load_weight(p_up_bias, o_column, E, BG, D, EVEN).to(dtype)
        b_out = tl.dot(b_weights.to(dtype), b_bias, input_precision=PRECISION)
        # Not unrolled, because the compiler would otherwise keep the b_mixed of all groups in registers.
        for group in tl.range(0, GROUPS):
            b_mixed = mix(of_group(b_weights, group, BM, BE, BG), b_hidden, BM, BR, BE).to(dtype)
            # (BD, BE*BR)
            b_up = load_up(p_up, o_column, group, D, R, E, BR, BE, EVEN).to(dtype)
            b_out = tl.dot(b_mixed, tl.trans(b_up), b_out, input_precision=PRECISION)
        # (BM, BD), in the L2 cache since the first pass
        b_out += load_rows(p_x, o_row, num_rows, stride_x, o_column, D, EVEN).to(tl.float32)
        mask = (o_row < num_rows)[:, None] & (o_column < D)[None, :]
        tl.store(p_out + o_row[:, None] * D + o_column[None, :], b_out.to(dtype), mask=mask)
