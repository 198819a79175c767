"""Schemas and fakes of the compiled ops. Imports torch only.

One namespace for each compiled implementation, `mope_triton` and `mope_cpu`, with the same schemas and the same fakes.
Triton kernels are registered by the op's own module; C++ kernels by the extension when it is loaded. None of these
ops has an autograd kernel: differentiable use goes through the autograd Functions of the public functions.

Conventions: `top_k = 0` is dense routing, and `weights` and `indices` then have no columns (they would repeat `probs` and
arange). A gradient that is not asked for comes back as an empty tensor of shape (0,). Tensors may have any strides as
long as the last dimension is contiguous. `lengths` is int32 or int64, `seed` int64 of shape (1,).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.library import Library

from .configs.tuning import tunable

NAMESPACES = ("mope_triton", "mope_cpu")

# Of the inputs of `prompt_attention` these can have a gradient. The order is that of the results of
# `prompt_attention_backward`; bit i of its `needs` asks for the i-th.
PROMPT_ATTENTION_GRADIENTS = ("query", "key", "value", "prompt_key", "prompt_value")

# The same for `mope_attention` and `mope_attention_backward`. The noise is not among them, here and in the other routed ops: its
# gradient is that of the logits times the temperature, which the autograd Functions make of it.
MOPE_ATTENTION_GRADIENTS = (
    "query",
    "key",
    "value",
    "logits",
    "bank_key",
    "bank_value",
    "gram",
    "key_offset",
    "value_offset",
    "static_key",
    "static_value",
    "instance_key",
    "instance_value",
)

# The same for `add_norm` and `add_norm_backward`: x and update have the same gradient, so that of update is asked for only where
# its dtype is another.
ADD_NORM_GRADIENTS = ("x", "update", "weight", "bias")

# The same for `prompted_norm` and `prompted_norm_backward`; x and update as in `add_norm`.
PROMPTED_NORM_GRADIENTS = (
    "x",
    "update",
    "weight",
    "bias",
    "static",
    "experts",
    "mapped",
    "cross_logits",
    "self_weight",
    "self_bias",
    "self_keys",
    "routing_weights",
)

# The same for `gelu_mlp` and `gelu_mlp_backward`.
GELU_MLP_GRADIENTS = ("x", "weight1", "bias1", "weight2", "bias2")

# The same for `expert_adapter` and `expert_adapter_backward`.
EXPERT_ADAPTER_GRADIENTS = ("x", "down_weight", "down_bias", "up_weight", "up_bias", "router_weight", "router_bias")

_PROMPT_ATTENTION_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor prompt_key, Tensor prompt_value, Tensor? lengths, Tensor? attn_bias, "
    "Tensor? seed, bool is_causal, float scale, float dropout_p"
)
_PACKED_ATTENTION_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor prompt_key, Tensor prompt_value, Tensor offsets, Tensor? seed, int max_length, "
    "bool is_causal, float scale, float dropout_p"
)
_MOPE_ATTENTION_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor logits, Tensor? noise, Tensor bank_key, Tensor bank_value, "
    "Tensor? gram, Tensor? key_offset, Tensor? value_offset, Tensor? static_key, Tensor? static_value, "
    "Tensor? instance_key, Tensor? instance_value, Tensor? lengths, Tensor? seed"
)
_MOPE_ATTENTION_OPTIONS = "int top_k, float temperature, bool renormalize, float eps, float scale, float dropout_p"

_PROMPTED_NORM_INPUTS = (
    "Tensor x, Tensor? update, Tensor? weight, Tensor? bias, Tensor? static, Tensor? experts, Tensor? mapped, "
    "Tensor? cross_logits, Tensor? self_weight, Tensor? self_bias, Tensor? self_keys, Tensor? routing_weights, "
    "Tensor? routing_indices, Tensor? noise, "
    "int num_replaced, int top_k, float temperature, bool renormalize, float eps, ScalarType norm_dtype"
)

# x is (T,d). Parameters have one dtype, which need not be that of x.
_EXPERT_ADAPTER_INPUTS = (
    "Tensor x, Tensor down_weight, Tensor down_bias, Tensor up_weight, Tensor up_bias, Tensor? router_weight, "
    "Tensor? router_bias, Tensor? seed, float temperature, bool is_gelu, float dropout_p"
)

# With resolution >= window_size: one window of the size of the image and no shift where the image is smaller.
_WINDOW_PROMPT_ATTENTION_INPUTS = (
    "Tensor qkv, Tensor position_bias, int num_prompts, int num_heads, int resolution, int window_size, int shift, "
    "bool owner_is_instance"
)

SCHEMAS = {
    "route": "(Tensor logits, Tensor? noise, int top_k, float temperature, bool renormalize)"
    " -> (Tensor probs, Tensor weights, Tensor indices)",
    # -> grad_logits (B,K), in the dtype of probs
    "route_backward": "(Tensor? grad_probs, Tensor? grad_weights, Tensor probs, Tensor weights, Tensor indices,"
    " float temperature, bool renormalize) -> Tensor",
    "mix_prompts": "(Tensor experts, Tensor weights, Tensor indices) -> Tensor",
    # -> grad_experts (K,P,D), grad_weights (B,k)
    "mix_prompts_backward": "(Tensor grad_out, Tensor experts, Tensor weights, Tensor indices,"
    " bool need_experts, bool need_weights) -> (Tensor, Tensor)",
    # probs (L,B,K) -> loss (L,), load (L,K)
    "importance_loss": "(Tensor probs, float threshold) -> (Tensor, Tensor)",
    # -> (L,K), the gradient that every row of a block's probs gets
    "importance_loss_backward": "(Tensor grad_loss, Tensor load, float threshold) -> Tensor",
    # lse (B,H,Lq): logarithm of the sum of exponentials of the scaled scores, +inf where no key is visible. For the backward of
    # the same namespace only: natural and float32 in mope_cpu, to base 2 and float64 in mope_triton.
    "prompt_attention": f"({_PROMPT_ATTENTION_INPUTS}) -> (Tensor out, Tensor lse)",
    "prompt_attention_backward": f"(Tensor grad_out, Tensor out, Tensor lse, {_PROMPT_ATTENTION_INPUTS}, int needs)"
    f" -> ({', '.join(['Tensor'] * len(PROMPT_ATTENTION_GRADIENTS))})",
    # The same for packed items: query, key and value (1,H,T,D), item b in rows offsets[b] to offsets[b+1]; lse (B,H,max_length)
    "packed_attention": f"({_PACKED_ATTENTION_INPUTS}) -> (Tensor out, Tensor lse)",
    "packed_attention_backward": f"(Tensor grad_out, Tensor out, Tensor lse, {_PACKED_ATTENTION_INPUTS}, int needs)"
    f" -> ({', '.join(['Tensor'] * len(PROMPT_ATTENTION_GRADIENTS))})",
    # With task_ids (B,), int64: bank_key and bank_value (T*K,H,P,D), gram (T,P,K,K), static_key and static_value (T,H,S,D); no
    # backward.
    "mope_attention": f"({_MOPE_ATTENTION_TENSORS}, {_MOPE_ATTENTION_OPTIONS}, Tensor? task_ids=None)"
    " -> (Tensor out, Tensor lse, Tensor probs, Tensor weights, Tensor indices)",
    "window_prompt_attention": f"({_WINDOW_PROMPT_ATTENTION_INPUTS}) -> Tensor",
    # -> grad_qkv (B,P+R*R,3C), grad_position_bias (H,w*w,w*w)
    "window_prompt_attention_backward": f"(Tensor grad_out, {_WINDOW_PROMPT_ATTENTION_INPUTS}, int needs) -> (Tensor, Tensor)",
    # -> out (N,O); with keep_hidden also h (N,F), for backward. `way` is one of configs.gelu_mlp.WAYS, or "" for that of its table.
    "gelu_mlp": "(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, bool keep_hidden, str way='')"
    " -> (Tensor, Tensor)",
    # x only where the gradient of weight1 is needed
    "gelu_mlp_backward": "(Tensor grad_out, Tensor hidden, Tensor? x, Tensor weight1, Tensor weight2, int needs, str way='')"
    f" -> ({', '.join(['Tensor'] * len(GELU_MLP_GRADIENTS))})",
    # total is empty without update: it would repeat x.
    "add_norm": "(Tensor x, Tensor? update, Tensor? weight, Tensor? bias, float eps, ScalarType norm_dtype)"
    " -> (Tensor total, Tensor normed)",
    # -> the gradients of x and update in their dtypes, of weight and bias (C,) in float32
    "add_norm_backward": "(Tensor? grad_total, Tensor? grad_normed, Tensor total, Tensor? weight, float eps, ScalarType x_dtype,"
    " ScalarType update_dtype, int needs) -> (Tensor, Tensor, Tensor, Tensor)",
    # pooled (B,C) float32, the mean over the rows that the router saw, empty where `keep_pooled` does not ask for it. Probs,
    # weights and indices are empty where routing is given ready-made. Indices (B,K) in dense routing too: nothing else launches.
    "prompted_norm": f"({_PROMPTED_NORM_INPUTS}, bool keep_pooled)"
    " -> (Tensor total, Tensor normed, Tensor probs, Tensor weights, Tensor indices, Tensor pooled)",
    # With the sizes N of x, S of static and M of mapped. Weights and indices are those of a routing given ready-made, if one was.
    # -> the gradients of x, update, experts and routing_weights in their dtypes, the others in float32
    "prompted_norm_backward": "(Tensor? grad_total, Tensor? grad_normed, Tensor? grad_probs, Tensor? grad_weights, Tensor total,"
    " Tensor probs, Tensor weights, Tensor indices, Tensor pooled, Tensor? weight, Tensor? experts, Tensor? self_weight,"
    " Tensor? self_bias, Tensor? self_keys, int num_rows, int num_replaced, int num_static, int num_mapped, float temperature,"
    " bool renormalize, float eps, ScalarType x_dtype, ScalarType update_dtype, int needs)"
    f" -> ({', '.join(['Tensor'] * len(PROMPTED_NORM_GRADIENTS))})",
    # -> out (T,d), with return_weights also the routing weights (T,E)
    "expert_adapter": f"({_EXPERT_ADAPTER_INPUTS}, bool return_weights) -> (Tensor, Tensor)",
    "expert_adapter_backward": f"(Tensor grad_out, Tensor? grad_weights, {_EXPERT_ADAPTER_INPUTS}, int needs)"
    f" -> ({', '.join(['Tensor'] * len(EXPERT_ADAPTER_GRADIENTS))})",
    # -> the gradients in the dtypes of what they belong to, that of the logits in float32
    "mope_attention_backward": "(Tensor grad_out, Tensor? grad_probs, Tensor? grad_weights, Tensor out, Tensor lse, Tensor probs,"
    f" Tensor weights, Tensor indices, {_MOPE_ATTENTION_TENSORS}, {_MOPE_ATTENTION_OPTIONS}, int needs)"
    f" -> ({', '.join(['Tensor'] * len(MOPE_ATTENTION_GRADIENTS))})",
}

LIBRARIES = {namespace: Library(namespace, "DEF") for namespace in NAMESPACES}


def empty_heads_last(query: Tensor, batch: int, heads: int, length: int, width: int) -> Tensor:
    """(B,H,L,D) laid out as (B,L,H,D), so that the projections beside the attention read and write it without a copy."""
    return query.new_empty(batch, length, heads, width).transpose(1, 2)


def not_needed(like: Tensor) -> Tensor:
    """What stands for a gradient that nobody asked for."""
    return like.new_empty(0)


def _fake_route(
    logits: Tensor, noise: Tensor | None, top_k: int, temperature: float, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch = logits.shape[0]
    probs = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    return probs, probs.new_empty(batch, top_k), probs.new_empty(batch, top_k, dtype=torch.int64)


def _fake_route_backward(
    grad_probs: Tensor | None,
    grad_weights: Tensor | None,
    probs: Tensor,
    weights: Tensor,
    indices: Tensor,
    temperature: float,
    renormalize: bool,
) -> Tensor:
    return probs.new_empty(probs.shape)


def _fake_mix_prompts(experts: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    return experts.new_empty(weights.shape[0], experts.shape[1], experts.shape[2])


def _fake_mix_prompts_backward(
    grad_out: Tensor, experts: Tensor, weights: Tensor, indices: Tensor, need_experts: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    return (
        experts.new_empty(experts.shape) if need_experts else not_needed(experts),
        weights.new_empty(weights.shape) if need_weights else not_needed(weights),
    )


def _fake_importance_loss(probs: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    blocks, _, num_experts = probs.shape
    return probs.new_empty(blocks, dtype=torch.float32), probs.new_empty(blocks, num_experts, dtype=torch.float32)


def _fake_importance_loss_backward(grad_loss: Tensor, load: Tensor, threshold: float) -> Tensor:
    return load.new_empty(load.shape)


def _fake_prompt_attention(query: Tensor, *rest: Any, lse_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return empty_heads_last(query, *query.shape), query.new_empty(query.shape[:3], dtype=lse_dtype)


def _fake_packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    offsets: Tensor,
    seed: Tensor | None,
    max_length: int,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(offsets.shape[0] - 1, query.shape[1], max_length, dtype=torch.float64)
    return empty_heads_last(query, *query.shape), lse


def _fake_prompt_attention_backward(grad_out: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    needs = rest[-1]
    gradients = []
    for i, like in enumerate(rest[: len(PROMPT_ATTENTION_GRADIENTS)]):
        if not needs >> i & 1:
            gradients.append(not_needed(grad_out))
        elif i < 3:
            gradients.append(empty_heads_last(like, *like.shape))
        else:
            gradients.append(like.new_empty(like.shape))
    return tuple(gradients)


def _fake_mope_attention(
    query: Tensor, key: Tensor, value: Tensor, logits: Tensor, noise: Tensor | None, *rest: Any, lse_dtype: torch.dtype
) -> tuple[Tensor, ...]:
    # Behind the other tensors.
    top_k = rest[11]
    out, lse = _fake_prompt_attention(query, lse_dtype=lse_dtype)
    return out, lse, *_fake_route(logits, noise, top_k, 1.0, False)


def _fake_mope_attention_backward(*args: Any) -> tuple[Tensor, ...]:
    needs = args[-1]
    query, key, value, logits, _, *others = args[8:22]
    gradients = []
    for i, like in enumerate((query, key, value, logits, *others)):
        if not needs >> i & 1:
            gradients.append(not_needed(query))
        elif i < 3:
            gradients.append(empty_heads_last(like, *like.shape))
        else:
            gradients.append(like.new_empty(like.shape, dtype=torch.float32 if like is logits else like.dtype))
    return tuple(gradients)


def _fake_window_prompt_attention(qkv: Tensor, *rest: Any) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


def _fake_window_prompt_attention_backward(grad_out: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    needs = inputs[-1]
    return tuple(t.new_empty(t.shape) if needs >> i & 1 else not_needed(t) for i, t in enumerate(inputs[:2]))


def _fake_gelu_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, keep_hidden: bool, way: str = ""
) -> tuple[Tensor, Tensor]:
    out = x.new_empty(x.shape[0], weight2.shape[0])
    return out, x.new_empty(x.shape[0], weight1.shape[0]) if keep_hidden else not_needed(x)


def _fake_gelu_mlp_backward(
    grad_out: Tensor, hidden: Tensor, x: Tensor | None, weight1: Tensor, weight2: Tensor, needs: int, way: str = ""
) -> tuple[Tensor, ...]:
    shapes = ((hidden.shape[0], weight1.shape[1]), weight1.shape, weight1.shape[:1], weight2.shape, weight2.shape[:1])
    return tuple(hidden.new_empty(s) if needs >> i & 1 else not_needed(hidden) for i, s in enumerate(shapes))


def _fake_add_norm(
    x: Tensor, update: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, norm_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    total = not_needed(x)
    if update is not None:
        total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, update.dtype))
    return total, x.new_empty(x.shape, dtype=norm_dtype)


def _fake_add_norm_backward(
    grad_total: Tensor | None,
    grad_normed: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    eps: float,
    x_dtype: torch.dtype,
    update_dtype: torch.dtype,
    needs: int,
) -> tuple[Tensor, ...]:
    shapes = (total.shape, total.shape, total.shape[-1:], total.shape[-1:])
    dtypes = (x_dtype, update_dtype, torch.float32, torch.float32)
    return tuple(
        total.new_empty(shape if needs >> bit & 1 else (0,), dtype=dtype if needs >> bit & 1 else torch.float32)
        for bit, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    )


def _fake_prompted_norm(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    static: Tensor | None,
    experts: Tensor | None,
    mapped: Tensor | None,
    cross_logits: Tensor | None,
    self_weight: Tensor | None,
    self_bias: Tensor | None,
    self_keys: Tensor | None,
    routing_weights: Tensor | None,
    routing_indices: Tensor | None,
    noise: Tensor | None,
    num_replaced: int,
    top_k: int,
    temperature: float,
    renormalize: bool,
    eps: float,
    norm_dtype: torch.dtype,
    keep_pooled: bool,
) -> tuple[Tensor, ...]:
    batch, num_rows, width = x.shape
    num_prompts = sum((0 if t is None else t.shape[-2]) for t in (static, experts, mapped))
    shape = (batch, num_prompts + num_rows - num_replaced, width)
    total = x.new_empty(shape, dtype=x.dtype if update is None else torch.promote_types(x.dtype, update.dtype))
    num_experts = 0 if experts is None or routing_weights is not None else experts.shape[0]
    probs = x.new_empty(batch, num_experts, dtype=torch.float32)
    selected = top_k if num_experts else 0
    return (
        total,
        x.new_empty(shape, dtype=norm_dtype),
        probs,
        probs.new_empty(batch, selected),
        probs.new_empty(batch, selected or num_experts, dtype=torch.int64),
        probs.new_empty((batch, width) if keep_pooled else (0, width)),
    )


def _fake_prompted_norm_backward(*args: Any) -> tuple[Tensor, ...]:
    total, probs, weights = args[4:7]
    _, experts, self_weight, self_bias, self_keys, num_rows, num_replaced, num_static, num_mapped = args[9:18]
    x_dtype, update_dtype, needs = args[-3:]
    batch, num_out, width = total.shape
    like = {"experts": experts, "self_weight": self_weight, "self_bias": self_bias, "self_keys": self_keys}
    shapes: dict[str, tuple[int, ...]] = {name: tuple(t.shape) for name, t in like.items() if t is not None}
    shapes |= dict.fromkeys(("x", "update"), (batch, num_rows, width)) | dict.fromkeys(("weight", "bias"), (width,))
    shapes |= {"static": (num_static, width), "mapped": (batch, num_out - (num_rows - num_replaced), width)}
    shapes |= {"cross_logits": tuple(probs.shape), "routing_weights": tuple(weights.shape)}
    dtypes = {"x": x_dtype, "update": update_dtype, "routing_weights": weights.dtype}
    dtypes |= {} if experts is None else {"experts": experts.dtype}
    found = {
        name: total.new_empty(shapes[name] if needs >> bit & 1 else (0,), dtype=dtypes.get(name, torch.float32))
        for bit, name in enumerate(PROMPTED_NORM_GRADIENTS)
    }
    if needs >> PROMPTED_NORM_GRADIENTS.index("mapped") & 1:
        # The last of the rows of all prompts.
        found["mapped"] = found["mapped"][:, shapes["mapped"][1] - num_mapped :]
    return tuple(found.values())


def _fake_expert_adapter(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    num_experts, return_weights = rest[2].shape[0], rest[-1]
    shape = (x.shape[0], num_experts) if return_weights else (0,)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.float32)


def _fake_expert_adapter_backward(grad_out: Tensor, grad_weights: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    needs = rest[-1]
    inputs = rest[: len(EXPERT_ADAPTER_GRADIENTS)]
    return tuple(t.new_empty(t.shape) if needs >> i & 1 else not_needed(grad_out) for i, t in enumerate(inputs))


FAKES: dict[str, Callable[..., object]] = {
    "route": _fake_route,
    "route_backward": _fake_route_backward,
    "mix_prompts": _fake_mix_prompts,
    "mix_prompts_backward": _fake_mix_prompts_backward,
    "importance_loss": _fake_importance_loss,
    "importance_loss_backward": _fake_importance_loss_backward,
    "prompt_attention": _fake_prompt_attention,
    "prompt_attention_backward": _fake_prompt_attention_backward,
    "packed_attention": _fake_packed_attention,
    "packed_attention_backward": _fake_prompt_attention_backward,
    "mope_attention": _fake_mope_attention,
    "mope_attention_backward": _fake_mope_attention_backward,
    "add_norm": _fake_add_norm,
    "add_norm_backward": _fake_add_norm_backward,
    "prompted_norm": _fake_prompted_norm,
    "prompted_norm_backward": _fake_prompted_norm_backward,
    "gelu_mlp": _fake_gelu_mlp,
    "gelu_mlp_backward": _fake_gelu_mlp_backward,
    "expert_adapter": _fake_expert_adapter,
    "expert_adapter_backward": _fake_expert_adapter_backward,
    "window_prompt_attention": _fake_window_prompt_attention,
    "window_prompt_attention_backward": _fake_window_prompt_attention_backward,
}

LSE_DTYPES = {"mope_triton": torch.float64, "mope_cpu": torch.float32}

for _namespace, _library in LIBRARIES.items():
    for _name, _schema in SCHEMAS.items():
        _library.define(_name + _schema)
        _fake = FAKES[_name]
        if _name in ("prompt_attention", "mope_attention"):
            _fake = functools.partial(_fake, lse_dtype=LSE_DTYPES[_namespace])
        torch.library.register_fake(f"{_namespace}::{_name}", _fake, lib=_library)


Launcher = TypeVar("Launcher", bound=Callable[..., object])


def triton_kernel(name: str) -> Callable[[Launcher], Launcher]:
    """Register the launcher of `mope_triton::name`. On CPU tensors it runs in Triton's interpreter."""

    def register(launcher: Launcher) -> Launcher:
        for key in ("CUDA", "CPU"):
            LIBRARIES["mope_triton"].impl(name, tunable(launcher), key)
        return launcher

    return register
