# mypy: allow-untyped-defs, allow-incomplete-defs
"""Forward kernel of attention in the windows of an image, each extended by prompts, without copying windows.

In the rows [prompts; tokens of the window], row n < P is prompt n, and row P + y * W + x is the token at (y, x) of the window.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Base-2 mask value added to scores between tokens that are adjacent only because of the shift.
APART = tl.constexpr(-100 * 1.4426950408889634)


@triton.jit
def this_program(splits, H: tl.constexpr, BLOCKS: tl.constexpr):
    """Return a program's head, block of rows, split of the windows and owner of the prompts."""
    # Adjacent heads share cache lines, so run them together.
    head = tl.program_id(0) % H
    rest = tl.program_id(0) // H
    return head, rest % BLOCKS, rest // BLOCKS % splits, rest // BLOCKS // splits


@triton.jit
def place(j, owner, batch, NUM_WINDOWS: tl.constexpr, OWNER_IS_INSTANCE: tl.constexpr):
    """Return the image and the window index of the j-th window that uses the prompts of `owner`."""
    if OWNER_IS_INSTANCE:
        return owner, j
    else:
        i = j * batch + owner
        return i // NUM_WINDOWS, i % NUM_WINDOWS


@triton.jit
def row_offsets(
    o_row,
    owner,
    item,
    window,
    stride_item,
    stride_row,
    P: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Return 64-bit offsets of rows of [owner's prompts; tokens of a window] in a (B, P + R*R, ...) tensor: (rows,)."""
    o_token = tl.maximum(o_row - P, 0)
    y = window // (R // W) * W + o_token // W + SHIFT
    x = window % (R // W) * W + o_token % W + SHIFT
    y = tl.where(y >= R, y - R, y)
    x = tl.where(x >= R, x - R, x)
    is_prompt = o_row < P
    o_item = tl.where(is_prompt, owner, item).to(tl.int64) * stride_item
    # The launcher copies rows that do not start at multiples of 8 elements.
    return tl.multiple_of(o_item + tl.where(is_prompt, o_row, P + y * R + x).to(tl.int64) * stride_row, 8)


@triton.jit
def sides(o_row, P: tl.constexpr, W: tl.constexpr, SHIFT: tl.constexpr):
    """Return four bits per row for each of the four values of `cuts_of`: (rows,).

    Two rows are on the same side of the cuts if they have a bit in common. Prompts are on every side.
    """
    o_token = tl.maximum(o_row - P, 0)
    y = tl.where(o_token // W >= W - SHIFT, 1, 0)
    x = tl.where(o_token % W >= W - SHIFT, 1, 0)
    return tl.where(o_row < P, 0xFFFF, 0xF | (0x10 << y) | (0x100 << x) | (0x1000 << (y + 2 * x)))


@triton.constexpr_function
def tokens_from(y, x, P, W):
    """Return a bit mask of the rows, at most 64, that are window tokens with line >= y and column >= x."""
    bits = sum(1 << (P + i * W + j) for i in range(y, W) for j in range(x, W))
    # Convert to 64-bit two's complement.
    return bits - (1 << 64) if bits >> 63 else bits


@triton.jit
def far_keys(o_query, o_key, cut, P: tl.constexpr, W: tl.constexpr, SHIFT: tl.constexpr):
    """Tell whether a cut through a window of at most 64 rows separates query and key: (queries, keys).

    Each query has a 64-bit mask with a bit per key. In the layout of the scores, a thread has few queries, and after shifting the
    masks by the thread's own offset its keys are bits 0 and 1 of every eight. A score's test is then one instruction, and the masks
    need few registers; with more registers, one program fewer would fit on an sm_90 multiprocessor.
    """
    TOKENS: tl.constexpr = tokens_from(0, 0, P, W)
    LOWER: tl.constexpr = tokens_from(W - SHIFT, 0, P, W)
    RIGHT: tl.constexpr = tokens_from(0, W - SHIFT, P, W)
    is_cut_y, is_cut_x = (cut & 1) != 0, (cut & 2) != 0
    o_own = (o_key & 6).to(tl.int64)
    b_tokens = tl.full([], TOKENS, tl.int64) >> o_own
    b_lower = tl.where(is_cut_y, tl.full([], LOWER, tl.int64), 0) >> o_own
    b_right = tl.where(is_cut_x, tl.full([], RIGHT, tl.int64), 0) >> o_own
    # Without a cut, no line or column is beyond it.
    o_token = tl.maximum(o_query - P, 0)
    is_lower = (o_token // W >= tl.where(is_cut_y, W - SHIFT, W))[:, None]
    is_right = (o_token % W >= tl.where(is_cut_x, W - SHIFT, W))[:, None]
    is_prompt = (o_query < P)[:, None]
    b_far = tl.where(is_lower, (b_tokens & ~b_lower)[None, :], tl.where(is_prompt, 0, b_lower[None, :]))
    b_far |= tl.where(is_right, (b_tokens & ~b_right)[None, :], tl.where(is_prompt, 0, b_right[None, :]))
    return ((b_far >> (o_key & ~6)[None, :]) & 1) != 0


@triton.jit
def cuts_of(window, R: tl.constexpr, W: tl.constexpr):
    """Return the cuts through a window: bit 0 in the last row of windows, bit 1 in the last column."""
    return tl.where(window // (R // W) == R // W - 1, 1, 0) + tl.where(window % (R // W) == R // W - 1, 2, 0)


@triton.jit
def load_rows(p_tensor, o_start, o_row, NUM_ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Load rows of one head that start at `o_start`: (rows, BD), zero beyond the last row and beyond column D."""
    o_column = tl.arange(0, BD)
    mask = (o_row < NUM_ROWS)[:, None] & (o_column < D)[None, :]
    return tl.load(p_tensor + o_start[:, None] + o_column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(p_tensor, o_start, m_row, b_rows, D: tl.constexpr, BD: tl.constexpr):
    """Store a (rows, BD) tile to the rows of one head that start at `o_start`, in the tensor's dtype."""
    o_column = tl.arange(0, BD)
    mask = m_row[:, None] & (o_column < D)[None, :]
    tl.store(p_tensor + o_start[:, None] + o_column[None, :], b_rows.to(p_tensor.dtype.element_ty), mask=mask)


@triton.jit
def store_tokens(
    p_out,
    b_rows,
    o_row,
    item,
    window,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Store the token rows of a (rows, BD) tile to one head of a contiguous (B, P + R*R, WIDTH) tensor."""
    o_start = row_offsets(o_row, item, item, window, (P + R * R) * WIDTH, WIDTH, P, R, W, SHIFT)
    store_rows(p_out, o_start, (o_row >= P) & (o_row < P + W * W), b_rows, D, BD)


@triton.jit
def store_prompts(
    p_out,
    p_partial,
    b_rows,
    o_row,
    column,
    owner,
    split,
    splits,
    batch,
    scale,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
):
    """Store the prompt rows of a (rows, BD) tile, starting at `column`.

    They are scaled and stored to a contiguous (B, P + R*R, WIDTH) tensor. If the windows are split, they are stored unscaled to
    partial (splits, B, P, WIDTH).
    """
    if splits == 1:
        o_start = (owner.to(tl.int64) * (P + R * R) + o_row) * WIDTH
        store_rows(p_out + column, o_start, o_row < P, b_rows * scale, D, BD)
    else:
        o_start = ((split.to(tl.int64) * batch + owner) * P + o_row) * WIDTH
        store_rows(p_partial + column, o_start, o_row < P, b_rows, D, BD)


@triton.jit
def load_bias(p_bias, o_query, o_key, P: tl.constexpr, W: tl.constexpr, SHIFT: tl.constexpr):
    """Load one head's (W*W, W*W) position bias in base 2: (BM, BN), 0 for prompts and -inf for keys out of bounds."""
    m_query = (o_query >= P) & (o_query < P + W * W)
    m_key = (o_key >= P) & (o_key < P + W * W)
    offsets = (o_query - P)[:, None] * (W * W) + (o_key - P)[None, :]
    mask = m_query[:, None] & m_key[None, :]
    b_bias = tl.load(p_bias + offsets, mask=mask, other=0.0).to(tl.float32) * LOG2_E
    return tl.where((o_key < P + W * W)[None, :], b_bias, float("-inf"))


@triton.jit
def window_scores(
    b_query,
    b_key,
    b_bias,
    o_query,
    o_key,
    window,
    scale_log2,
    P: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute masked scores in base 2: (BM, BN). `b_bias` is a result of `load_bias`."""
    b_scores = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION) * scale_log2 + b_bias
    if SHIFT > 0:
        cut = cuts_of(window, R, W)
        if b_scores.shape[1] >= P + W * W and P + W * W <= 64:
            # Most windows have no cut.
            if cut > 0:
                b_scores = tl.where(far_keys(o_query, o_key, cut, P, W, SHIFT), b_scores + APART, b_scores)
        else:
            b_common = sides(o_query, P, W, SHIFT)[:, None] & sides(o_key, P, W, SHIFT)[None, :] & (0xF << 4 * cut)
            b_scores = tl.where(b_common == 0, b_scores + APART, b_scores)
    return b_scores


@triton.jit(do_not_specialize=["batch", "splits"])
def window_forward(
    p_qkv,
    p_bias,
    p_out,
    p_partial,
    qkv_strides,
    batch,
    splits,
    scale_log2,
    OWNER_IS_INSTANCE: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    SHIFT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute BM rows of one head, for some of the windows that use one image's prompts.

    out is a contiguous (B, P + R*R, C). The output of a prompt is the mean over its windows. If the windows are split among
    programs, each program writes its sum to partial (splits, B, P, C), float32.
    """
    NUM_WINDOWS: tl.constexpr = (R // W) * (R // W)
    NUM_ROWS: tl.constexpr = P + W * W
    QUERY_BLOCKS: tl.constexpr = (NUM_ROWS + BM - 1) // BM
    KEY_BLOCKS: tl.constexpr = (NUM_ROWS + BN - 1) // BN
    head, block, split, owner = this_program(splits, H, QUERY_BLOCKS)
    o_query = block * BM + tl.arange(0, BM)

    p_query = p_qkv + head * D
    p_key = p_query + H * D
    p_value = p_key + H * D
    p_bias += head.to(tl.int64) * (W * W * W * W)
    if KEY_BLOCKS == 1:
        # (BM, BN), the same for all windows
        b_bias = load_bias(p_bias, o_query, tl.arange(0, BN), P, W, SHIFT)
    b_sum_of_windows = tl.zeros([BM, BD], tl.float32)
    for j in tl.range(split * NUM_WINDOWS // splits, (split + 1) * NUM_WINDOWS // splits):
        item, window = place(j, owner, batch, NUM_WINDOWS, OWNER_IS_INSTANCE)
        o_query_start = row_offsets(o_query, owner, item, window, qkv_strides[0], qkv_strides[1], P, R, W, SHIFT)
        # (BM, BD)
        b_query = load_rows(p_query, o_query_start, o_query, NUM_ROWS, D, BD)
        if KEY_BLOCKS == 1:
            o_key = tl.arange(0, BN)
            o_key_start = row_offsets(o_key, owner, item, window, qkv_strides[0], qkv_strides[1], P, R, W, SHIFT)
            # (BN, BD) each
            b_key = load_rows(p_key, o_key_start, o_key, NUM_ROWS, D, BD)
            b_value = load_rows(p_value, o_key_start, o_key, NUM_ROWS, D, BD)
            b_scores = window_scores(b_query, b_key, b_bias, o_query, o_key, window, scale_log2, P, R, W, SHIFT, PRECISION)
            b_probs = tl.exp2(b_scores - tl.max(b_scores, 1)[:, None])
            b_sum = tl.sum(b_probs, 1)
            b_out = tl.dot(b_probs.to(b_value.dtype), b_value, input_precision=PRECISION)
        else:
            b_max = tl.full([BM], float("-inf"), tl.float32)
            b_sum = tl.zeros([BM], tl.float32)
            b_out = tl.zeros([BM, BD], tl.float32)
            for key_block in tl.range(0, KEY_BLOCKS):
                o_key = key_block * BN + tl.arange(0, BN)
                o_key_start = row_offsets(o_key, owner, item, window, qkv_strides[0], qkv_strides[1], P, R, W, SHIFT)
                # (BN, BD) each
                b_key = load_rows(p_key, o_key_start, o_key, NUM_ROWS, D, BD)
                b_value = load_rows(p_value, o_key_start, o_key, NUM_ROWS, D, BD)
                b_bias = load_bias(p_bias, o_query, o_key, P, W, SHIFT)
                b_scores = window_scores(b_query, b_key, b_bias, o_query, o_key, window, scale_log2, P, R, W, SHIFT, PRECISION)
                # Each block contains at least one valid key, so no maximum is -inf.
                b_new_max = tl.maximum(b_max, tl.max(b_scores, 1))
                b_probs = tl.exp2(b_scores - b_new_max[:, None])
                b_decay = tl.exp2(b_max - b_new_max)
                b_sum = b_sum * b_decay + tl.sum(b_probs, 1)
                b_out = tl.dot(b_probs.to(b_value.dtype), b_value, b_out * b_decay[:, None], input_precision=PRECISION)
                b_max = b_new_max
        b_out /= b_sum[:, None]
        b_sum_of_windows += b_out
        store_tokens(p_out + head * D, b_out, o_query, item, window, H * D, D, BD, P, R, W, SHIFT)
    if P > 0:
        store_prompts(
            p_out,
            p_partial,
            b_sum_of_windows,
            o_query,
            head * D,
            owner,
            split,
            splits,
            batch,
            1.0 / NUM_WINDOWS,
            H * D,
            D,
            BD,
            P,
            R,
        )


# Not specialised on its integer arguments, so it is compiled once for all blocks of a model.
@triton.jit(do_not_specialize=["batch", "splits", "rows", "num_prompts", "width"])
def sum_partials(p_partial, p_out, batch, splits, rows, num_prompts, width, scale, BC: tl.constexpr):
    """Store scale * the sum of partial (splits, B, P, C), for one prompt of one item, to the first P rows of out (B, rows, C)."""
    item = (tl.program_id(0) // num_prompts).to(tl.int64)
    prompt = tl.program_id(0) % num_prompts
    for start in tl.range(0, width, BC):
        o_column = start + tl.arange(0, BC)
        b_sum = tl.zeros([BC], tl.float32)
        # Sum in a fixed order.
        for split in tl.range(0, splits):
            p_row = p_partial + ((split * batch + item) * num_prompts + prompt) * width
            b_sum += tl.load(p_row + o_column, mask=o_column < width, other=0.0)
        p_row = p_out + (item * rows + prompt) * width
        tl.store(p_row + o_column, (scale * b_sum).to(p_out.dtype.element_ty), mask=o_column < width)
