# mypy: allow-untyped-defs, allow-incomplete-defs
"""Prompts of one item and head in attention order: [static; instance; routed].

A selection is a tuple (slot, expert, weight) of three vectors. The expert in slot t < SELECTED is the t-th selected one.
"""

import triton
import triton.language as tl

from mope_kernels.prompt_attention_details._forward import load_tile, matrix_offset, store_tile


@triton.jit
def selected(selection, slot):
    """Return the index and weight of the expert in a slot."""
    b_slot, b_expert, b_weight = selection
    return tl.sum(tl.where(b_slot == slot, b_expert, 0), 0), tl.sum(tl.where(b_slot == slot, b_weight, 0.0), 0)


@triton.jit
def inverse_std(
    p_gram, selection, task, o_prompt, eps, K: tl.constexpr, SELECTED: tl.constexpr, SIZES: tl.constexpr, BP: tl.constexpr
):
    """Return (w' G_p w + eps)^-1/2 for the routed prompts: (BP,). 1 without LayerNorm."""
    # In Triton 3.6, a function called in a loop cannot return None.
    if p_gram is None:
        return tl.full([BP], 1.0, tl.float32)
    else:
        b_slot, b_expert, b_weight = selection
        m_selected = b_slot < SELECTED
        b_selected_weight = tl.where(m_selected, b_weight, 0.0)
        o_routed = o_prompt - (SIZES[0] + SIZES[1])
        mask = ((o_routed >= 0) & (o_routed < SIZES[2]))[:, None] & m_selected[None, :]
        b_variance = tl.zeros([BP], tl.float32)
        p_gram += task * (SIZES[2] * K * K)
        for slot in range(SELECTED):
            index, weight = selected(selection, slot)
            # (BP, BK)
            b_gram = tl.load(p_gram + (o_routed[:, None] * K + index) * K + b_expert[None, :], mask=mask, other=0.0).to(tl.float32)
            b_variance += weight * tl.sum(b_gram * b_selected_weight[None, :], 1)
        return tl.rsqrt(tl.maximum(b_variance, 0.0) + eps)


@triton.jit
def prompt_tile(
    sources,
    strides,
    selection,
    b_inverse_std,
    item,
    task,
    head,
    o_prompt,
    K: tl.constexpr,
    SELECTED: tl.constexpr,
    SIZES: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
    BP: tl.constexpr,
):
    """Build the keys or values of some prompts of an item and head: (BP,BD) float32.

    `sources` holds pointers to bank, offset, static and instance prompts; SIZES the numbers of static, instance and routed prompts.
    """
    p_bank, p_offset, p_static, p_instance = sources
    bank_strides, static_strides, instance_strides = strides
    S: tl.constexpr = SIZES[0]
    M: tl.constexpr = SIZES[1]
    P: tl.constexpr = SIZES[2]
    b_tile = tl.zeros([BP, BD], tl.float32)
    if P > 0:
        o_routed = o_prompt - (S + M)
        m_routed = (o_routed >= 0) & (o_routed < P)
        for slot in range(SELECTED):
            index, weight = selected(selection, slot)
            p_expert = p_bank + matrix_offset(task * K + index, head, bank_strides)
            b_tile += weight * load_tile(p_expert, o_routed, m_routed, bank_strides[2], D, BD, WIDE).to(tl.float32)
        b_tile *= b_inverse_std[:, None]
        if p_offset is not None:
            o_column = tl.arange(0, BD)
            b_tile += tl.load(p_offset + head * D + o_column, mask=o_column < D, other=0.0).to(tl.float32)[None, :]
        b_tile = tl.where(m_routed[:, None], b_tile, 0.0)
    # The three kinds occupy disjoint rows, so they can be added.
    if S > 0:
        p_static += matrix_offset(task, head, static_strides)
        b_tile += load_tile(p_static, o_prompt, o_prompt < S, static_strides[2], D, BD, WIDE).to(tl.float32)
    if M > 0:
        o_instance = o_prompt - S
        m_instance = (o_instance >= 0) & (o_instance < M)
        p_instance += matrix_offset(item, head, instance_strides)
        b_tile += load_tile(p_instance, o_instance, m_instance, instance_strides[2], D, BD, WIDE).to(tl.float32)
    return b_tile


@triton.jit
def build_prompts(
    p_weights,
    p_indices,
    p_bank_key,
    p_bank_value,
    p_gram,
    p_key_offset,
    p_value_offset,
    p_static_key,
    p_static_value,
    p_instance_key,
    p_instance_value,
    p_prompt_key,
    p_prompt_value,
    prompt_strides,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    SELECTED: tl.constexpr,
    SIZES: tl.constexpr,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
    BP: tl.constexpr,
):
    """Write BP prompts (B,H,N,D) of one item and head, from given weights (B,k) and indices (B,k), or None if dense."""
    N: tl.constexpr = SIZES[0] + SIZES[1] + SIZES[2]
    blocks: tl.constexpr = (N + BP - 1) // BP
    item_head = tl.program_id(0) // blocks
    item = (item_head // H).to(tl.int64)
    head = (item_head % H).to(tl.int64)
    task = item * 0
    o_prompt = tl.program_id(0) % blocks * BP + tl.arange(0, BP)
    b_slot = tl.arange(0, BT)
    b_weight = tl.load(p_weights + item * SELECTED + b_slot, mask=b_slot < SELECTED, other=0.0)
    b_expert = b_slot
    if p_indices is not None:
        b_expert = tl.load(p_indices + item * SELECTED + b_slot, mask=b_slot < SELECTED, other=0).to(tl.int32)
    selection = (b_slot, b_expert, b_weight)
    b_inverse_std = inverse_std(p_gram, selection, task, o_prompt, eps, K, SELECTED, SIZES, BP)
    o_out = item_head.to(tl.int64) * (N * D)

    sources = (p_bank_key, p_key_offset, p_static_key, p_instance_key)
    # (BP, BD)
    b_key = prompt_tile(
        sources, prompt_strides, selection, b_inverse_std, item, task, head, o_prompt, K, SELECTED, SIZES, D, BD, WIDE, BP
    )
    store_tile(p_prompt_key + o_out, o_prompt, o_prompt < N, D, b_key, D, BD, WIDE)

    sources = (p_bank_value, p_value_offset, p_static_value, p_instance_value)
    # (BP, BD)
    b_value = prompt_tile(
        sources, prompt_strides, selection, b_inverse_std, item, task, head, o_prompt, K, SELECTED, SIZES, D, BD, WIDE, BP
    )
    store_tile(p_prompt_value + o_out, o_prompt, o_prompt < N, D, b_value, D, BD, WIDE)
