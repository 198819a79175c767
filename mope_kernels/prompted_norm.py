"""The beginning of a routed block: residual add, router, mixture of prompts, LayerNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from ._checks import Arguments, any_needs_gradient, first_derivative_only, last_dim_contiguous
from ._ops import PROMPTED_NORM_GRADIENTS
from .impl import Check, Operation, reference_check
from .norm import cpu_norm_check, triton_norm_check
from .prompted_norm_details import _launch as _launch
from .router import Routing, noise_gradient


class _Options(NamedTuple):
    """What is no tensor, in the order of the raw op's schema."""

    num_replaced: int
    top_k: int
    temperature: float
    renormalize: bool
    eps: float
    norm_dtype: torch.dtype


# The tensors of the raw op, in the order of its schema.
_TENSORS = (*PROMPTED_NORM_GRADIENTS, "routing_indices", "noise")


class PromptedNormFunction(torch.autograd.Function):
    """(namespace, options, *tensors) -> total, normed, probs, weights, indices; the tensors in the order of the raw op's schema."""

    @staticmethod
    def forward(ctx: Any, namespace: str, options: _Options, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.ops, ctx.options = getattr(torch.ops, namespace), options
        given = dict(zip(_TENSORS, tensors, strict=True))
        needed = dict(zip(_TENSORS, ctx.needs_input_grad[2:], strict=True))
        keep_pooled = needed["self_weight"] or needed["self_bias"] or needed["self_keys"]
        total, normed, probs, weights, indices, pooled = ctx.ops.prompted_norm.default(*tensors, *options, keep_pooled)
        used = (given["routing_weights"], given["routing_indices"]) if given["routing_weights"] is not None else (weights, indices)
        kept = ("weight", "experts", "self_weight", "self_bias", "self_keys")
        ctx.save_for_backward(total, probs, *used, pooled, *(given[name] for name in kept))
        ctx.dtypes = {name: None if t is None else t.dtype for name, t in given.items()}
        ctx.sizes = tuple(0 if t is None else t.shape[-2] for t in (given["x"], given["static"], given["mapped"]))
        ctx.routes = given["experts"] is not None and given["routing_weights"] is None
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return total, normed, probs, weights, indices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        first_derivative_only("prompted_norm")
        needed = dict(zip(_TENSORS, ctx.needs_input_grad[2:], strict=True))
        x_dtype, update_dtype = ctx.dtypes["x"], ctx.dtypes["update"] or ctx.dtypes["x"]
        shared = x_dtype == update_dtype
        asked = needed | {"x": needed["x"] or (shared and needed["update"]), "update": needed["update"] and not shared}
        # That of the logits, which the gradient of the noise is made of, whether psi is a part of them or not.
        asked["cross_logits"] = needed["cross_logits"] or needed["noise"]
        num_rows, num_static, num_mapped = ctx.sizes
        # Without a router nothing comes out of one, and torch.compile gives zeros of the shape of what stands there.
        grads = grads[: 4 if ctx.routes else 2] + (None,) * (0 if ctx.routes else 2)
        # A list: torch.compile begins again where it meets strides here, and torch 2.14 then trips over a generator left half-way.
        laid_out = [None if grad is None else last_dim_contiguous(grad) for grad in grads]
        found = ctx.ops.prompted_norm_backward.default(
            *laid_out,
            *ctx.saved_tensors,
            num_rows,
            ctx.options.num_replaced,
            num_static,
            num_mapped,
            ctx.options.temperature,
            ctx.options.renormalize,
            ctx.options.eps,
            x_dtype,
            update_dtype,
            sum(asked[name] << bit for bit, name in enumerate(PROMPTED_NORM_GRADIENTS)),
        )
        gradients = dict(zip(PROMPTED_NORM_GRADIENTS, found, strict=True))
        if shared:
            gradients["update"] = gradients["x"]
        if needed["noise"]:
            gradients["noise"] = noise_gradient(gradients["cross_logits"], ctx.options.temperature, ctx.dtypes["noise"])
        return None, None, *(gradients[name].to(ctx.dtypes[name]) if needed[name] else None for name in _TENSORS)


def _check_with(norm_check: Callable[..., list[str]]) -> Check:
    """What speaks against an implementation, of all tensors but indices."""

    def check(x: Tensor, *tensors: Tensor | None, norm_dtype: torch.dtype | None = None, **others: Any) -> list[str]:
        routing: Routing | None = others.pop("routing", None)
        named = [t for t in others.values() if isinstance(t, Tensor)]
        return norm_check(x, norm_dtype or x.dtype, *tensors, *named, routing and routing.weights)

    return check


_PROMPTED_NORM = Operation(
    "prompted_norm", triton=_check_with(triton_norm_check), cpu=_check_with(cpu_norm_check), reference=reference_check
)


def _check_router(
    arguments: Arguments,
    experts: Tensor | None,
    cross_logits: Tensor | None,
    self_weight: Tensor | None,
    self_bias: Tensor | None,
    self_keys: Tensor | None,
    noise: Tensor | None,
    routing: Routing | None,
    top_k: int | None,
    temperature: float,
) -> None:
    """Experts have exactly one of a router and a routing; without experts there is neither."""
    arguments.tensor("experts", experts, "K P C")
    arguments.both_or_neither("self_weight", self_weight, "self_keys", self_keys)
    routed_by = [name for name, value in (("cross_logits", cross_logits), ("self_weight", self_weight)) if value is not None]
    if experts is None:
        decided_by = [*routed_by, *(name for name, value in (("routing", routing), ("noise", noise)) if value is not None)]
        if decided_by:
            raise arguments.error(f"{decided_by[0]} routes to experts, and there are none: give experts")
        return
    if routing is not None and (routed_by or noise is not None):
        raise arguments.error(f"routing is given ready-made, and {(routed_by or ['noise'])[0]} too: give one of them")
    if routing is None and not routed_by:
        raise arguments.error("experts need cross_logits, self_weight and self_keys, or routing")
    if routing is None:
        arguments.tensor("self_weight", self_weight, "s C")
        arguments.tensor("self_bias", self_bias, "s")
        arguments.tensor("self_keys", self_keys, "s K")
        if self_bias is not None and self_weight is None:
            raise arguments.error("self_bias belongs to self_weight: give both or neither")
        arguments.tensor("cross_logits", cross_logits, "B K")
        arguments.tensor("noise", noise, "B K")
        arguments.top_k(top_k, experts.shape[0])
        arguments.positive("temperature", temperature)
    else:
        arguments.tensor("routing.weights", routing.weights, "B k")
        arguments.tensor("routing.indices", routing.indices, "B k", integer=True)
        arguments.indices("routing.indices", routing.indices, experts.shape[0])


def prompted_norm(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    num_replaced: int,
    static: Tensor | None = None,
    experts: Tensor | None = None,
    mapped: Tensor | None = None,
    cross_logits: Tensor | None = None,
    self_weight: Tensor | None = None,
    self_bias: Tensor | None = None,
    self_keys: Tensor | None = None,
    noise: Tensor | None = None,
    routing: Routing | None = None,
    top_k: int | None = None,
    temperature: float = 1.0,
    renormalize: bool = False,
    eps: float = 1e-5,
    norm_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Routing | None]:
    """Add, route, put the block's own prompts in place of those that arrive, normalise.

    s = x + update; r = route((mean(s) W' + b) keys + cross_logits, ...), mean over all N rows, those of prompts too;
    total = [static; sum_j r_j E_j; mapped; s without its first `num_replaced` rows]; normed = LayerNorm(total).

    Args:
        x: (B,N,C), floating point: the residual stream, prompts first.
        update: (B,N,C), what the last branch adds to it; None: nothing.
        weight, bias: (C,) of the LayerNorm, or None.
        num_replaced: how many of the N rows are prompts that go.
        static: (S,C), prompts that all items share.
        experts: (K,P,C), prompt experts; they need a router or `routing`.
        mapped: (B,M,C), prompts of each item.
        cross_logits: (B,K), what the complementary modality adds to the logits.
        self_weight, self_bias, self_keys: (s,C), (s,), (s,K): the router's view of the block's own rows. Logits are
            float32 (float64). `self_bias` may be left out, and all three where the router sees the other modality only.
        noise, top_k, temperature, renormalize: as in `route`; noise is differentiable.
        routing: ready-made, in place of the router.
        eps: added to the variance, positive.
        norm_dtype: of `normed`; that of `total` if None.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        total (B,S+P+M+N-num_replaced,C) in the dtype that x and update promote to; normed, the same shape; the `Routing`, None
        without experts.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, `top_k` > K, or `impl` cannot run.

    MoPE (arXiv 2403.10568), prompted Swin Transformer.
    """
    arguments = Arguments("prompted_norm")
    arguments.tensor("x", x, "B N C")
    arguments.tensor("update", update, "B N C")
    if not 0 <= num_replaced <= x.shape[1]:
        raise arguments.error(f"num_replaced must be between 0 and the {x.shape[1]} rows of x, got {num_replaced}")
    arguments.tensor("weight", weight, "C")
    arguments.tensor("bias", bias, "C")
    arguments.tensor("static", static, "S C")
    _check_router(arguments, experts, cross_logits, self_weight, self_bias, self_keys, noise, routing, top_k, temperature)
    arguments.tensor("mapped", mapped, "B M C")
    arguments.norm_dtype(norm_dtype)
    arguments.positive("eps", eps)
    tensors = {
        "static": static,
        "experts": experts,
        "mapped": mapped,
        "cross_logits": cross_logits,
        "self_weight": self_weight,
        "self_bias": self_bias,
        "self_keys": self_keys,
    }
    implementation = _PROMPTED_NORM.choose(
        impl, x, update, weight, bias, **tensors, noise=noise, routing=routing, norm_dtype=norm_dtype
    )
    if implementation == "reference":
        total, normed, found = reference.prompted_norm(
            x,
            update,
            weight,
            bias,
            num_replaced=num_replaced,
            **tensors,
            noise=noise,
            routing=routing,
            top_k=top_k,
            temperature=temperature,
            renormalize=renormalize,
            eps=eps,
            norm_dtype=norm_dtype,
        )
        return total, normed, found if found is None else Routing(*found)
    if norm_dtype is None:
        norm_dtype = x.dtype if update is None else torch.promote_types(x.dtype, update.dtype)
    given = (None, None) if routing is None else (routing.weights, routing.indices.long())
    inputs = (x, update, weight, bias, *tensors.values(), *given, noise)
    namespace, options = f"mope_{implementation}", _Options(num_replaced, top_k or 0, temperature, renormalize, eps, norm_dtype)
    laid_out = [None if t is None else last_dim_contiguous(t) for t in inputs]
    if any_needs_gradient(*laid_out):
        total, normed, probs, weights, indices = PromptedNormFunction.apply(namespace, options, *laid_out)
    else:
        total, normed, probs, weights, indices, _ = getattr(torch.ops, namespace).prompted_norm.default(*laid_out, *options, False)
    if experts is None or routing is not None:
        return total, normed, routing
    return total, normed, Routing(probs if top_k is None else weights, indices, probs)
