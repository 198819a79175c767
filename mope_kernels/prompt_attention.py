"""Attention over prompts and tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._checks import (
    Arguments,
    any_needs_gradient,
    copied,
    first_derivative_only,
    kernel_lengths,
    last_dim_contiguous,
    to_copy,
)
from ._ops import Kernel, backward_kernel, forward_kernel
from .impl import Operation, extension_check, reference_check, triton_check
from .plans import Plan
from .prompt_attention_details import _launch as _launch
from .prompt_attention_details import _libraries
from .prompt_attention_details.spec import GRADIENTS, HEAD_DIMS


class PromptAttentionFunction(torch.autograd.Function):
    """Autograd of `prompt_attention`: (implementation, kernel, raw op, options, *tensors) -> out.

    The tensors are in schema order.
    """

    @staticmethod
    def forward(
        ctx: Any, implementation: str, kernel: Kernel, op: str, options: tuple[Any, ...], *tensors: Tensor | None
    ) -> Tensor:
        out, lse = kernel(*tensors, *options)
        ctx.implementation, ctx.op, ctx.options = implementation, op, options
        ctx.save_for_backward(out, lse, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only("prompt_attention")
        # The tensors follow the first four arguments. Those that can have a gradient come first.
        asked = dict(zip(GRADIENTS.names, ctx.needs_input_grad[4:], strict=False))
        found = backward_kernel(ctx.implementation, f"{ctx.op}_backward")(
            last_dim_contiguous(grads[0]), *ctx.saved_tensors, *ctx.options, GRADIENTS.needs(asked)
        )
        gradients = [grad if need else None for grad, need in zip(found, asked.values(), strict=True)]
        # lengths, attn_bias, offsets and seed have no gradient.
        others = len(ctx.needs_input_grad) - 4 - len(gradients)
        return None, None, None, None, *gradients, *(None,) * others


def triton_attention_check(query: Tensor, *tensors: Tensor) -> list[str]:
    """Return the reasons why the Triton attention kernels cannot run on these tensors; empty if they can."""
    reasons = triton_check(query, *tensors)
    if query.shape[-1] not in HEAD_DIMS:
        reasons.append(f"head_dim must be one of {', '.join(map(str, HEAD_DIMS))}, got {query.shape[-1]}")
    return reasons


def _triton_check(query: Tensor, key: Tensor, value: Tensor, prompt_key: Tensor, prompt_value: Tensor, **_: Any) -> list[str]:
    return triton_attention_check(query, prompt_key, prompt_value)


def _cpu_check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    *,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    **_: Any,
) -> list[str]:
    tensors = (query, key, value, prompt_key, prompt_value)
    reasons = extension_check(*tensors, *([] if attn_bias is None else [attn_bias]))
    if dropout_p:
        reasons.append("the C++ kernel has no dropout")
    return reasons


_PROMPT_ATTENTION = Operation(
    "prompt_attention",
    triton=_triton_check,
    cpu=_cpu_check,
    sdpa=_libraries.sdpa_check,
    xformers=_libraries.xformers_check,
    reference=reference_check,
    ways={"xformers": _libraries.xformers_way},
    left_out={"triton": _libraries.long_sequence_check},
)
# Implementations in plain torch operations, which autograd differentiates.
_BY_AUTOGRAD: dict[str, Callable[..., Tensor]] = {
    "sdpa": _libraries.sdpa,
    "xformers": _libraries.xformers,
    "reference": reference.prompt_attention,
}


def check_attention(
    arguments: Arguments, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, dropout_p: float
) -> None:
    """Check the arguments that all ops with attention over tokens share."""
    arguments.tensor("query", query, "B H Lq D")
    arguments.tensor("key", key, "B H Lk D", dtype=query.dtype)
    arguments.tensor("value", value, "B H Lk D", dtype=query.dtype)
    arguments.tensor("lengths", lengths, "B", integer=True)
    arguments.probability("dropout_p", dropout_p)


def _check_bias(arguments: Arguments, attn_bias: Tensor | None, wanted: tuple[int, ...]) -> None:
    if attn_bias is None:
        return
    padded = (1,) * (4 - attn_bias.dim()) + tuple(attn_bias.shape)
    if len(padded) != 4 or any(size not in (1, want) for size, want in zip(padded, wanted, strict=True)):
        raise arguments.error(f"attn_bias must be broadcastable to (B,H,Lq,Lk) = {wanted}, got shape {tuple(attn_bias.shape)}")
    if not attn_bias.is_floating_point():
        raise arguments.error(f"attn_bias must be a floating point tensor (0 visible, -inf hidden), got {attn_bias.dtype}")
    if attn_bias.requires_grad:
        raise arguments.error("attn_bias gets no gradient: pass attn_bias.detach()")


def _check_packed(
    arguments: Arguments, query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, max_length: int | None, has_other: bool
) -> None:
    if has_other:
        raise arguments.error("offsets say which tokens an item has: pass neither lengths nor attn_bias with them")
    if max_length is None:
        raise arguments.error("offsets need max_length, the tokens of the longest item: reading it from offsets would sync")
    arguments.tensor("offsets", offsets, "N", integer=True)
    arguments.tensor("query", query, "1 H T D")
    arguments.tensor("key", key, "1 H T D", dtype=query.dtype)
    arguments.tensor("value", value, "1 H T D", dtype=query.dtype)
    if len(offsets) == 0:
        raise arguments.error("offsets must go up from 0 to the number of rows, got none")
    arguments.sizes["B"] = len(offsets) - 1


def _look_at_offsets(arguments: Arguments, offsets: Tensor, num_rows: int, max_length: int) -> None:
    """Check offsets against the number of rows, if they may be read."""
    if not arguments.may_read(offsets):
        return
    bounds = offsets.tolist()
    steps = [end - start for start, end in pairwise(bounds)]
    if not bounds or bounds[0] != 0 or bounds[-1] != num_rows or min(steps, default=0) < 0 or max(steps, default=0) > max_length:
        raise arguments.error(
            f"offsets must go up from 0 to the T={num_rows} rows, by at most max_length={max_length} at a time, got {bounds}"
        )


def prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    *,
    lengths: Tensor | None = None,
    attn_bias: Tensor | None = None,
    offsets: Tensor | None = None,
    max_length: int | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compute scaled dot-product attention over prompts and tokens: softmax(q [Kp; K]' * scale) [Vp; V].

    Args:
        query: (B,H,Lq,D), floating point.
        key: (B,H,Lk,D), dtype of `query`.
        value: (B,H,Lk,D), dtype of `query`.
        prompt_key: (B,H,P,D), or (1,H,P,D) if all items share their prompts; floating point.
        prompt_value: Same shapes as `prompt_key`.
        lengths: (B,) integer. The tokens of item b from lengths[b] on are masked; prompts never are.
        attn_bias: Floating point, broadcastable to (B,H,Lq,Lk); added to the scores of tokens. Not differentiable.
        offsets: (B+1,) integer, for packed items. query, key and value are then (1,H,T,D), the concatenated tokens of all items
            without padding; item b has rows offsets[b] to offsets[b+1] - 1. Excludes `lengths` and `attn_bias`.
        max_length: With `offsets`, the number of tokens of the longest item, or an upper bound.
        is_causal: Query i sees tokens 0..i and all prompts; requires Lq = Lk.
        dropout_p: Dropout probability for the attention weights, including those of prompts.
        scale: Factor for the scores, by default D^-0.5.
        impl: "auto", "triton", "cpu", "sdpa" (concatenation and torch's scaled_dot_product_attention), "xformers" or "reference".

    Returns:
        A tensor of the shape and dtype of `query`, with memory laid out as (B,Lq,H,D). Items with neither prompts nor tokens
        get zeros.

    Raises:
        ValueError: Shapes, dtypes or devices do not match, `attn_bias` requires a gradient, or `impl` cannot run.
    """
    tensors = (query, key, value, prompt_key, prompt_value, lengths, attn_bias, offsets)
    return _PROMPT_ATTENTION.plans.run(_plan, tensors, (max_length, is_causal, dropout_p, scale, impl))


def _plan(direct: bool, *given: Any) -> Plan:
    query, key, value, prompt_key, prompt_value, lengths, attn_bias, offsets, max_length, is_causal, dropout_p, scale, impl = given
    arguments = Arguments("prompt_attention")
    if offsets is None:
        check_attention(arguments, query, key, value, lengths, dropout_p)
    else:
        arguments.probability("dropout_p", dropout_p)
        _check_packed(arguments, query, key, value, offsets, max_length, has_other=lengths is not None or attn_bias is not None)
    owner = "1" if getattr(prompt_key, "shape", ())[:1] == (1,) else "B"
    arguments.tensor("prompt_key", prompt_key, f"{owner} H P D")
    arguments.tensor("prompt_value", prompt_value, f"{owner} H P D")
    _check_bias(arguments, attn_bias, (*query.shape[:3], key.shape[2]))
    if is_causal and query.shape[2] != key.shape[2]:
        raise arguments.error(f"is_causal needs as many queries as tokens, got Lq={query.shape[2]} and Lk={key.shape[2]}")
    arguments.number("scale", scale)
    tensors = (query, key, value, prompt_key, prompt_value)
    masks = {"lengths": lengths, "attn_bias": attn_bias} if offsets is None else {"offsets": offsets}
    implementation = _PROMPT_ATTENTION.choose(impl, *tensors, **masks, is_causal=is_causal, dropout_p=dropout_p)
    options: dict[str, Any] = {"is_causal": is_causal, "dropout_p": dropout_p}
    if offsets is not None and implementation != "triton":
        return partial(_pad_and_attend, arguments, max_length, options | {"scale": scale, "impl": implementation})
    if implementation in _BY_AUTOGRAD:
        return partial(_attend_by_autograd, _BY_AUTOGRAD[implementation], options | {"scale": scale})
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    attend: Plan
    op = "prompt_attention"
    given_options: tuple[Any, ...] = (is_causal, scale, dropout_p)
    if offsets is not None:
        op, given_options = "packed_attention", (max_length, *given_options)
    kernel = forward_kernel(implementation, op, direct)
    if any_needs_gradient(*tensors, attn_bias):
        attend = partial(PromptAttentionFunction.apply, implementation, kernel, op, given_options)
    else:

        def attend(*tensors: Tensor | None) -> Tensor:
            return kernel(*tensors, *given_options)[0]

    num_rows, copies, packed = query.shape[2], to_copy(tensors), offsets is not None
    fitting = lengths is None or kernel_lengths(lengths) is lengths
    if fitting and not (copies or dropout_p or packed):
        # offsets comes last and is None. It is passed in place of the seed, which is also None without dropout.
        return attend

    def planned(*given: Any) -> Tensor:
        lengths, attn_bias, offsets = given[5:]
        laid_out = copied(given[:5], copies)
        # The seed is a new tensor on the device, which needs no sync and can be replaced for a graph replay.
        seed = torch.randint(2**62, (1,), device=laid_out[0].device) if dropout_p else None
        if not packed:
            return attend(*laid_out, kernel_lengths(lengths), attn_bias, seed)
        _look_at_offsets(arguments, offsets, num_rows, max_length)
        return attend(*laid_out, offsets.contiguous(), seed)

    return planned


def _attend_by_autograd(
    attention: Callable[..., Tensor],
    options: dict[str, Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    lengths: Tensor | None,
    attn_bias: Tensor | None,
    _: None,
) -> Tensor:
    # The op computes in the dtypes of its arguments, and concatenates tensors whose dtypes autocast may not support.
    with reference.autocast_off(query.device):
        return attention(query, key, value, prompt_key, prompt_value, lengths=lengths, attn_bias=attn_bias, **options)


def _pad_and_attend(arguments: Arguments, max_length: int, options: dict[str, Any], *tensors: Any) -> Tensor:
    """Attend over packed items without a kernel for them: pad the items, attend, and pack the result."""
    query, key, value, prompt_key, prompt_value, _, _, offsets = tensors
    _look_at_offsets(arguments, offsets, query.shape[2], max_length)
    num_rows = query.shape[2]
    query, key, value = (reference.pad_items(t, offsets, max_length) for t in (query, key, value))
    out = prompt_attention(query, key, value, prompt_key, prompt_value, lengths=offsets.diff(), **options)
    return reference.pack_items(out, offsets, num_rows)
