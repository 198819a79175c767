"""Attention with library kernels: torch's scaled_dot_product_attention and xformers.

Both accept one sequence of keys and values, so prompts and tokens must be concatenated, which costs a copy. xformers can also
attend to prompts and tokens separately and merge the results by their log-sum-exps, without this copy.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The libraries' kernels load 16 bytes at a time: 8 half-precision or 4 float32 elements.
_ALIGNMENT = 8
_XFORMERS_DEVICES = ("cuda",)
# Maximum head width -> number of tokens from which sdpa is expected to be faster, because its kernels (cuDNN and FlashAttention for
# Hopper, versus the FlashAttention-2 algorithm in Triton) then save more time than copying keys and values costs. Published H100
# results at head_dim 128 (FlashAttention-3, arXiv 2407.08608): at 512 tokens, 309 TFLOP/s for FlashAttention-2, 323 in Triton and
# 497 for cuDNN; at 8k, 370 and 600. The crossover with prompts is estimated from these numbers, not measured.
SDPA_FROM_TOKENS = {64: 4096, 128: 2048}
# CUDA's limit on the second and third grid dimensions, which xformers uses for items and heads.
_LARGEST_GRID = 65_535


def concatenate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    lengths: Tensor | None,
    attn_bias: Tensor | None,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return keys and values (B,H,P+Lk,D), and the mask (B,H,Lq,P+Lk) to add to the scores, or None if everything is visible.

    The mask has the dtype of `query` and aligned rows. It is an expanded view along axes on which it does not vary.
    """
    batch, heads, num_queries, _ = query.shape
    num_keys, num_prompts = key.shape[2], prompt_key.shape[2]
    hidden = None
    if lengths is not None:
        hidden = (torch.arange(num_keys, device=query.device) >= lengths[:, None])[:, None, None]
        # The libraries multiply padding by zero, and 0 * NaN is NaN.
        key, value = (t.masked_fill(hidden.mT, 0.0) for t in (key, value))
    if is_causal:
        above = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=query.device).triu(1)
        hidden = above if hidden is None else hidden | above

    mask = None
    if attn_bias is not None or hidden is not None:
        mask = query.new_zeros(()) if attn_bias is None else attn_bias.to(query.dtype)
        if hidden is not None:
            mask = torch.where(hidden, -torch.inf, mask)
        mask = mask[(None,) * (4 - mask.dim())].expand(-1, -1, -1, num_keys)
        width = num_prompts + num_keys
        mask = F.pad(mask, (num_prompts, -width % _ALIGNMENT))[..., :width].expand(batch, heads, num_queries, width)

    def joined(prompt: Tensor, token: Tensor) -> Tensor:
        return torch.cat([prompt.to(token.dtype).expand(batch, -1, -1, -1), token], dim=2)

    return joined(prompt_key, key), joined(prompt_value, value), mask


def nothing_visible_check(key: Tensor, prompt_key: Tensor, lengths: Tensor | None, attn_bias: Tensor | None) -> list[str]:
    """Return a reason for refusal if an item may see neither prompts nor tokens, because its output must then be zero."""
    if prompt_key.shape[2] == 0 and (key.shape[2] == 0 or lengths is not None or attn_bias is not None):
        return ["without prompts, an item may see no keys at all, and the library does not guarantee zeros then"]
    return []


def sdpa_gradient_check(query: Tensor, *others: Tensor | None) -> list[str]:
    """Return a reason for refusal if these tensors need gradients and torch's kernel is less accurate than plain PyTorch."""
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, *others))
    if query.device.type == "cpu" and query.dtype == torch.float32 and trains:
        return ["torch's CPU kernel approximates exp: its float32 gradient errors are several times those of plain PyTorch"]
    return []


def sdpa_check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    attn_bias: Tensor | None = None,
    **_: Any,
) -> list[str]:
    """Return the reasons why `sdpa` cannot be used with these arguments."""
    # Packed items will be padded, so `offsets` implies lengths.
    reasons = nothing_visible_check(key, prompt_key, lengths if offsets is None else offsets, attn_bias)
    return reasons + sdpa_gradient_check(query, key, value, prompt_key, prompt_value)


def has_fast_sdpa(device: torch.device) -> bool:
    """Tell whether torch's attention kernels use the GPU better than Triton can: on NVIDIA GPUs from Hopper on."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (9, 0)


def long_sequence_check(
    query: Tensor,
    key: Tensor,
    *_: Tensor,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    attn_bias: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    **__: Any,
) -> list[str]:
    """Return the reason to skip the Triton kernels although they could run, if sdpa is expected to be faster."""
    width = next((width for width in SDPA_FROM_TOKENS if query.shape[-1] <= width), None)
    # Padding and causal order need a mask in sdpa, and with a mask it cannot use its fastest kernels.
    is_masked = is_causal or any(t is not None for t in (lengths, offsets, attn_bias))
    if width is None or is_masked or dropout_p or query.dtype.itemsize != 2 or not has_fast_sdpa(query.device):
        return []
    if min(query.shape[2], key.shape[2]) < SDPA_FROM_TOKENS[width]:
        return []
    return [f"sdpa is preferred for long sequences: from {SDPA_FROM_TOKENS[width]} tokens on at head_dim {query.shape[-1]}"]


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    *,
    lengths: Tensor | None,
    attn_bias: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float | None,
) -> Tensor:
    """Compute `prompt_attention` with torch's scaled_dot_product_attention."""
    keys, values, mask = concatenate(query, key, value, prompt_key, prompt_value, lengths, attn_bias, is_causal)
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@functools.cache
def load_xformers() -> tuple[Any, str]:
    """Return the module `xformers.ops` and "", or None and the reason why it cannot be imported."""
    try:
        import xformers.ops
        import xformers.ops.fmha.merge_training
    # On import, xformers checks the versions of torch and flash-attention and may raise any exception.
    except Exception as error:
        return None, f"xformers cannot be imported ({type(error).__name__}: {error})"
    return xformers.ops, ""


def _xformers_refuses(
    query: Tensor, num_keys: int, *, has_mask: bool = False, dropout_p: float = 0.0, is_partial: bool = False
) -> list[str]:
    """Return xformers' own reasons for refusing attention of these sizes. They depend only on shapes and strides."""
    library, reason = load_xformers()
    if library is None:
        return [reason]
    batch, heads, num_queries, width = query.shape
    width += -width % _ALIGNMENT

    def sized(*shape: int) -> Tensor:
        return query.new_empty(1).expand(shape)

    keys = sized(batch, num_keys, heads, width)
    inputs = library.fmha.Inputs(
        query=sized(batch, num_queries, heads, width),
        key=keys,
        value=keys,
        attn_bias=sized(batch, heads, num_queries, num_keys) if has_mask else None,
        p=dropout_p,
        scale=1.0,
        is_partial=is_partial,
    )
    reasons = []
    for kernels in (library.MemoryEfficientAttentionFlashAttentionOp, library.MemoryEfficientAttentionCutlassOp):
        refusals = ((kernel.NAME, kernel.not_supported_reasons(inputs)) for kernel in kernels)
        refusal = next((f"{name}: {', '.join(why)}" for name, why in refusals if why), None)
        if refusal is None:
            return []
        reasons.append(refusal)
    return reasons


def xformers_check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    attn_bias: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    **_: Any,
) -> list[str]:
    """Return the reasons why `xformers` cannot be used with these arguments."""
    lengths = lengths if offsets is None else offsets
    # Check the device first, because importing xformers takes seconds.
    if query.device.type not in _XFORMERS_DEVICES:
        return [f"xformers runs on NVIDIA GPUs, but these tensors are on {query.device.type}"]
    reasons = nothing_visible_check(key, prompt_key, lengths, attn_bias)
    if max(query.shape[:2]) > _LARGEST_GRID:
        reasons.append(f"xformers supports at most {_LARGEST_GRID} items and heads, got {tuple(query.shape[:2])}")
    has_mask = lengths is not None or attn_bias is not None or is_causal
    return reasons + _xformers_refuses(query, prompt_key.shape[2] + key.shape[2], has_mask=has_mask, dropout_p=dropout_p)


def _against_merging(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    **_: Any,
) -> list[str]:
    """Return the reasons why prompts and tokens have to be concatenated."""
    given = {"lengths": lengths is not None or offsets is not None, "attn_bias": attn_bias is not None, "dropout_p": dropout_p > 0}
    reasons = [f"partial attention does not support {name}" for name, is_given in given.items() if is_given]
    if key.shape[2] == 0 or prompt_key.shape[2] == 0:
        reasons.append("there are no prompts or no tokens")
    return reasons or _xformers_refuses(query, key.shape[2], is_partial=True)


def xformers_way(*args: Any, **kwargs: Any) -> str:
    """Describe, for `explain`, which of its two methods `xformers` uses with these arguments."""
    if against := _against_merging(*args, **kwargs):
        return f"prompts and tokens concatenated: {'; '.join(against)}"
    return "partial attentions over prompts and tokens, merged by log-sum-exp"


def _heads_inside(t: Tensor) -> Tensor:
    """Transpose (B,H,L,D) to an aligned (B,L,H,D), with D zero-padded to a multiple of 8."""
    if t.shape[-1] % _ALIGNMENT:
        t = F.pad(t, (0, -t.shape[-1] % _ALIGNMENT))
    t = t.transpose(1, 2)
    *strides, last = t.stride()
    is_aligned = last == 1 and not any(n % _ALIGNMENT for n in (*strides, t.storage_offset()))
    return t if is_aligned else t.clone(memory_format=torch.contiguous_format)


def xformers(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    *,
    lengths: Tensor | None,
    attn_bias: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float | None,
) -> Tensor:
    """Compute `prompt_attention` with xformers. `xformers_check` must have accepted the arguments."""
    library, _ = load_xformers()
    batch, _, _, width = query.shape
    scale = width**-0.5 if scale is None else scale
    queries = _heads_inside(query)
    if _against_merging(query, key, value, prompt_key, prompt_value, lengths=lengths, attn_bias=attn_bias, dropout_p=dropout_p):
        keys, values, mask = concatenate(query, key, value, prompt_key, prompt_value, lengths, attn_bias, is_causal)
        out = library.memory_efficient_attention(
            queries, _heads_inside(keys), _heads_inside(values), attn_bias=mask, p=dropout_p, scale=scale
        )
    else:
        # Use the autograd variants, because memory_efficient_attention_partial has no backward.
        partial = library.fmha.merge_training.memory_efficient_attention_partial_autograd
        merge = library.fmha.merge_training.merge_attentions_autograd
        prompts = (_heads_inside(t.to(query.dtype)).expand(batch, -1, -1, -1) for t in (prompt_key, prompt_value))
        causal = library.LowerTriangularMask() if is_causal else None
        out = merge(
            partial(queries, *prompts, scale=scale),
            partial(queries, _heads_inside(key), _heads_inside(value), attn_bias=causal, scale=scale),
        )
    return out[..., :width].contiguous().transpose(1, 2)
