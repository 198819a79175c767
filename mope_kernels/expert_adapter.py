"""ModeX: a bottleneck adapter whose up-projections are routed per token."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from ._checks import Arguments, any_needs_gradient, first_derivative_only, last_dim_contiguous, to_copy
from ._ops import Kernel, backward_kernel, forward_kernel
from .expert_adapter_details import _launch as _launch
from .expert_adapter_details.spec import GRADIENTS, PARAMETERS
from .impl import Operation, extension_check, reference_check, triton_check
from .plans import Plan

ACTIVATIONS = ("relu", "gelu")
# Limits of the Triton kernels, which hold this much for each row.
MAX_EXPERTS, MAX_BOTTLENECK = 8, 64


class _Options(NamedTuple):
    """Non-tensor arguments of the raw op, in schema order."""

    temperature: float
    is_gelu: bool
    dropout_p: float


class ExpertAdapterFunction(torch.autograd.Function):
    """Autograd of `expert_adapter`.

    (implementation, kernel, options, whether to return the weights, x (T,d), parameters, seed) -> out, weights. Only the inputs
    are saved for backward.
    """

    @staticmethod
    def forward(
        ctx: Any, implementation: str, kernel: Kernel, options: _Options, return_weights: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.implementation, ctx.options, ctx.return_weights = implementation, options, return_weights
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        out, weights = kernel(*tensors, *options, return_weights)
        if not return_weights:
            ctx.mark_non_differentiable(weights)
        return out, weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        first_derivative_only("expert_adapter")
        tensors = ctx.saved_tensors
        # If the weights were not requested, they are a placeholder; torch.compile still passes zeros as its gradient.
        grad_out, grad_weights = grads[0], grads[1] if ctx.return_weights else None
        grad_out = torch.zeros_like(tensors[0]) if grad_out is None else last_dim_contiguous(grad_out)
        # The tensors follow four other arguments; the seed comes last and has no gradient.
        asked = dict(zip(GRADIENTS.names, ctx.needs_input_grad[4:-1], strict=True))
        found = backward_kernel(ctx.implementation, "expert_adapter_backward")(
            grad_out, grad_weights, *tensors, *ctx.options, GRADIENTS.needs(asked)
        )
        return *(None,) * 4, *(grad if need else None for grad, need in zip(found, asked.values(), strict=True)), None


def _triton_check(x: Tensor, down_weight: Tensor, down_bias: Tensor, up_weight: Tensor, *_: Any, **__: Any) -> list[str]:
    reasons = triton_check(x, down_weight)
    if up_weight.shape[0] > MAX_EXPERTS or up_weight.shape[2] > MAX_BOTTLENECK:
        most, got = f"E <= {MAX_EXPERTS} and r <= {MAX_BOTTLENECK}", f"E={up_weight.shape[0]} and r={up_weight.shape[2]}"
        reasons.append(f"the Triton kernels are made for {most}, got {got}")
    return reasons


def _cpu_check(x: Tensor, down_weight: Tensor, *_: Any, dropout_p: float = 0.0, **__: Any) -> list[str]:
    reasons = extension_check(x, down_weight)
    if dropout_p:
        reasons.append("the C++ kernel has no dropout")
    return reasons


_EXPERT_ADAPTER = Operation("expert_adapter", triton=_triton_check, cpu=_cpu_check, reference=reference_check)


def expert_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    router_weight: Tensor | None = None,
    router_bias: Tensor | None = None,
    *,
    temperature: float = 10.0,
    activation: str = "relu",
    dropout_p: float = 0.0,
    return_weights: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Apply a residual adapter with routed up-projections to each token.

    out = x + sum_e w_e (U_e h + b_e) with h = activation(W x + b) and w = softmax((R x + c) / temperature). For backward only
    the arguments are saved; h is recomputed. From ModeX (Sci. China Inf. Sci. 67(12) 220107), modality-expert coordinator.

    Args:
        x: (..., d), floating point.
        down_weight: W (r,d), floating point. All parameters share its dtype; they may be rounded to the dtype of x.
        down_bias: b (r,).
        up_weight: U (E,d,r).
        up_bias: (E,d).
        router_weight: R (E,d). Without a router there must be one expert: a plain adapter.
        router_bias: c (E,); required exactly if there is a `router_weight`.
        temperature: Positive.
        activation: "relu" or "gelu" (exact).
        dropout_p: Dropout probability for h.
        return_weights: Also return the routing weights, which are all 1 without a router.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        (..., d) in the dtype of x, including the residual; with `return_weights` also (..., E) float32 (float64).

    Raises:
        ValueError: Shapes, dtypes or devices do not match, or `impl` cannot run.
    """
    tensors = (x, down_weight, down_bias, up_weight, up_bias, router_weight, router_bias)
    return _EXPERT_ADAPTER.plans.run(_plan, tensors, (temperature, activation, dropout_p, return_weights, impl))


def _plan(direct: bool, x: Tensor, *given: Any) -> Plan:
    *parameters, temperature, activation, dropout_p, return_weights, impl = given
    by_name = dict(zip(PARAMETERS, parameters, strict=True))
    up_weight, router_weight = by_name["up_weight"], by_name["router_weight"]
    arguments = Arguments("expert_adapter")
    arguments.rows("x", x, "T d")
    for (name, value), axes in zip(by_name.items(), ("r d", "r", "E d r", "E d", "E d", "E"), strict=True):
        arguments.tensor(name, value, axes, dtype=by_name["down_weight"].dtype)
    arguments.both_or_neither("router_weight", router_weight, "router_bias", by_name["router_bias"])
    if router_weight is None and up_weight.shape[0] != 1:
        raise arguments.error(f"{up_weight.shape[0]} experts need router_weight and router_bias; without a router there is one")
    if activation not in ACTIVATIONS:
        raise arguments.error(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    arguments.positive("temperature", temperature)
    arguments.probability("dropout_p", dropout_p)
    implementation = _EXPERT_ADAPTER.choose(impl, x, *parameters, dropout_p=dropout_p)
    if implementation == "reference":
        adapt = partial(reference.expert_adapter, temperature=temperature, activation=activation, dropout_p=dropout_p)
        return adapt if return_weights else lambda *tensors: adapt(*tensors)[0]

    options = _Options(temperature, activation == "gelu", dropout_p)
    routed = return_weights and router_weight is not None
    run: Plan
    kernel = forward_kernel(implementation, "expert_adapter", direct)
    if any_needs_gradient(x, *parameters):
        run = partial(ExpertAdapterFunction.apply, implementation, kernel, options, routed)
    else:

        def run(*tensors: Tensor | None) -> Any:
            return kernel(*tensors, *options, routed)

    shape = x.shape
    if x.dim() == 2 and not to_copy((x,)) and not dropout_p and not return_weights:
        return lambda *tensors: run(*tensors, None)[0]

    def planned(x: Tensor, *parameters: Tensor | None) -> Any:
        # The seed is a new tensor on the device, which needs no sync and can be replaced for a graph replay.
        seed = torch.randint(2**62, (1,), device=x.device) if dropout_p else None
        out, weights = run(last_dim_contiguous(x.reshape(-1, shape[-1])), *parameters, seed)
        if not return_weights:
            return out.view(shape)
        if not routed:
            return out.view(shape), x.new_ones(*shape[:-1], 1, dtype=reference.statistics_dtype(x))
        return out.view(shape), weights.view(*shape[:-1], weights.shape[1])

    return planned
