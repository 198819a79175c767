"""Attention over prompts and tokens."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from ._checks import Arguments, debugging, first_derivative_only, kernel_lengths, last_dim_contiguous
from ._ops import PROMPT_ATTENTION_GRADIENTS
from .impl import Operation, extension_check, reference_check, triton_check
from .prompt_attention_details import _launch as _launch
from .prompt_attention_details import _libraries

TRITON_HEAD_DIMS = (16, 32, 48, 64, 72, 80, 88, 96, 128)


class _Options(NamedTuple):
    """What is no tensor, in the order of the raw op's schema."""

    is_causal: bool
    scale: float
    dropout_p: float


class _PackedOptions(NamedTuple):
    """The same of `packed_attention`."""

    max_length: int
    is_causal: bool
    scale: float
    dropout_p: float


class PromptAttentionFunction(torch.autograd.Function):
    """(raw op, options, *tensors) -> out; the tensors in the order of the raw op's schema."""

    @staticmethod
    def forward(ctx: Any, op: str, options: _Options | _PackedOptions, *tensors: Tensor | None) -> Tensor:
        namespace, name = op.split("::")
        ops = getattr(torch.ops, namespace)
        ctx.backward_op, ctx.options = getattr(ops, f"{name}_backward"), options
        out, lse = getattr(ops, name).default(*tensors, *options)
        ctx.save_for_backward(out, lse, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only("prompt_attention")
        out, lse, *tensors = ctx.saved_tensors
        # Of op, options and tensors; those that can have a gradient come first among the tensors.
        needed = ctx.needs_input_grad[2 : 2 + len(PROMPT_ATTENTION_GRADIENTS)]
        found = ctx.backward_op.default(
            last_dim_contiguous(grads[0]), out, lse, *tensors, *ctx.options, sum(need << bit for bit, need in enumerate(needed))
        )
        gradients = (grad if need else None for grad, need in zip(found, needed, strict=True))
        # What comes behind them has none: lengths, attn_bias, offsets, seed.
        return None, None, *gradients, *(None for _ in tensors[len(PROMPT_ATTENTION_GRADIENTS) :])


def triton_attention_check(query: Tensor, *tensors: Tensor) -> list[str]:
    """What speaks against the Triton kernels of attention."""
    reasons = triton_check(query, *tensors)
    if query.shape[-1] not in TRITON_HEAD_DIMS:
        reasons.append(f"head_dim must be one of {', '.join(map(str, TRITON_HEAD_DIMS))}, got {query.shape[-1]}")
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
# Those whose gradients autograd finds by itself.
_BY_AUTOGRAD: dict[str, Callable[..., Tensor]] = {
    "sdpa": _libraries.sdpa,
    "xformers": _libraries.xformers,
    "reference": reference.prompt_attention,
}


def check_attention(
    arguments: Arguments, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, dropout_p: float
) -> None:
    """The checks that every attention over tokens shares."""
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
        raise arguments.error("offsets say which tokens an item has: give neither lengths nor attn_bias beside them")
    if max_length is None:
        raise arguments.error("offsets need max_length, the tokens of the longest item: to read them would make the host wait")
    arguments.tensor("offsets", offsets, "N", integer=True)
    arguments.tensor("query", query, "1 H T D")
    arguments.tensor("key", key, "1 H T D", dtype=query.dtype)
    arguments.tensor("value", value, "1 H T D", dtype=query.dtype)
    arguments.sizes["B"] = len(offsets) - 1
    if torch.compiler.is_compiling() or not (offsets.device.type == "cpu" or debugging()):
        return
    bounds, num_rows = offsets.tolist(), query.shape[2]
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
    """softmax(q [Kp; K]' * scale) [Vp; V]: scaled dot product attention whose first keys are prompts.

    Args:
        query: (B,H,Lq,D), floating point.
        key, value: (B,H,Lk,D), dtype of `query`.
        prompt_key, prompt_value: (B,H,P,D), or (1,H,P,D) where all items share their prompts; floating point.
        lengths: (B,) integer; the tokens of item b from lengths[b] on are hidden from it, prompts never are.
        attn_bias: floating point, broadcastable to (B,H,Lq,Lk); added to the scores of tokens. Not differentiable.
        offsets: (B+1,) integer, of packed items: query, key and value are (1,H,T,D), the tokens of all items one after the other
            without padding, those of item b in rows offsets[b] to offsets[b+1]. In place of `lengths` and `attn_bias`.
        max_length: with `offsets`, the number of tokens of the longest item (or more).
        is_causal: query i sees tokens 0..i and every prompt; needs Lq = Lk.
        dropout_p: of the attention probabilities, those of prompts too.
        scale: of the scores; D^-0.5 if None.
        impl: "auto", "triton", "cpu", "sdpa" (concatenation and torch's scaled_dot_product_attention), "xformers" or "reference".

    Returns:
        In the shape and dtype of `query`, in memory (B,Lq,H,D). Zero where an item has neither prompts nor tokens.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, `attn_bias` requires a gradient, or `impl` cannot run.
    """
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
    options: dict[str, Any] = {"lengths": lengths, "attn_bias": attn_bias, "is_causal": is_causal, "dropout_p": dropout_p}
    if offsets is not None:
        return _attend_packed(tensors, offsets, max_length or 0, is_causal, dropout_p, scale, impl)
    implementation = _PROMPT_ATTENTION.choose(impl, *tensors, **options)
    if implementation in _BY_AUTOGRAD:
        # The op computes in the dtypes of its arguments, and concatenates tensors of dtypes that autocast may not know.
        with reference.autocast_off(query.device):
            return _BY_AUTOGRAD[implementation](*tensors, **options, scale=scale)
    return PromptAttentionFunction.apply(
        f"mope_{implementation}::prompt_attention",
        _Options(is_causal, _scale(query, scale), dropout_p),
        *(last_dim_contiguous(t) for t in tensors),
        kernel_lengths(lengths),
        attn_bias,
        _seed(query, dropout_p),
    )


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _seed(query: Tensor, dropout_p: float) -> Tensor | None:
    """A tensor of its own, made on the device: no sync, and a graph replay can be given a new one."""
    return torch.randint(2**62, (1,), device=query.device) if dropout_p else None


def _attend_packed(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    offsets: Tensor,
    max_length: int,
    is_causal: bool,
    dropout_p: float,
    scale: float | None,
    impl: str,
) -> Tensor:
    """Packed items, where Triton runs; else they are padded, attended and packed again."""
    query, key, value, *prompts = tensors
    implementation = _PROMPT_ATTENTION.choose(impl, *tensors, offsets=offsets, is_causal=is_causal, dropout_p=dropout_p)
    if implementation == "triton":
        return PromptAttentionFunction.apply(
            "mope_triton::packed_attention",
            _PackedOptions(max_length, is_causal, _scale(query, scale), dropout_p),
            *(last_dim_contiguous(t) for t in tensors),
            offsets.contiguous(),
            _seed(query, dropout_p),
        )
    padded = (reference.pad_items(t, offsets, max_length) for t in (query, key, value))
    options: dict[str, Any] = {"is_causal": is_causal, "dropout_p": dropout_p, "scale": scale}
    out = prompt_attention(*padded, *prompts, lengths=offsets.diff(), **options, impl=implementation)
    return reference.pack_items(out, offsets, query.shape[2])
