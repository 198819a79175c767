"""Dynamic prompts: the mixture of the selected prompt experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._checks import Arguments, any_needs_gradient, first_derivative_only, last_dim_contiguous
from .impl import Operation, extension_check, reference_check, triton_check
from .prompts_details import _launch as _launch


class MixPromptsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, experts: Tensor, weights: Tensor, indices: Tensor, namespace: str) -> Tensor:
        ctx.save_for_backward(experts, weights, indices)
        ctx.ops = getattr(torch.ops, namespace)
        return ctx.ops.mix_prompts.default(experts, weights, indices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only("mix_prompts")
        experts, weights, indices = ctx.saved_tensors
        need_experts, need_weights = ctx.needs_input_grad[:2]
        grad_experts, grad_weights = ctx.ops.mix_prompts_backward.default(
            last_dim_contiguous(grads[0]), experts, weights, indices, need_experts, need_weights
        )
        return grad_experts if need_experts else None, grad_weights if need_weights else None, None, None


_MIX_PROMPTS = Operation(
    "mix_prompts",
    triton=lambda experts, weights, *_, **__: triton_check(experts, weights),
    cpu=lambda experts, weights, *_, **__: extension_check(experts, weights),
    reference=reference_check,
)


def mix_prompts(experts: Tensor, weights: Tensor, indices: Tensor, *, impl: str = "auto") -> Tensor:
    """P_d = sum_j w_j E_j over the selected experts.

    Args:
        experts: (K,P,D) prompt experts, floating point.
        weights: (B,k) routing weights, floating point (float32 from `route`).
        indices: (B,k) which expert each weight belongs to, integer; an expert may come twice.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        (B,P,D) dynamic prompts in the dtype of `experts`, accumulated in float32 (float64).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, an index is outside 0..K-1 (looked at on the CPU, elsewhere with
            MOPE_DEBUG=1), or `impl` cannot run.

    MoPE (arXiv 2403.10568), dynamic prompts.
    """
    arguments = Arguments("mix_prompts")
    arguments.tensor("experts", experts, "K P D")
    arguments.tensor("weights", weights, "B k")
    arguments.tensor("indices", indices, "B k", integer=True)
    arguments.indices("indices", indices, experts.shape[0])
    implementation = _MIX_PROMPTS.choose(impl, experts, weights, indices)
    if implementation == "reference":
        return reference.mix_prompts(experts, weights, indices)
    namespace = f"mope_{implementation}"
    laid_out = (last_dim_contiguous(experts), last_dim_contiguous(weights), last_dim_contiguous(indices.long()))
    if any_needs_gradient(experts, weights):
        return MixPromptsFunction.apply(*laid_out, namespace)
    return getattr(torch.ops, namespace).mix_prompts.default(*laid_out)
