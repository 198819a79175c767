# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels of the importance loss, the squared coefficient of variation of the expert loads.

One program handles each block, so the order of summation is fixed.
"""

import triton
import triton.language as tl


@triton.jit
def load_variation(b_load, m_expert, K: tl.constexpr):
    """Return the mean, deviations from it (BK,), and unbiased variance / mean^2, which is 0 if all loads are 0."""
    mean = tl.sum(b_load, 0) / K
    b_deviation = tl.where(m_expert, b_load - mean, 0.0)
    # Probabilities sum to 1, so only an empty batch has a mean of 0; its loads do not vary.
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
    # Sum every BB-th row, then add these sums once at the end. In float64, because the cost is small and nearly even loads cancel.
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
