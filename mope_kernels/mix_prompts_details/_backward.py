# mypy: allow-untyped-defs, allow-incomplete-defs
"""Backward kernels of the weighted sum of expert prompts. One program computes each sum, in a fixed order."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["batch"])
def mix_backward_experts(
    p_grad_out,
    p_weights,
    p_indices,
    p_grad_experts,
    batch,
    stride_item,
    stride_prompt,
    stride_weights,
    stride_indices,
    P: tl.constexpr,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    BB: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
):
    """Compute the gradient of BE of the P * D elements of one expert, summed over the batch."""
    blocks: tl.constexpr = (P * D + BE - 1) // BE
    expert = tl.program_id(0) // blocks
    o_element = tl.program_id(0) % blocks * BE + tl.arange(0, BE)
    m_element = o_element < P * D
    o_grad = (o_element // D).to(tl.int64) * stride_prompt + o_element % D
    b_grad = tl.zeros([BE], tl.float32)
    for start in range(0, batch, BB):
        o_item = (start + tl.arange(0, BB)).to(tl.int64)
        # The expert's weight in each item, and how often it was selected: (BB,) each
        b_coefficient = tl.zeros([BB], tl.float32)
        b_uses = tl.zeros([BB], tl.int32)
        for first in range(0, TOP_K, BT):
            o_slot = first + tl.arange(0, BT)
            mask = (o_item < batch)[:, None] & (o_slot < TOP_K)[None, :]
            # (BB, BT) each
            b_index = tl.load(p_indices + o_item[:, None] * stride_indices + o_slot[None, :], mask=mask, other=-1)
            b_weight = tl.load(p_weights + o_item[:, None] * stride_weights + o_slot[None, :], mask=mask, other=0.0)
            b_coefficient += tl.sum(tl.where(b_index == expert, b_weight.to(tl.float32), 0.0), 1)
            b_uses += tl.sum((b_index == expert).to(tl.int32), 1)
        mask = (b_uses > 0)[:, None] & m_element[None, :]
        # (BB, BE); do not read items that do not use the expert, because they may hold NaN
        b_grad_out = tl.load(p_grad_out + o_item[:, None] * stride_item + o_grad[None, :], mask=mask, other=0.0).to(tl.float32)
        b_grad += tl.sum(tl.where(mask, b_coefficient[:, None] * b_grad_out, 0.0), 0)
    o_expert = expert.to(tl.int64) * (P * D) + o_element
    tl.store(p_grad_experts + o_expert, b_grad.to(p_grad_experts.dtype.element_ty), mask=m_element)


@triton.jit
def mix_backward_weights(
    p_grad_out,
    p_experts,
    p_indices,
    p_grad_weights,
    stride_item,
    stride_grad_prompt,
    stride_expert,
    stride_prompt,
    stride_indices,
    P: tl.constexpr,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    BE: tl.constexpr,
):
    """Compute the gradient of one weight of one item, the dot product of its expert with the incoming gradient.

    Without indices, there is one weight per expert.
    """
    item = (tl.program_id(0) // TOP_K).to(tl.int64)
    slot = tl.program_id(0) % TOP_K
    index = slot.to(tl.int64)
    if p_indices is not None:
        index = tl.load(p_indices + item * stride_indices + slot).to(tl.int64)
    b_products = tl.zeros([BE], tl.float32)
    for start in range(0, P * D, BE):
        o_element = start + tl.arange(0, BE)
        m_element = o_element < P * D
        o_grad = (o_element // D).to(tl.int64) * stride_grad_prompt + o_element % D
        o_expert = (o_element // D).to(tl.int64) * stride_prompt + o_element % D
        # (BE,) each
        b_grad_out = tl.load(p_grad_out + item * stride_item + o_grad, mask=m_element, other=0.0).to(tl.float32)
        b_expert = tl.load(p_experts + index * stride_expert + o_expert, mask=m_element, other=0.0).to(tl.float32)
        b_products += b_grad_out * b_expert
    p_grad_weights += item * TOP_K + slot
    tl.store(p_grad_weights, tl.sum(b_products, 0).to(p_grad_weights.dtype.element_ty))
