"""Dynamic prompts: a mixture of the selected prompt experts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._checks import Arguments, any_needs_gradient, first_derivative_only, last_dim_contiguous, to_copy
from ._ops import Kernel, backward_kernel, forward_kernel
from .impl import Operation, extension_check, reference_check, triton_check
from .mix_prompts_details import _launch as _launch
from .mix_prompts_details.spec import GRADIENTS
from .plans import Plan


class MixPromptsFunction(torch.autograd.Function):
    """Autograd of `mix_prompts`: (implementation, kernel, experts, weights, indices) -> out."""

    @staticmethod
    def forward(ctx: Any, implementation: str, kernel: Kernel, experts: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(experts, weights, indices)
        ctx.implementation = implementation
        return kernel(experts, weights, indices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only("mix_prompts")
        experts, weights = ctx.needs_input_grad[2:4]
        needs = GRADIENTS.needs({"experts": experts, "weights": weights})
        kernel = backward_kernel(ctx.implementation, "mix_prompts_backward")
        grad_experts, grad_weights = kernel(last_dim_contiguous(grads[0]), *ctx.saved_tensors, needs)
        return None, None, grad_experts if experts else None, grad_weights if weights else None, None


_MIX_PROMPTS = Operation(
    "mix_prompts",
    triton=lambda experts, weights, *_, **__: triton_check(experts, weights),
    cpu=lambda experts, weights, *_, **__: extension_check(experts, weights),
    reference=reference_check,
)


def mix_prompts(experts: Tensor, weights: Tensor, indices: Tensor, *, impl: str = "auto") -> Tensor:
    """Mix the selected experts into dynamic prompts: P_d = sum_j w_j E_j, from MoPE (arXiv 2403.10568).

    Args:
        experts: (K,P,D) prompt experts, floating point.
        weights: (B,k) routing weights, floating point (float32 from `route`).
        indices: (B,k) integer, the expert that each weight belongs to. An expert may occur more than once.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        (B,P,D) dynamic prompts in the dtype of `experts`, accumulated in float32 (float64).

    Raises:
        ValueError: Shapes, dtypes or devices do not match, an index is outside 0..K-1 (checked on the CPU, elsewhere only with
            MOPE_DEBUG=1), or `impl` cannot run.
    """
    return _MIX_PROMPTS.plans.run(_plan, (experts, weights, indices), (impl,))


def _plan(direct: bool, experts: Tensor, weights: Tensor, indices: Tensor, impl: str) -> Plan:
    arguments = Arguments("mix_prompts")
    arguments.tensor("experts", experts, "K P D")
    arguments.tensor("weights", weights, "B k")
    arguments.tensor("indices", indices, "B k", integer=True)
    bound = experts.shape[0]
    implementation = _MIX_PROMPTS.choose(impl, experts, weights, indices)
    run: Plan
    if implementation == "reference":
        run = reference.mix_prompts
    else:
        run = forward_kernel(implementation, "mix_prompts", direct)
        if any_needs_gradient(experts, weights):
            run = partial(MixPromptsFunction.apply, implementation, run)

    as_given = implementation == "reference" or (indices.dtype == torch.int64 and not to_copy((experts, weights, indices)))

    def planned(experts: Tensor, weights: Tensor, indices: Tensor) -> Any:
        # Checked in every call rather than once per plan, because this depends on values.
        arguments.indices("indices", indices, bound)
        if not as_given:
            experts, weights, indices = map(last_dim_contiguous, (experts, weights, indices.long()))
        return run(experts, weights, indices)

    return planned if arguments.may_read(indices) or not as_given else run
