# mypy: allow-untyped-defs, allow-incomplete-defs
"""Backward kernels of window attention, which use only its inputs and the incoming gradient.

If the rows of a window fit in one block, `window_gradient` does everything. Otherwise `query_gradient` also stores the softmax
statistics of each row, which `key_gradient` reads. `bias_gradient`, for the position bias, reads them too.
"""

import triton
import triton.language as tl

from ._forward import load_bias, load_rows, place, row_offsets, store_prompts, store_tokens, this_program, window_scores


@triton.jit
def share_of_mean(o_row, P: tl.constexpr, NUM_WINDOWS: tl.constexpr):
    """Return the factor of each row's incoming gradient, because a prompt's output is a mean over windows: (rows,)."""
    return tl.where(o_row < P, 1.0 / NUM_WINDOWS, 1.0)


@triton.jit(do_not_specialize=["batch", "splits"])
def window_gradient(
    p_qkv,
    p_bias,
    p_grad_out,
    p_grad,
    p_partial,
    qkv_strides,
    grad_out_strides,
    batch,
    splits,
    scale,
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
    PRECISION: tl.constexpr,
):
    """Compute the gradients of one head for some of the windows that use one image's prompts. A window fits in BM rows.

    grad is a contiguous (B, P + R*R, 3C). If the windows are split among programs, the prompt gradients go to partial
    (splits, B, P, 3C).
    """
    NUM_WINDOWS: tl.constexpr = (R // W) * (R // W)
    NUM_ROWS: tl.constexpr = P + W * W
    head, _, split, owner = this_program(splits, H, 1)
    o_row = tl.arange(0, BM)

    p_query = p_qkv + head * D
    p_key = p_query + H * D
    p_value = p_key + H * D
    p_grad_out += head * D
    # (BM, BM)
    b_bias = load_bias(p_bias + head.to(tl.int64) * (W * W * W * W), o_row, o_row, P, W, SHIFT)
    b_share = share_of_mean(o_row, P, NUM_WINDOWS)[:, None]
    b_sum_query = tl.zeros([BM, BD], tl.float32)
    b_sum_key = tl.zeros([BM, BD], tl.float32)
    b_sum_value = tl.zeros([BM, BD], tl.float32)
    for j in tl.range(split * NUM_WINDOWS // splits, (split + 1) * NUM_WINDOWS // splits):
        item, window = place(j, owner, batch, NUM_WINDOWS, OWNER_IS_INSTANCE)
        o_row_start = row_offsets(o_row, owner, item, window, qkv_strides[0], qkv_strides[1], P, R, W, SHIFT)
        # (BM, BD) each
        b_query = load_rows(p_query, o_row_start, o_row, NUM_ROWS, D, BD)
        b_key = load_rows(p_key, o_row_start, o_row, NUM_ROWS, D, BD)
        b_value = load_rows(p_value, o_row_start, o_row, NUM_ROWS, D, BD)
        o_grad_start = row_offsets(o_row, owner, item, window, grad_out_strides[0], grad_out_strides[1], P, R, W, SHIFT)
        b_grad_out = load_rows(p_grad_out, o_grad_start, o_row, NUM_ROWS, D, BD)

        # (BM, BM)
        b_scores = window_scores(b_query, b_key, b_bias, o_row, o_row, window, scale_log2, P, R, W, SHIFT, PRECISION)
        b_probs = tl.exp2(b_scores - tl.max(b_scores, 1)[:, None])
        b_probs /= tl.sum(b_probs, 1)[:, None]
        b_grad_probs = tl.dot(b_grad_out, tl.trans(b_value), input_precision=PRECISION) * b_share
        b_grad_scores = b_probs * (b_grad_probs - tl.sum(b_probs * b_grad_probs, 1)[:, None])
        b_grad_scores = b_grad_scores.to(b_query.dtype)

        # (BM, BD) each
        b_shares = (b_probs * b_share).to(b_query.dtype)
        b_grad_value = tl.dot(tl.trans(b_shares), b_grad_out, input_precision=PRECISION)
        b_grad_query = tl.dot(b_grad_scores, b_key, input_precision=PRECISION) * scale
        b_grad_key = tl.dot(tl.trans(b_grad_scores), b_query, input_precision=PRECISION) * scale
        b_sum_query += b_grad_query
        b_sum_key += b_grad_key
        b_sum_value += b_grad_value
        store_tokens(p_grad + head * D, b_grad_query, o_row, item, window, 3 * H * D, D, BD, P, R, W, SHIFT)
        store_tokens(p_grad + (H + head) * D, b_grad_key, o_row, item, window, 3 * H * D, D, BD, P, R, W, SHIFT)
        store_tokens(p_grad + (2 * H + head) * D, b_grad_value, o_row, item, window, 3 * H * D, D, BD, P, R, W, SHIFT)
    if P > 0:
        store_prompts(p_grad, p_partial, b_sum_query, o_row, head * D, owner, split, splits, batch, 1.0, 3 * H * D, D, BD, P, R)
        store_prompts(p_grad, p_partial, b_sum_key, o_row, (H + head) * D, owner, split, splits, batch, 1.0, 3 * H * D, D, BD, P, R)
        store_prompts(
            p_grad, p_partial, b_sum_value, o_row, (2 * H + head) * D, owner, split, splits, batch, 1.0, 3 * H * D, D, BD, P, R
        )


@triton.jit
def stored_probs(p_softmax, i_softmax, b_scores, o_query, NUM_ROWS: tl.constexpr):
    """Return the probabilities and the sum over keys of probability * gradient, from the statistics of `query_gradient`."""
    m_query = o_query < NUM_ROWS
    b_max = tl.load(p_softmax + i_softmax + o_query, mask=m_query, other=0.0)
    b_sum = tl.load(p_softmax + i_softmax + NUM_ROWS + o_query, mask=m_query, other=1.0)
    b_delta = tl.load(p_softmax + i_softmax + 2 * NUM_ROWS + o_query, mask=m_query, other=0.0)
    return tl.exp2(b_scores - b_max[:, None]) / b_sum[:, None], b_delta


@triton.jit(do_not_specialize=["batch", "splits"])
def query_gradient(
    p_qkv,
    p_bias,
    p_grad_out,
    p_grad,
    p_partial,
    p_softmax,
    qkv_strides,
    grad_out_strides,
    batch,
    splits,
    scale,
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
    """Compute query gradients of BM rows of one head, for some of the windows that use one image's prompts.

    softmax (B, windows, H, 3, P + W*W), float32, receives for each row the maximum of its base-2 scores, the sum of exp2(score -
    maximum), and the sum over keys of probability * gradient. If p_grad is None, only softmax is written.
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
    b_share = share_of_mean(o_query, P, NUM_WINDOWS)[:, None]
    b_sum_of_windows = tl.zeros([BM, BD], tl.float32)
    for j in tl.range(split * NUM_WINDOWS // splits, (split + 1) * NUM_WINDOWS // splits, num_stages=1):
        item, window = place(j, owner, batch, NUM_WINDOWS, OWNER_IS_INSTANCE)
        # (BM, BD) each
        o_query_start = row_offsets(o_query, owner, item, window, qkv_strides[0], qkv_strides[1], P, R, W, SHIFT)
        b_query = load_rows(p_query, o_query_start, o_query, NUM_ROWS, D, BD)
        o_grad_start = row_offsets(o_query, owner, item, window, grad_out_strides[0], grad_out_strides[1], P, R, W, SHIFT)
        b_grad_out = load_rows(p_grad_out + head * D, o_grad_start, o_query, NUM_ROWS, D, BD)
        b_max = tl.full([BM], float("-inf"), tl.float32)
        b_sum = tl.zeros([BM], tl.float32)
        b_delta = tl.zeros([BM], tl.float32)
        for key_block in tl.range(0, KEY_BLOCKS):
            o_key = key_block * BN + tl.arange(0, BN)
            o_key_start = row_offsets(o_key, owner, item, window, qkv_strides[0], qkv_strides[1], P, R, W, SHIFT)
            # (BN, BD) each
            b_key = load_rows(p_key, o_key_start, o_key, NUM_ROWS, D, BD)
            b_value = load_rows(p_value, o_key_start, o_key, NUM_ROWS, D, BD)
            b_bias = load_bias(p_bias, o_query, o_key, P, W, SHIFT)
            b_scores = window_scores(b_query, b_key, b_bias, o_query, o_key, window, scale_log2, P, R, W, SHIFT, PRECISION)
            b_grad_probs = tl.dot(b_grad_out, tl.trans(b_value), input_precision=PRECISION) * b_share
            b_new_max = tl.maximum(b_max, tl.max(b_scores, 1))
            b_probs = tl.exp2(b_scores - b_new_max[:, None])
            b_decay = tl.exp2(b_max - b_new_max)
            b_sum = b_sum * b_decay + tl.sum(b_probs, 1)
            b_delta = b_delta * b_decay + tl.sum(b_probs * b_grad_probs, 1)
            b_max = b_new_max
        b_delta /= b_sum
        i_softmax = ((item.to(tl.int64) * NUM_WINDOWS + window) * H + head) * (3 * NUM_ROWS)
        m_query = o_query < NUM_ROWS
        tl.store(p_softmax + i_softmax + o_query, b_max, mask=m_query)
        tl.store(p_softmax + i_softmax + NUM_ROWS + o_query, b_sum, mask=m_query)
        tl.store(p_softmax + i_softmax + 2 * NUM_ROWS + o_query, b_delta, mask=m_query)
        if p_grad is not None:
            b_grad_query = tl.zeros([BM, BD], tl.float32)
            for key_block in tl.range(0, KEY_BLOCKS):
                o_key = key_block * BN + tl.arange(0, BN)
                o_key_start = row_offsets(o_key, owner, item, window, qkv_strides[0], qkv_strides[1], P, R, W, SHIFT)
                b_key = load_rows(p_key, o_key_start, o_key, NUM_ROWS, D, BD)
                b_value = load_rows(p_value, o_key_start, o_key, NUM_ROWS, D, BD)
                b_bias = load_bias(p_bias, o_query, o_key, P, W, SHIFT)
                b_scores = window_scores(b_query, b_key, b_bias, o_query, o_key, window, scale_log2, P, R, W, SHIFT, PRECISION)
                b_probs = tl.exp2(b_scores - b_max[:, None]) / b_sum[:, None]
                b_grad_probs = tl.dot(b_grad_out, tl.trans(b_value), input_precision=PRECISION) * b_share
                b_grad_scores = (b_probs * (b_grad_probs - b_delta[:, None])).to(b_key.dtype)
                b_grad_query = tl.dot(b_grad_scores, b_key, b_grad_query, input_precision=PRECISION)
            b_grad_query *= scale
            b_sum_of_windows += b_grad_query
            store_tokens(p_grad + head * D, b_grad_query, o_query, item, window, 3 * H * D, D, BD, P, R, W, SHIFT)
    if p_grad is not None and P > 0:
        store_prompts(
            p_grad, p_partial, b_sum_of_windows, o_query, head * D, owner, split, splits, batch, 1.0, 3 * H * D, D, BD, P, R
        )


@triton.jit(do_not_specialize=["batch", "splits"])
def key_gradient(
    p_qkv,
    p_bias,
    p_grad_out,
    p_grad,
    p_partial,
    p_softmax,
    qkv_strides,
    grad_out_strides,
    batch,
    splits,
    scale,
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
    """Compute key and value gradients of BN rows of one head, for some of the windows that use one image's prompts."""
    NUM_WINDOWS: tl.constexpr = (R // W) * (R // W)
    NUM_ROWS: tl.constexpr = P + W * W
    QUERY_BLOCKS: tl.constexpr = (NUM_ROWS + BM - 1) // BM
    KEY_BLOCKS: tl.constexpr = (NUM_ROWS + BN - 1) // BN
    head, block, split, owner = this_program(splits, H, KEY_BLOCKS)
    o_key = block * BN + tl.arange(0, BN)

    p_query = p_qkv + head * D
    p_key = p_query + H * D
    p_value = p_key + H * D
    p_bias += head.to(tl.int64) * (W * W * W * W)
    b_sum_key = tl.zeros([BN, BD], tl.float32)
    b_sum_value = tl.zeros([BN, BD], tl.float32)
    for j in tl.range(split * NUM_WINDOWS // splits, (split + 1) * NUM_WINDOWS // splits, num_stages=1):
        item, window = place(j, owner, batch, NUM_WINDOWS, OWNER_IS_INSTANCE)
        o_key_start = row_offsets(o_key, owner, item, window, qkv_strides[0], qkv_strides[1], P, R, W, SHIFT)
        # (BN, BD) each
        b_key = load_rows(p_key, o_key_start, o_key, NUM_ROWS, D, BD)
        b_value = load_rows(p_value, o_key_start, o_key, NUM_ROWS, D, BD)
        b_grad_key = tl.zeros([BN, BD], tl.float32)
        b_grad_value = tl.zeros([BN, BD], tl.float32)
        i_softmax = ((item.to(tl.int64) * NUM_WINDOWS + window) * H + head) * (3 * NUM_ROWS)
        for query_block in tl.range(0, QUERY_BLOCKS):
            o_query = query_block * BM + tl.arange(0, BM)
            # (BM, BD) each
            o_query_start = row_offsets(o_query, owner, item, window, qkv_strides[0], qkv_strides[1], P, R, W, SHIFT)
            b_query = load_rows(p_query, o_query_start, o_query, NUM_ROWS, D, BD)
            o_grad_start = row_offsets(o_query, owner, item, window, grad_out_strides[0], grad_out_strides[1], P, R, W, SHIFT)
            b_grad_out = load_rows(p_grad_out + head * D, o_grad_start, o_query, NUM_ROWS, D, BD)
            # (BM, BN)
            b_bias = load_bias(p_bias, o_query, o_key, P, W, SHIFT)
            b_scores = window_scores(b_query, b_key, b_bias, o_query, o_key, window, scale_log2, P, R, W, SHIFT, PRECISION)
            b_probs, b_delta = stored_probs(p_softmax, i_softmax, b_scores, o_query, NUM_ROWS)
            b_share = share_of_mean(o_query, P, NUM_WINDOWS)[:, None]
            b_grad_probs = tl.dot(b_grad_out, tl.trans(b_value), input_precision=PRECISION) * b_share
            b_grad_scores = (b_probs * (b_grad_probs - b_delta[:, None])).to(b_query.dtype)
            b_shares = (b_probs * b_share).to(b_query.dtype)
            b_grad_value = tl.dot(tl.trans(b_shares), b_grad_out, b_grad_value, input_precision=PRECISION)
            b_grad_key = tl.dot(tl.trans(b_grad_scores), b_query, b_grad_key, input_precision=PRECISION)
        b_grad_key *= scale
        b_sum_key += b_grad_key
        b_sum_value += b_grad_value
        store_tokens(p_grad + (H + head) * D, b_grad_key, o_key, item, window, 3 * H * D, D, BD, P, R, W, SHIFT)
        store_tokens(p_grad + (2 * H + head) * D, b_grad_value, o_key, item, window, 3 * H * D, D, BD, P, R, W, SHIFT)
    if P > 0:
        store_prompts(p_grad, p_partial, b_sum_key, o_key, (H + head) * D, owner, split, splits, batch, 1.0, 3 * H * D, D, BD, P, R)
        store_prompts(
            p_grad, p_partial, b_sum_value, o_key, (2 * H + head) * D, owner, split, splits, batch, 1.0, 3 * H * D, D, BD, P, R
        )


@triton.jit(do_not_specialize=["batch", "parts"])
def bias_gradient(
    p_qkv,
    p_bias,
    p_grad_out,
    p_partial,
    p_softmax,
    qkv_strides,
    grad_out_strides,
    batch,
    parts,
    scale_log2,
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
    """Compute the gradient of BM x BN elements of one head's position bias, summed over a part of all windows.

    partial is (parts, H, W*W, W*W), float32. Only tokens have a bias, so prompts are not read.
    """
    NUM_WINDOWS: tl.constexpr = (R // W) * (R // W)
    NUM_ROWS: tl.constexpr = P + W * W
    QUERY_BLOCKS: tl.constexpr = (W * W + BM - 1) // BM
    KEY_BLOCKS: tl.constexpr = (W * W + BN - 1) // BN
    head = tl.program_id(0) % H
    rest = tl.program_id(0) // H
    o_query = P + rest % QUERY_BLOCKS * BM + tl.arange(0, BM)
    rest = rest // QUERY_BLOCKS
    o_key = P + rest % KEY_BLOCKS * BN + tl.arange(0, BN)
    part = (rest // KEY_BLOCKS).to(tl.int64)

    p_query = p_qkv + head * D
    p_key = p_query + H * D
    p_value = p_key + H * D
    # (BM, BN)
    b_bias = load_bias(p_bias + head.to(tl.int64) * (W * W * W * W), o_query, o_key, P, W, SHIFT)
    b_grad = tl.zeros([BM, BN], tl.float32)
    windows = batch * NUM_WINDOWS
    for i in tl.range(part * windows // parts, (part + 1) * windows // parts, num_stages=1):
        item = i // NUM_WINDOWS
        window = i % NUM_WINDOWS
        o_query_start = row_offsets(o_query, item, item, window, qkv_strides[0], qkv_strides[1], P, R, W, SHIFT)
        b_query = load_rows(p_query, o_query_start, o_query, NUM_ROWS, D, BD)
        o_grad_start = row_offsets(o_query, item, item, window, grad_out_strides[0], grad_out_strides[1], P, R, W, SHIFT)
        b_grad_out = load_rows(p_grad_out + head * D, o_grad_start, o_query, NUM_ROWS, D, BD)
        o_key_start = row_offsets(o_key, item, item, window, qkv_strides[0], qkv_strides[1], P, R, W, SHIFT)
        b_key = load_rows(p_key, o_key_start, o_key, NUM_ROWS, D, BD)
        b_value = load_rows(p_value, o_key_start, o_key, NUM_ROWS, D, BD)
        b_scores = window_scores(b_query, b_key, b_bias, o_query, o_key, window, scale_log2, P, R, W, SHIFT, PRECISION)
        i_softmax = ((item.to(tl.int64) * NUM_WINDOWS + window) * H + head) * (3 * NUM_ROWS)
        b_probs, b_delta = stored_probs(p_softmax, i_softmax, b_scores, o_query, NUM_ROWS)
        b_grad_probs = tl.dot(b_grad_out, tl.trans(b_value), input_precision=PRECISION)
        b_grad += b_probs * (b_grad_probs - b_delta[:, None])
    m_grad = (o_query < NUM_ROWS)[:, None] & (o_key < NUM_ROWS)[None, :]
    o_grad = (part * H + head) * (W * W * W * W) + (o_query - P)[:, None] * (W * W) + (o_key - P)[None, :]
    tl.store(p_partial + o_grad, b_grad, mask=m_grad)
