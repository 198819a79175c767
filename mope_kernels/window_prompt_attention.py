"""Shifted window attention with prompts in every window."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from ._checks import Arguments, any_needs_gradient, first_derivative_only, last_dim_contiguous, to_copy
from ._ops import Kernel, backward_kernel, forward_kernel
from .impl import Operation, extension_check, reference_check, triton_check
from .plans import Plan
from .prompt_attention_details.spec import HEAD_DIMS
from .window_prompt_attention_details import _launch as _launch
from .window_prompt_attention_details.spec import GRADIENTS


class _Options(NamedTuple):
    """Non-tensor arguments of the raw op, in schema order."""

    num_prompts: int
    num_heads: int
    resolution: int
    window_size: int
    shift: int
    owner_is_instance: bool


class WindowPromptAttentionFunction(torch.autograd.Function):
    """Autograd of `window_prompt_attention`: (implementation, kernel, options, qkv, position_bias) -> out.

    Only the two tensors are saved for backward.
    """

    @staticmethod
    def forward(ctx: Any, implementation: str, kernel: Kernel, options: _Options, qkv: Tensor, position_bias: Tensor) -> Tensor:
        ctx.implementation, ctx.options = implementation, options
        ctx.save_for_backward(qkv, position_bias)
        return kernel(qkv, position_bias, *options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only("window_prompt_attention")
        qkv, position_bias = ctx.needs_input_grad[3:]
        needs = GRADIENTS.needs({"qkv": qkv, "position_bias": position_bias})
        kernel = backward_kernel(ctx.implementation, "window_prompt_attention_backward")
        grad_qkv, grad_bias = kernel(last_dim_contiguous(grads[0]), *ctx.saved_tensors, *ctx.options, needs)
        return None, None, None, grad_qkv if qkv else None, grad_bias if position_bias else None


def _triton_check(qkv: Tensor, position_bias: Tensor, *, num_heads: int, **_: Any) -> list[str]:
    reasons = triton_check(qkv, position_bias)
    head_dim = qkv.shape[2] // (3 * num_heads)
    if head_dim not in HEAD_DIMS:
        reasons.append(f"head_dim must be one of {', '.join(map(str, HEAD_DIMS))}, got {head_dim}")
    return reasons


def _cpu_check(qkv: Tensor, position_bias: Tensor, **_: Any) -> list[str]:
    return extension_check(qkv, position_bias)


_WINDOW_PROMPT_ATTENTION = Operation("window_prompt_attention", triton=_triton_check, cpu=_cpu_check, reference=reference_check)

PROMPT_OWNERS = ("instance", "released")


def window_prompt_attention(
    qkv: Tensor,
    position_bias: Tensor,
    *,
    num_prompts: int,
    num_heads: int,
    resolution: int,
    window_size: int,
    shift: int = 0,
    prompt_owner: str = "instance",
    impl: str = "auto",
) -> Tensor:
    """Compute (shifted) window attention in which every window also contains the prompts of its image.

    From MoPE (arXiv 2403.10568), prompted Swin Transformer.

    Args:
        qkv: (B, P + R*R, 3C), the projections [query | key | value], each split into heads. Prompts come first, then tokens in
            row-major order.
        position_bias: (H, w*w, w*w), added to the scores between tokens; prompts get none.
        num_prompts: P.
        num_heads: H; scores are scaled by (C / H)^-0.5.
        resolution: R, the number of tokens along one side of the image.
        window_size: w; must divide R. If R <= w, there is one window of R*R tokens without shift, and position_bias is
            (H, R*R, R*R).
        shift: Cyclic shift of the windows, 0 <= shift < w. Scores between tokens that meet in a window only through wrap-around
            get -100 added.
        prompt_owner: "instance": a window uses the prompts of its own image. "released": window i = b*nW + w uses those of
            image i % B, as the released code does.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        (B, P + R*R, C), in the row order of `qkv`. The output of a prompt is the mean over the windows that used it.

    Raises:
        ValueError: Shapes or sizes do not match, or `impl` cannot run.
    """
    options = (num_prompts, num_heads, resolution, window_size, shift, prompt_owner, impl)
    return _WINDOW_PROMPT_ATTENTION.plans.run(_plan, (qkv, position_bias), options)


def _plan(
    direct: bool,
    qkv: Tensor,
    position_bias: Tensor,
    num_prompts: int,
    num_heads: int,
    resolution: int,
    window_size: int,
    shift: int,
    prompt_owner: str,
    impl: str,
) -> Plan:
    arguments = Arguments("window_prompt_attention")
    arguments.tensor("qkv", qkv, "B N C")
    width = qkv.shape[2]
    if qkv.shape[1] != num_prompts + resolution**2:
        raise arguments.error(
            f"qkv must have num_prompts + resolution^2 = {num_prompts} + {resolution**2} rows, got shape {tuple(qkv.shape)}"
        )
    if width % (3 * num_heads):
        raise arguments.error(f"qkv's last axis must be divisible by 3 * num_heads = {3 * num_heads}, got shape {tuple(qkv.shape)}")
    if resolution > window_size and resolution % window_size:
        raise arguments.error(f"resolution must be divisible by window_size, got {resolution} and {window_size}: pad the image")
    if not 0 <= shift < window_size:
        raise arguments.error(f"shift must be in 0..window_size-1, got {shift} for windows of {window_size}")
    if prompt_owner not in PROMPT_OWNERS:
        raise arguments.error(f"prompt_owner must be one of {', '.join(PROMPT_OWNERS)}, got {prompt_owner!r}")
    arguments.sizes["H"], arguments.sizes["n"] = num_heads, min(window_size, resolution) ** 2
    arguments.tensor("position_bias", position_bias, "H n n")
    options: dict[str, Any] = {
        "num_prompts": num_prompts,
        "num_heads": num_heads,
        "resolution": resolution,
        "window_size": window_size,
        "shift": shift,
    }
    implementation = _WINDOW_PROMPT_ATTENTION.choose(impl, qkv, position_bias, **options, prompt_owner=prompt_owner)
    if implementation == "reference":
        return partial(reference.window_prompt_attention, **options, prompt_owner=prompt_owner)
    if resolution <= window_size:
        options |= {"window_size": resolution, "shift": 0}
    given = _Options(**options, owner_is_instance=prompt_owner == "instance")
    attend: Plan
    kernel = forward_kernel(implementation, "window_prompt_attention", direct)
    if any_needs_gradient(qkv, position_bias):
        attend = partial(WindowPromptAttentionFunction.apply, implementation, kernel, given)
    else:

        def attend(qkv: Tensor, position_bias: Tensor) -> Any:
            return kernel(qkv, position_bias, *given)

    if to_copy((qkv,)):
        return lambda qkv, position_bias: attend(qkv.contiguous(), position_bias)
    return attend
