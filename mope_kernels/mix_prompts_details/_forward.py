# mypy: allow-untyped-defs, allow-incomplete-defs
"""Weighted sum of the selected expert prompts."""

import triton
import triton.language as tl


@triton.jit
def mix_forward(
    p_experts,
    p_weights,
    p_indices,
    p_out,
    stride_expert,
    stride_prompt,
    stride_weights,
    stride_indices,
    P: tl.constexpr,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    BE: tl.constexpr,
):
    """Compute BE of the P * D elements of one item."""
    blocks: tl.constexpr = (P * D + BE - 1) // BE
    item = (tl.program_id(0) // blocks).to(tl.int64)
    o_element = tl.program_id(0) % blocks * BE + tl.arange(0, BE)
    m_element = o_element < P * D
    o_expert = (o_element // D).to(tl.int64) * stride_prompt + o_element % D
    b_out = tl.zeros([BE], tl.float32)
    for slot in range(TOP_K):
        index = tl.load(p_indices + item * stride_indices + slot).to(tl.int64)
        weight = tl.load(p_weights + item * stride_weights + slot).to(tl.float32)
        # (BE,)
        b_out += weight * tl.load(p_experts + index * stride_expert + o_expert, mask=m_element, other=0.0).to(tl.float32)
    tl.store(p_out + item * (P * D) + o_element, b_out.to(p_out.dtype.element_ty), mask=m_element)
