# mypy: allow-untyped-defs, allow-incomplete-defs
"""The importance loss: squared coefficient of variation of the experts' loads. One program a block: the order is fixed."""

import triton
import triton.language as tl


@triton.jit
def load_variation(b_load, m_expert, K: tl.constexpr):
    """Mean, deviations from it (BK,), and the unbiased variance over the squared mean: 0 if nothing was loaded."""
    mean = tl.sum(b_load, 0) / K
    b_deviation = tl.where(m_expert, b_load - mean, 0.0)
    # Probabilities sum to 1, so a mean of 0 is that of an empty batch, whose loads do not vary.
    mean = tl.where(mean == 0.0, 1.0, mean)
    return mean, b_deviation, tl.sum(b_deviation * b_deviation, 0) / (K - 1) / (mean * mean)


@triton.jit(do_not_specialize=["batch", "stride_block"])
def importance_forward(
    p_probs, p_loss, p_load, batch, stride_block, stride_item, threshold, K: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr
):
    i_block = tl.program_id(0).to(tl.int64)
    p_probs += i_block * stride_block
    o_expert = tl.arange(0, BK)
    m_expert = o_expert < K
    # Sums of every BB-th row, added up once at the end. In float64: there is little to add, and nearly even loads cancel.
    b_partial = tl.zeros([BB, BK], tl.float64)
    for start in range(0, batch, BB):
        o_item = (start + tl.arange(0, BB)).to(tl.int64)
        mask = (o_item < batch)[:, None] & m_expert[None, :]
        # (BB, BK)
        b_probs = tl.load(p_probs + o_item[:, None] * stride_item + o_expert[None, :], mask=mask, other=0.0)
        b_partial += b_probs.to(tl.float64)
    b_load = tl.sum(b_partial, 0)
    if K > 1:
        _, _, cv2 = load_variation(b_load, m_expert, K)
        loss = tl.where(cv2 <= threshold, 0.0, cv2)
    else:
        loss = tl.sum(b_load, 0) * 0.0
    tl.store(p_load + i_block * K + o_expert, b_load.to(p_load.dtype.element_ty), mask=m_expert)
    tl.store(p_loss + i_block, loss.to(p_loss.dtype.element_ty))


@triton.jit
def importance_backward(p_grad_loss, p_load, p_grad, threshold, K: tl.constexpr, BK: tl.constexpr):
    i_block = tl.program_id(0).to(tl.int64)
    o_expert = tl.arange(0, BK)
    m_expert = o_expert < K
    b_grad = tl.zeros([BK], tl.float32)
    if K > 1:
        b_load = tl.load(p_load + i_block * K + o_expert, mask=m_expert, other=0.0).to(tl.float64)
        mean, b_deviation, cv2 = load_variation(b_load, m_expert, K)
        b_grad_load = (b_deviation / (mean * mean) / (K - 1) - cv2 / mean / K) * 2.0 * tl.load(p_grad_loss + i_block)
        b_grad = tl.where(cv2 <= threshold, 0.0, b_grad_load).to(tl.float32)
    tl.store(p_grad + i_block * K + o_expert, b_grad, mask=m_expert)
