"""Router: softmax over experts, and selection of the top k."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from ._checks import Arguments, any_needs_gradient, copied, first_derivative_only, to_copy
from ._ops import Kernel, backward_kernel, forward_kernel
from .impl import Operation, extension_check, reference_check, triton_check
from .plans import Plan
from .route_details import _launch as _launch


class Routing(NamedTuple):
    """Routing of a batch.

    Attributes:
        weights: (B,k) weights of the selected experts, float32 (float64 for float64 logits). In descending order with top-k; in the
            order of the experts in dense routing.
        indices: (B,k) the selected experts, int64; arange(K) in dense routing, for which k = K.
        probs: (B,K) softmax over all experts, dtype of weights.
    """

    weights: Tensor
    indices: Tensor
    probs: Tensor


def dense_routing(probs: Tensor) -> Routing:
    """Return the routing that uses every expert, from probs (B,K)."""
    return Routing(probs, torch.arange(probs.shape[1], device=probs.device).expand_as(probs), probs)


def noise_gradient(grad_logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """Compute the gradient of the noise from the float32 gradient of the logits: noise is added to logits / temperature."""
    return (grad_logits * temperature).to(dtype)


class _Options(NamedTuple):
    """Non-tensor arguments of the raw op, in schema order."""

    top_k: int
    temperature: float
    renormalize: bool


class RouteFunction(torch.autograd.Function):
    """Autograd of `route`: (implementation, kernel, options of the raw op, logits, noise) -> probs, weights, indices."""

    @staticmethod
    def forward(
        ctx: Any, implementation: str, kernel: Kernel, options: _Options, logits: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        probs, weights, indices = kernel(logits, noise, *options)
        ctx.save_for_backward(probs, weights, indices)
        ctx.implementation, ctx.options = implementation, options
        ctx.dtype, ctx.noise_dtype = logits.dtype, None if noise is None else noise.dtype
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return probs, weights, indices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        first_derivative_only("route")
        grad_probs, grad_weights, _ = grads
        need_logits, need_noise = ctx.needs_input_grad[3:]
        if not (need_logits or need_noise) or (grad_probs is None and grad_weights is None):
            return (None,) * 5
        _, temperature, renormalize = ctx.options
        grad_logits = backward_kernel(ctx.implementation, "route_backward")(
            grad_probs, grad_weights, *ctx.saved_tensors, temperature, renormalize
        )
        grad_noise = noise_gradient(grad_logits, temperature, ctx.noise_dtype) if need_noise else None
        return None, None, None, grad_logits.to(ctx.dtype) if need_logits else None, grad_noise


def _cpu_check(logits: Tensor, noise: Tensor | None = None, **_: Any) -> list[str]:
    return extension_check(*(t for t in (logits, noise) if t is not None))


_ROUTE = Operation("route", triton=lambda logits, **_: triton_check(logits), cpu=_cpu_check, reference=reference_check)


def check_routing(
    arguments: Arguments, logits: Tensor, noise: Tensor | None, top_k: int | None, temperature: float, batch: str = "B"
) -> None:
    """Check the arguments that all routed ops share."""
    arguments.tensor("logits", logits, f"{batch} K")
    arguments.tensor("noise", noise, f"{batch} K")
    arguments.top_k(top_k, logits.shape[1])
    arguments.positive("temperature", temperature)


def route(
    logits: Tensor,
    *,
    top_k: int | None = None,
    temperature: float = 1.0,
    noise: Tensor | None = None,
    renormalize: bool = False,
    impl: str = "auto",
) -> Routing:
    """Route a batch: compute softmax(logits / temperature + noise) and select the `top_k` experts of each item.

    This is the multimodal router of MoPE (arXiv 2403.10568).

    Args:
        logits: (B,K), floating point.
        top_k: Number of experts to select by logits / temperature + noise; ties go to the lowest index. None selects all, in
            index order.
        temperature: Positive number. To learn a temperature, divide the logits by it instead.
        noise: (B,K), floating point, added after the temperature; differentiable, so it may be learned.
        renormalize: Divide the selected weights by their sum. With `top_k=1` the router then gets no gradient through them.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        `Routing`. Gradients flow through weights and probs to logits and noise. A row that contains NaN gets NaN weights and
        indices 0..k-1.

    Raises:
        ValueError: Shapes, dtypes or devices do not match, `top_k` > K, `temperature` is a tensor that requires a gradient, or
            `impl` cannot run.
    """
    return _ROUTE.plans.run(_plan, (logits, noise), (top_k, temperature, renormalize, impl))


def _plan(
    direct: bool, logits: Tensor, noise: Tensor | None, top_k: int | None, temperature: float, renormalize: bool, impl: str
) -> Plan:
    check_routing(Arguments("route"), logits, noise, top_k, temperature)
    implementation = _ROUTE.choose(impl, logits, noise=noise)
    if implementation == "reference":
        options: dict[str, Any] = {"top_k": top_k, "temperature": temperature, "renormalize": renormalize}
        return lambda logits, noise: Routing(*reference.route(logits, noise=noise, **options))
    given = _Options(top_k or 0, temperature, renormalize)
    kernel = forward_kernel(implementation, "route", direct)
    if any_needs_gradient(logits, noise):
        run: Plan = partial(RouteFunction.apply, implementation, kernel, given)
    else:

        def run(logits: Tensor, noise: Tensor | None) -> Any:
            return kernel(logits, noise, *given)

    copies = to_copy((logits, noise))

    def planned(*given: Tensor | None) -> Routing:
        probs, weights, indices = run(*(copied(given, copies) if copies else given))
        return dense_routing(probs) if top_k is None else Routing(weights, indices, probs)

    return planned
