"""Start of a routed block: residual add, router, mixture of prompts and LayerNorm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from ._checks import Arguments, any_needs_gradient, copied, first_derivative_only, last_dim_contiguous, to_copy
from ._ops import Kernel, backward_kernel, forward_kernel
from .add_norm import cpu_norm_check, triton_norm_check
from .impl import Check, Operation, reference_check
from .plans import Plan
from .prompted_norm_details import _launch as _launch
from .prompted_norm_details.spec import GRADIENTS, ROUTER, TENSORS
from .route import Routing, noise_gradient


class _Options(NamedTuple):
    """Non-tensor arguments of the raw op, in schema order."""

    num_replaced: int
    top_k: int
    temperature: float
    renormalize: bool
    eps: float
    norm_dtype: torch.dtype


class PromptedNormFunction(torch.autograd.Function):
    """Autograd of `prompted_norm`: (implementation, kernel, options, *tensors) -> total, normed, probs, weights, indices.

    The tensors are in schema order.
    """

    @staticmethod
    def forward(ctx: Any, implementation: str, kernel: Kernel, options: _Options, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        given = dict(zip(TENSORS, tensors, strict=True))
        needed = dict(zip(TENSORS, ctx.needs_input_grad[3:], strict=True))
        keep_pooled = needed["self_weight"] or needed["self_bias"] or needed["self_keys"]
        total, normed, probs, weights, indices, pooled = kernel(*tensors, *options, keep_pooled)
        used = (given["routing_weights"], given["routing_indices"]) if given["routing_weights"] is not None else (weights, indices)
        kept = ("weight", "experts", *ROUTER)
        ctx.save_for_backward(total, probs, *used, pooled, *(given[name] for name in kept))
        ctx.implementation, ctx.options = implementation, options
        ctx.dtypes = {name: None if t is None else t.dtype for name, t in given.items()}
        ctx.sizes = tuple(0 if t is None else t.shape[-2] for t in (given["x"], given["static"], given["mapped"]))
        ctx.routes = given["experts"] is not None and given["routing_weights"] is None
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return total, normed, probs, weights, indices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        first_derivative_only("prompted_norm")
        needed = dict(zip(TENSORS, ctx.needs_input_grad[3:], strict=True))
        x_dtype, update_dtype = ctx.dtypes["x"], ctx.dtypes["update"] or ctx.dtypes["x"]
        shared = x_dtype == update_dtype
        asked = needed | {"x": needed["x"] or (shared and needed["update"]), "update": needed["update"] and not shared}
        # The gradient of the noise is computed from that of the logits, whether or not cross_logits contribute to them.
        asked["cross_logits"] = needed["cross_logits"] or needed["noise"]
        num_rows, num_static, num_mapped = ctx.sizes
        # Without a router its outputs are placeholders; torch.compile still passes zeros as their gradients.
        grads = grads[: 4 if ctx.routes else 2] + (None,) * (0 if ctx.routes else 2)
        # A list: torch.compile restarts tracing when it reads strides here, and torch 2.14 then fails on a half-consumed generator.
        laid_out = [None if grad is None else last_dim_contiguous(grad) for grad in grads]
        found = backward_kernel(ctx.implementation, "prompted_norm_backward")(
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
            GRADIENTS.needs(asked),
        )
        gradients = dict(zip(GRADIENTS.names, found, strict=True))
        if shared:
            gradients["update"] = gradients["x"]
        if needed["noise"]:
            gradients["noise"] = noise_gradient(gradients["cross_logits"], ctx.options.temperature, ctx.dtypes["noise"])
        return None, None, None, *(gradients[name].to(ctx.dtypes[name]) if needed[name] else None for name in TENSORS)


def _check_with(norm_check: Callable[..., list[str]]) -> Check:
    """Return a check of all tensors except indices that collects the reasons why an implementation cannot run."""

    def check(x: Tensor, *tensors: Tensor | None, norm_dtype: torch.dtype | None = None, **others: Any) -> list[str]:
        routing: Routing | None = others.pop("routing", None)
        named = [t for t in others.values() if isinstance(t, Tensor)]
        return norm_check(x, norm_dtype or x.dtype, *tensors, *named, routing and routing.weights)

    return check


_PROMPTED_NORM = Operation(
    "prompted_norm", triton=_check_with(triton_norm_check), cpu=_check_with(cpu_norm_check), reference=reference_check
)


def _check_router(
    arguments: Arguments, named: dict[str, Any], routing: tuple[Any, Any] | None, top_k: int | None, temperature: float
) -> None:
    """Check the router's tensors against each other. Experts require a router or `routing`; without experts, both are errors."""
    experts, noise = named["experts"], named["noise"]
    arguments.tensor("experts", experts, "K P C")
    arguments.both_or_neither("self_weight", named["self_weight"], "self_keys", named["self_keys"])
    routed_by = [name for name in ("cross_logits", "self_weight") if named[name] is not None]
    if experts is None:
        decided_by = [*routed_by, *(name for name, value in (("routing", routing), ("noise", noise)) if value is not None)]
        if decided_by:
            raise arguments.error(f"{decided_by[0]} routes to experts, but there are none: pass experts")
        return
    if routing is not None and (routed_by or noise is not None):
        raise arguments.error(f"routing and {(routed_by or ['noise'])[0]} exclude each other: pass one of them")
    if routing is None and not routed_by:
        raise arguments.error("experts need cross_logits, self_weight and self_keys, or routing")
    if routing is None:
        arguments.tensor("self_weight", named["self_weight"], "s C")
        arguments.tensor("self_bias", named["self_bias"], "s")
        arguments.tensor("self_keys", named["self_keys"], "s K")
        if named["self_bias"] is not None and named["self_weight"] is None:
            raise arguments.error("self_bias belongs to self_weight: give both or neither")
        arguments.tensor("cross_logits", named["cross_logits"], "B K")
        arguments.tensor("noise", noise, "B K")
        arguments.top_k(top_k, experts.shape[0])
        arguments.positive("temperature", temperature)
    else:
        arguments.tensor("routing.weights", routing[0], "B k")
        arguments.tensor("routing.indices", routing[1], "B k", integer=True)


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
    """Add the update, route, replace the incoming prompts with the block's own, and normalize.

    s = x + update; r = route((mean(s) W' + b) keys + cross_logits, ...), with the mean over all N rows, including prompts;
    total = [static; sum_j r_j E_j; mapped; s without its first `num_replaced` rows]; normed = LayerNorm(total).
    From MoPE (arXiv 2403.10568), prompted Swin Transformer.

    Args:
        x: (B,N,C), floating point, the residual stream with prompts first.
        update: (B,N,C), the output of the previous branch. If None, nothing is added.
        weight: (C,) of the LayerNorm, or None.
        bias: (C,) of the LayerNorm, or None.
        num_replaced: Number of leading rows of x that are prompts to be replaced.
        static: (S,C), prompts that all items share.
        experts: (K,P,C), prompt experts; they require a router or `routing`.
        mapped: (B,M,C), prompts of each item.
        cross_logits: (B,K), the contribution of the complementary modality to the logits.
        self_weight: W (s,C), projects the mean of the block's own rows. Omit it and `self_keys` if the router sees only the other
            modality. Logits are float32 (float64).
        self_bias: b (s,) or None.
        self_keys: keys (s,K), required exactly if there is a `self_weight`.
        noise: As in `route`; differentiable.
        routing: A given routing, in place of the router.
        top_k: As in `route`.
        temperature: As in `route`.
        renormalize: As in `route`.
        eps: Positive, added to the variance.
        norm_dtype: dtype of `normed`, by default that of `total`.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        The triple (total, normed, routing). total and normed are (B,S+P+M+N-num_replaced,C); total has the dtype that x and
        update promote to. routing is None without experts.

    Raises:
        ValueError: Shapes, dtypes or devices do not match, `top_k` > K, or `impl` cannot run.
    """
    ready_made = (None, None) if routing is None else (routing.weights, routing.indices)
    tensors = (
        x,
        update,
        weight,
        bias,
        static,
        experts,
        mapped,
        cross_logits,
        self_weight,
        self_bias,
        self_keys,
        *ready_made,
        noise,
    )
    options = (num_replaced, top_k, temperature, renormalize, eps, norm_dtype, impl)
    total, normed, found = _PROMPTED_NORM.plans.run(_plan, tensors, options)
    return total, normed, routing if found is None else Routing(*found)


def _plan(direct: bool, *given: Any) -> Plan:
    """Plan a call. The plan maps the raw op's tensors to total, normed and, if it routes, (weights, indices, probs), else None."""
    *tensors, num_replaced, top_k, temperature, renormalize, eps, norm_dtype, impl = given
    named = dict(zip(TENSORS, tensors, strict=True))
    x, update, experts = named["x"], named["update"], named["experts"]
    routing = None if named["routing_weights"] is None else (named["routing_weights"], named["routing_indices"])
    arguments = Arguments("prompted_norm")
    _check(arguments, named, num_replaced)
    _check_router(arguments, named, routing, top_k, temperature)
    arguments.tensor("mapped", named["mapped"], "B M C")
    arguments.norm_dtype(norm_dtype)
    arguments.positive("eps", eps)
    others = {name: t for name, t in named.items() if name not in ("x", "routing_indices")}
    implementation = _PROMPTED_NORM.choose(impl, x, **others, norm_dtype=norm_dtype)
    if implementation == "reference":
        options = {
            "num_replaced": num_replaced,
            "top_k": top_k,
            "temperature": temperature,
            "renormalize": renormalize,
            "eps": eps,
            "norm_dtype": norm_dtype,
        }
        run: Plan = partial(_by_definition, options)
    else:
        dtype = norm_dtype or (x.dtype if update is None else torch.promote_types(x.dtype, update.dtype))
        given_options = _Options(num_replaced, top_k or 0, temperature, renormalize, eps, dtype)
        routes = experts is not None and routing is None
        run = _by_kernel(implementation, direct, given_options, tensors, routes)
    if routing is None or experts is None:
        return run
    num_experts = experts.shape[0]

    def planned(*tensors: Any) -> Any:
        # Checked in every call rather than once per plan, because this depends on values.
        arguments.indices("routing.indices", tensors[-2], num_experts)
        return run(*tensors)

    return planned


def _by_definition(options: dict[str, Any], *tensors: Any) -> Any:
    named = dict(zip(TENSORS, tensors, strict=True))
    weights, indices = named.pop("routing_weights"), named.pop("routing_indices")
    # (weights, indices, probs); the definition ignores the probs of a given routing.
    routing = None if weights is None else (weights, indices, weights)
    total, normed, found = reference.prompted_norm(**named, routing=routing, **options)
    return total, normed, None if routing is not None else found


def _by_kernel(implementation: str, direct: bool, options: _Options, tensors: Sequence[Tensor | None], routes: bool) -> Plan:
    indices, needs_gradient, copies = tensors[TENSORS.index("routing_indices")], any_needs_gradient(*tensors), to_copy(tensors)
    as_given = not copies and (indices is None or indices.dtype == torch.int64)
    kernel = forward_kernel(implementation, "prompted_norm", direct)

    def normalise(*tensors: Tensor | None) -> Any:
        laid_out: Sequence[Tensor | None] = tensors
        if not as_given:
            *others, indices, noise = tensors
            laid_out = copied((*others, None if indices is None else indices.long(), noise), copies)
        if needs_gradient:
            total, normed, probs, weights, indices = PromptedNormFunction.apply(implementation, kernel, options, *laid_out)
        else:
            total, normed, probs, weights, indices, _ = kernel(*laid_out, *options, False)
        return total, normed, (probs if options.top_k == 0 else weights, indices, probs) if routes else None

    return normalise


def _check(arguments: Arguments, named: dict[str, Any], num_replaced: int) -> None:
    arguments.tensor("x", named["x"], "B N C")
    arguments.tensor("update", named["update"], "B N C")
    if not 0 <= num_replaced <= named["x"].shape[1]:
        raise arguments.error(f"num_replaced must be between 0 and the {named['x'].shape[1]} rows of x, got {num_replaced}")
    arguments.tensor("weight", named["weight"], "C")
    arguments.tensor("bias", named["bias"], "C")
    arguments.tensor("static", named["static"], "S C")
