"""Routing, gathering from the expert bank, and attention over prompts and tokens, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, NamedTuple

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
from .impl import Operation, extension_check, reference_check
from .mope_attention_details import _launch as _launch
from .mope_attention_details.spec import GRADIENTS, INSTANCE, TENSORS
from .plans import Plan
from .prompt_attention import check_attention, triton_attention_check
from .prompt_attention_details import _libraries
from .route import Routing, check_routing, dense_routing, noise_gradient


@dataclass(frozen=True, eq=False)
class ExpertBank:
    """Prompt experts projected to the keys and values of one frozen layer, once for all instances.

    Prompts enter attention only through the layer's W_k and W_v, and projection is linear, so a mixture of projected experts is
    the projection of their mixture. If the layer first normalizes its input, `gram` provides the variance of the mixture:
    LN(sum_j w_j E_j) = gamma * (sum_j w_j Ec_j) / sqrt(w' G_p w + eps) + beta.

    Args:
        key: (K,H,P,D), W (gamma * Ec_j), or W E_j without LayerNorm. Keep it in float32: if experts nearly cancel, a bfloat16 bank
            is off by several percent.
        value: (K,H,P,D), likewise.
        gram: (P,K,K) float32, G_p[i,j] = <Ec_i[p], Ec_j[p]> / d for the centered experts Ec, where d is the model width. None if
            there is no LayerNorm.
        key_offset: (H,D), W beta + b.
        value_offset: (H,D), likewise.
        eps: Epsilon of the LayerNorm.
    """

    key: Tensor
    value: Tensor
    _: KW_ONLY
    gram: Tensor | None = None
    key_offset: Tensor | None = None
    value_offset: Tensor | None = None
    eps: float = 1e-5


class _Options(NamedTuple):
    """Non-tensor arguments of the raw op, in schema order."""

    top_k: int
    temperature: float
    renormalize: bool
    eps: float
    scale: float
    dropout_p: float


class MoPEAttentionFunction(torch.autograd.Function):
    """Autograd of `mope_attention`: (implementation, kernel, options, *tensors) -> out, probs, weights, indices.

    The tensors are in schema order.
    """

    @staticmethod
    def forward(ctx: Any, implementation: str, kernel: Kernel, options: _Options, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        out, lse, probs, weights, indices = kernel(*tensors, *options)
        ctx.implementation, ctx.options = implementation, options
        ctx.save_for_backward(out, lse, probs, weights, indices, *tensors)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return out, probs, weights, indices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        first_derivative_only("mope_attention")
        grad_out, grad_probs, grad_weights, _ = grads
        out, lse, probs, weights, indices, *tensors = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        needed = dict(zip(TENSORS, ctx.needs_input_grad[3:], strict=True))
        # The gradient of the noise is computed from that of the logits.
        asked = needed | {"logits": needed["logits"] or needed["noise"]}
        found = backward_kernel(ctx.implementation, "mope_attention_backward")(
            last_dim_contiguous(grad_out),
            None if grad_probs is None else last_dim_contiguous(grad_probs),
            None if grad_weights is None else last_dim_contiguous(grad_weights),
            out,
            lse,
            probs,
            weights,
            indices,
            *tensors,
            *ctx.options,
            GRADIENTS.needs(asked),
        )
        gradients = dict(zip(GRADIENTS.names, found, strict=True))
        given = dict(zip(TENSORS, tensors, strict=True))
        if needed["noise"]:
            gradients["noise"] = noise_gradient(gradients["logits"], ctx.options.temperature, given["noise"].dtype)
        if needed["logits"]:
            gradients["logits"] = gradients["logits"].to(given["logits"].dtype)
        return None, None, None, *(gradients[name] if needed[name] else None for name in TENSORS)


def _triton_check(query: Tensor, key: Tensor, value: Tensor, logits: Tensor, bank: ExpertBank, **_: Any) -> list[str]:
    return triton_attention_check(query, logits, bank.key, bank.value)


def _cpu_check(
    query: Tensor, key: Tensor, value: Tensor, logits: Tensor, bank: ExpertBank, *, dropout_p: float = 0.0, **others: Any
) -> list[str]:
    tensors = [t for name, t in others.items() if isinstance(t, Tensor) and name not in ("lengths", "task_ids")]
    tensors += [t for t in (bank.gram, bank.key_offset, bank.value_offset) if t is not None]
    reasons = extension_check(query, logits, bank.key, bank.value, *tensors)
    if dropout_p:
        reasons.append("the C++ kernel has no dropout")
    return reasons


def _sdpa_check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logits: Tensor,
    bank: ExpertBank,
    *,
    lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    **others: Any,
) -> list[str]:
    reasons = _libraries.nothing_visible_check(key, bank.key, lengths, None)
    of_bank = (bank.key, bank.value, bank.gram, bank.key_offset, bank.value_offset)
    # explain() also passes numbers.
    tensors = [t for t in others.values() if isinstance(t, Tensor)]
    return reasons + _libraries.sdpa_gradient_check(query, key, value, logits, *of_bank, *tensors)


_MOPE_ATTENTION = Operation(
    "mope_attention",
    triton=_triton_check,
    cpu=_cpu_check,
    sdpa=_sdpa_check,
    reference=reference_check,
    left_out={"triton": _libraries.long_sequence_check},
)
# Attention functions for prompts that are already mixed. Their gradients come from autograd.
_BY_AUTOGRAD: dict[str, Callable[..., Tensor]] = {
    "sdpa": partial(_libraries.sdpa, attn_bias=None, is_causal=False),
    "reference": reference.prompt_attention,
}


def _check_tasks(arguments: Arguments, task_ids: Tensor, bank_key: Tensor) -> None:
    num_experts, rows = arguments.sizes["K"], bank_key.shape[0]
    if rows % num_experts:
        raise arguments.error(f"bank.key must have T*K rows, {num_experts} for each task, got {rows}")
    arguments.sizes |= {"T": rows // num_experts, "T*K": rows}
    arguments.tensor("task_ids", task_ids, "B", integer=True)


def mope_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logits: Tensor,
    bank: ExpertBank,
    *,
    static_key: Tensor | None = None,
    static_value: Tensor | None = None,
    instance_key: Tensor | None = None,
    instance_value: Tensor | None = None,
    top_k: int | None = None,
    temperature: float = 1.0,
    noise: Tensor | None = None,
    renormalize: bool = False,
    lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    task_ids: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Routing]:
    """Attend over [static; instance; routed prompts; tokens], where the routed prompts are a mixture of experts.

    out = softmax(q [Ks; Ki; Kr; K]' * scale) [Vs; Vi; Vr; V], where Kr and Vr are mixed from `bank` with the weights of
    `route(logits, ...)`. The Triton and C++ implementations fuse routing, gathering, LayerNorm and attention into one kernel.
    Router and dynamic prompts are from MoPE (arXiv 2403.10568).

    Args:
        query: (B,H,Lq,D), floating point.
        key: (B,H,Lk,D), dtype of `query`.
        value: (B,H,Lk,D), dtype of `query`.
        logits: (B,K) router logits, floating point.
        bank: The projected experts; differentiable.
        static_key: (H,S,D), keys of the prompts that all items share.
        static_value: (H,S,D); required exactly if there is a `static_key`.
        instance_key: (B,H,M,D), keys of the prompts of each item (the mapped prompts).
        instance_value: (B,H,M,D); required exactly if there is an `instance_key`.
        top_k: As in `route`.
        temperature: As in `route`.
        noise: As in `route`; differentiable.
        renormalize: As in `route`.
        lengths: (B,) integer. The tokens of item b from lengths[b] on are masked; prompts never are.
        dropout_p: Dropout probability for the attention weights, including those of prompts.
        scale: Factor for the scores, by default D^-0.5.
        task_ids: (B,) integer, for inference with the prompts of T tasks in one batch. `bank` then has `key` and `value`
            (T*K,H,P,D), with those of task t starting at row t*K, and `gram` (T,P,K,K); static prompts are (T,H,S,D). Item b uses
            the experts and static prompts of task task_ids[b]; `logits` and routing indices are relative to that task's experts.
        impl: "auto", "triton", "cpu", "sdpa" (mixes the prompts first) or "reference".

    Returns:
        (B,H,Lq,D) in the dtype of `query`, with memory laid out as (B,Lq,H,D), and the `Routing`.

    Raises:
        TypeError: `bank` is not an `ExpertBank`.
        ValueError: Shapes, dtypes or devices do not match, `top_k` > K, or `impl` cannot run; with `task_ids`, a gradient is
            needed, or a task does not exist (checked on the CPU, elsewhere only with MOPE_DEBUG=1).
    """
    if not isinstance(bank, ExpertBank):
        raise TypeError(f"mope_attention: bank must be an ExpertBank, got {type(bank).__name__}: give ExpertBank(key, value)")
    tensors = (
        query,
        key,
        value,
        logits,
        noise,
        bank.key,
        bank.value,
        bank.gram,
        bank.key_offset,
        bank.value_offset,
        static_key,
        static_value,
        instance_key,
        instance_value,
        lengths,
        task_ids,
    )
    options = (top_k, temperature, renormalize, bank.eps, scale, dropout_p, impl)
    out, probs, weights, indices = _MOPE_ATTENTION.plans.run(_plan, tensors, options)
    return out, dense_routing(probs) if indices is None else Routing(weights, indices, probs)


def _plan(direct: bool, *given: Any) -> Plan:
    """Plan a call. `given` contains the tensors of the raw op except its seed, then task_ids and the options."""
    *tensors, task_ids, top_k, temperature, renormalize, eps, scale, dropout_p, impl = given
    named = dict(zip(TENSORS, tensors, strict=False))
    arguments = Arguments("mope_attention")
    _check(arguments, named, task_ids, top_k, temperature)
    arguments.probability("dropout_p", dropout_p)
    arguments.number("bank.eps", eps)
    arguments.number("scale", scale)
    needs_gradient = any_needs_gradient(*tensors)
    if task_ids is not None and needs_gradient:
        raise arguments.error("task_ids is for inference, no gradient flows through it: call it under torch.no_grad()")
    bank = ExpertBank(
        named["bank_key"],
        named["bank_value"],
        **{name: named[name] for name in ("gram", "key_offset", "value_offset")},
    )
    others = {name: named[name] for name in ("noise", "static_key", "static_value", *INSTANCE, "lengths")}
    tokens = (named[name] for name in ("query", "key", "value", "logits"))
    implementation = _MOPE_ATTENTION.choose(impl, *tokens, bank, **others, dropout_p=dropout_p, task_ids=task_ids)
    scale = named["query"].shape[-1] ** -0.5 if scale is None else scale
    num_tasks = arguments.sizes.get("T", 0)
    if implementation in _BY_AUTOGRAD:
        attend: Plan = partial(
            _mix_and_attend,
            eps=eps,
            top_k=top_k,
            temperature=temperature,
            renormalize=renormalize,
            dropout_p=dropout_p,
            scale=scale,
            attend=_BY_AUTOGRAD[implementation],
        )
    else:
        options = _Options(top_k or 0, temperature, renormalize, eps, scale, dropout_p)
        attend = _by_kernel(implementation, direct, options, needs_gradient, to_copy(tensors[:-1]))

    def planned(*tensors: Tensor | None) -> Any:
        task_ids = tensors[-1]
        if task_ids is not None:
            arguments.indices("task_ids", task_ids, num_tasks)
        out, probs, weights, indices = attend(*tensors)
        return out, probs, weights, None if top_k is None and implementation not in _BY_AUTOGRAD else indices

    return planned


def _by_kernel(implementation: str, direct: bool, options: _Options, needs_gradient: bool, copies: tuple[int, ...]) -> Plan:
    """Return the plan: (tensors of the raw op except its seed, task_ids) -> out, probs, weights, indices."""
    kernel = forward_kernel(implementation, "mope_attention", direct)

    def attend(*tensors: Tensor | None) -> Any:
        *inputs, lengths, task_ids = tensors
        laid_out = copied(inputs, copies) if copies else inputs
        lengths = kernel_lengths(lengths)
        # The seed is a new tensor on the device, which needs no sync and can be replaced for a graph replay.
        seed = torch.randint(2**62, (1,), device=tensors[0].device) if options.dropout_p else None  # type: ignore[union-attr]
        if needs_gradient:
            return MoPEAttentionFunction.apply(implementation, kernel, options, *laid_out, lengths, seed)
        tasks = () if task_ids is None else (task_ids.long(),)
        out, _, *routing = kernel(*laid_out, lengths, seed, *options, *tasks)
        return out, *routing

    return attend


def _mix_and_attend(*tensors: Tensor | None, **options: Any) -> Any:
    """Compute the op by its plain definition with a given attention function."""
    *inputs, task_ids = tensors
    named: dict[str, Any] = dict(zip(TENSORS, inputs, strict=False))
    out, weights, indices, probs = reference.mope_attention(**named, **options, task_ids=task_ids)
    return out, probs, weights, indices


def _check(
    arguments: Arguments, named: dict[str, Tensor | None], task_ids: Tensor | None, top_k: int | None, temperature: float
) -> None:
    """Check the tensors against each other. `named` uses the raw op's argument names."""
    get: Any = named.get
    check_attention(arguments, get("query"), get("key"), get("value"), get("lengths"), 0.0)
    check_routing(arguments, get("logits"), get("noise"), top_k, temperature)
    experts, task = "K", ""
    if task_ids is not None:
        experts, task = "T*K", "T "
        _check_tasks(arguments, task_ids, get("bank_key"))
    axes = {"bank.key": f"{experts} H P D", "bank.value": f"{experts} H P D", "bank.gram": f"{task}P K K"}
    axes |= dict.fromkeys(("bank.key_offset", "bank.value_offset"), "H D")
    axes |= dict.fromkeys(("static_key", "static_value"), f"{task}H S D") | dict.fromkeys(INSTANCE, "B H M D")
    of_bank = {"bank.key": "bank_key", "bank.value": "bank_value"}
    for name, of in axes.items():
        arguments.tensor(name, get(of_bank.get(name, name.removeprefix("bank."))), of)
    for first, second in (("bank.key_offset", "bank.value_offset"), ("static_key", "static_value"), INSTANCE):
        pair = (get(name.removeprefix("bank.")) for name in (first, second))
        arguments.both_or_neither(first, next(pair), second, next(pair))
