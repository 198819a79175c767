"""The router: softmax over experts, selection, and the loss that keeps their loads even."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from ._checks import Arguments, first_derivative_only, last_dim_contiguous
from .impl import Operation, extension_check, reference_check, triton_check
from .router_details import _launch as _launch


class Routing(NamedTuple):
    """How a batch was routed.

    weights: (B,k) weights of the selected experts, float32 (float64 for float64 logits), in descending order.
    indices: (B,k) the selected experts, int64; arange(K) in dense routing, where k = K.
    probs: (B,K) softmax over all experts, dtype of weights.
    """

    weights: Tensor
    indices: Tensor
    probs: Tensor


def dense_routing(probs: Tensor) -> Routing:
    """(B,K) -> the routing in which every expert takes part."""
    return Routing(probs, torch.arange(probs.shape[1], device=probs.device).expand_as(probs), probs)


def noise_gradient(grad_logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """The gradient of the noise, which is added to logits / temperature: from that of the logits, in float32."""
    return (grad_logits * temperature).to(dtype)


class RouteFunction(torch.autograd.Function):
    """(namespace, logits, noise, and the options of the raw op) -> probs, weights, indices."""

    @staticmethod
    def forward(
        ctx: Any, namespace: str, logits: Tensor, noise: Tensor | None, top_k: int, temperature: float, renormalize: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.ops = getattr(torch.ops, namespace)
        probs, weights, indices = ctx.ops.route.default(logits, noise, top_k, temperature, renormalize)
        ctx.save_for_backward(probs, weights, indices)
        ctx.temperature, ctx.renormalize = temperature, renormalize
        ctx.dtype, ctx.noise_dtype = logits.dtype, None if noise is None else noise.dtype
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return probs, weights, indices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        first_derivative_only("route")
        grad_probs, grad_weights, _ = grads
        need_logits, need_noise = ctx.needs_input_grad[1:3]
        if not (need_logits or need_noise) or (grad_probs is None and grad_weights is None):
            return (None,) * 6
        probs, weights, indices = ctx.saved_tensors
        grad_logits = ctx.ops.route_backward.default(
            grad_probs, grad_weights, probs, weights, indices, ctx.temperature, ctx.renormalize
        )
        grad_noise = noise_gradient(grad_logits, ctx.temperature, ctx.noise_dtype) if need_noise else None
        return None, grad_logits.to(ctx.dtype) if need_logits else None, grad_noise, None, None, None


def _cpu_check(logits: Tensor, noise: Tensor | None = None, **_: Any) -> list[str]:
    return extension_check(*(t for t in (logits, noise) if t is not None))


_ROUTE = Operation("route", triton=lambda logits, **_: triton_check(logits), cpu=_cpu_check, reference=reference_check)


def check_routing(
    arguments: Arguments, logits: Tensor, noise: Tensor | None, top_k: int | None, temperature: float, batch: str = "B"
) -> None:
    """The checks that every routed op shares."""
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
    """Route a batch: r = softmax(logits / temperature + noise), and the `top_k` experts of each item.

    Args:
        logits: (B,K), floating point.
        top_k: how many experts to select, by logits / temperature + noise; ties go to the lowest index. None: all, in order.
        temperature: positive, a number: to learn one, divide the logits by it.
        noise: (B,K), floating point, added after the temperature; differentiable, so it may be learned.
        renormalize: divide the selected weights by their sum. With `top_k=1` the router then gets no gradient through them.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        `Routing`. Gradients flow through weights and probs to logits and noise. A row that holds NaN has NaN weights and
        indices 0..k-1.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, `top_k` > K, `temperature` is a tensor that requires a gradient, or `impl`
            cannot run.

    MoPE (arXiv 2403.10568), the multimodal router.
    """
    check_routing(Arguments("route"), logits, noise, top_k, temperature)
    implementation = _ROUTE.choose(impl, logits, noise=noise)
    if implementation == "reference":
        return Routing(*reference.route(logits, top_k=top_k, temperature=temperature, noise=noise, renormalize=renormalize))
    noise = None if noise is None else last_dim_contiguous(noise)
    probs, weights, indices = RouteFunction.apply(
        f"mope_{implementation}", last_dim_contiguous(logits), noise, top_k or 0, temperature, renormalize
    )
    return dense_routing(probs) if top_k is None else Routing(weights, indices, probs)


class ImportanceLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, namespace: str, probs: Tensor, threshold: float) -> Tensor:
        ctx.ops = getattr(torch.ops, namespace)
        loss, load = ctx.ops.importance_loss.default(probs, threshold)
        ctx.save_for_backward(load)
        ctx.threshold, ctx.shape, ctx.dtype = threshold, probs.shape, probs.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        first_derivative_only("importance_loss")
        (load,) = ctx.saved_tensors
        grad_load = ctx.ops.importance_loss_backward.default(grads[0], load, ctx.threshold)
        return None, grad_load.to(ctx.dtype)[:, None].expand(ctx.shape), None


_IMPORTANCE_LOSS = Operation(
    "importance_loss",
    triton=lambda probs, **_: triton_check(probs),
    cpu=lambda probs, **_: extension_check(probs),
    reference=reference_check,
)


def importance_loss(probs: Tensor, *, threshold: float = 0.1, impl: str = "auto") -> Tensor:
    """How uneven the experts' loads are: CV^2 = var(I) / mean(I)^2 of I = sum over the batch of probs, unbiased variance.

    Args:
        probs: (B,K) softmax over all experts, `Routing.probs`; or (L,B,K), those of L blocks, in one launch.
        threshold: a CV^2 up to this counts as even: the loss is 0 and so is its gradient. No device sync.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        () or (L,), float32 (float64 for float64 probs). 0, with zero gradient, for K = 1 or B = 0.

    Raises:
        ValueError: `probs` is not floating point or has other axes, or `impl` cannot run.

    MoPE (arXiv 2403.10568), importance loss; the released code's unbiased variance.
    """
    arguments = Arguments("importance_loss")
    arguments.tensor("probs", probs, "L B K" if probs.dim() == 3 else "B K")
    arguments.number("threshold", threshold)
    implementation = _IMPORTANCE_LOSS.choose(impl, probs)
    if implementation == "reference":
        return reference.importance_loss(probs, threshold=threshold)
    blocks = last_dim_contiguous(probs if probs.dim() == 3 else probs[None])
    loss = ImportanceLossFunction.apply(f"mope_{implementation}", blocks, threshold)
    return loss if probs.dim() == 3 else loss[0]
