"""Spec of `prompted_norm`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import mope_kernels
from mope_kernels import reference
from mope_kernels._ops import not_needed
from mope_kernels.spec import TYPES, Choose, Gradients, Options, RawOp, Sizes, Spec, Tensors, Variant

ROUTER = ("self_weight", "self_bias", "self_keys")
# x and update share a gradient. That of update is requested only if its dtype differs.
GRADIENTS = Gradients("x", "update", "weight", "bias", "static", "experts", "mapped", "cross_logits", *ROUTER, "routing_weights")
# Tensors of the raw op, in schema order. The gradient of the noise is derived from that of the logits.
TENSORS = (*GRADIENTS.names, "routing_indices", "noise")


def _results(a: Any) -> tuple[Tensor, ...]:
    batch, num_rows, width = a.x.shape
    num_prompts = sum((0 if t is None else t.shape[-2]) for t in (a.static, a.experts, a.mapped))
    shape = (batch, num_prompts + num_rows - a.num_replaced, width)
    total = a.x.new_empty(shape, dtype=a.x.dtype if a.update is None else torch.promote_types(a.x.dtype, a.update.dtype))
    num_experts = 0 if a.experts is None or a.routing_weights is not None else a.experts.shape[0]
    probs = a.x.new_empty(batch, num_experts, dtype=torch.float32)
    selected = a.top_k if num_experts else 0
    return (
        total,
        a.x.new_empty(shape, dtype=a.norm_dtype),
        probs,
        probs.new_empty(batch, selected),
        probs.new_empty(batch, selected or num_experts, dtype=torch.int64),
        probs.new_empty((batch, width) if a.keep_pooled else (0, width)),
    )


def _gradient(a: Any, name: str) -> Tensor:
    batch, num_out, width = a.total.shape
    num_prompts = num_out - (a.num_rows - a.num_replaced)
    if name == "mapped":
        # A view of the last rows of the prompt gradients.
        return a.total.new_empty(batch, num_prompts, width, dtype=torch.float32)[:, num_prompts - a.num_mapped :]
    dtype = {"x": a.x_dtype, "update": a.update_dtype}.get(name, torch.float32)
    if name in ("experts", "routing_weights"):
        dtype = (a.experts if name == "experts" else a.weights).dtype
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("x", "update"), (batch, a.num_rows, width))
    shapes |= dict.fromkeys(("weight", "bias"), (width,)) | {"static": (a.num_static, width)}
    shapes |= {"cross_logits": a.probs.shape, "routing_weights": a.weights.shape}
    return a.total.new_empty(shapes[name] if name in shapes else getattr(a, name).shape, dtype=dtype)


FORWARD = RawOp(
    "prompted_norm",
    "Tensor x, Tensor? update, Tensor? weight, Tensor? bias, Tensor? static, Tensor? experts, Tensor? mapped, "
    "Tensor? cross_logits, Tensor? self_weight, Tensor? self_bias, Tensor? self_keys, Tensor? routing_weights, "
    "Tensor? routing_indices, Tensor? noise, "
    "int num_replaced, int top_k, float temperature, bool renormalize, float eps, ScalarType norm_dtype, bool keep_pooled",
    # pooled (B,C), float32, is the mean over the rows that the router saw; it is empty without `keep_pooled`. Probs, weights and
    # indices are empty if a routing is given. Dense routing also returns indices (B,K), which saves another kernel.
    "Tensor total, Tensor normed, Tensor probs, Tensor weights, Tensor indices, Tensor pooled",
    _results,
)
BACKWARD = RawOp(
    "prompted_norm_backward",
    # num_rows, num_static and num_mapped are N, S and M. Weights and indices are those of the given routing, if any.
    "Tensor? grad_total, Tensor? grad_normed, Tensor? grad_probs, Tensor? grad_weights, "
    "Tensor total, Tensor probs, Tensor weights, Tensor indices, Tensor pooled, Tensor? weight, Tensor? experts, "
    "Tensor? self_weight, Tensor? self_bias, Tensor? self_keys, "
    "int num_rows, int num_replaced, int num_static, int num_mapped, float temperature, bool renormalize, float eps, "
    "ScalarType x_dtype, ScalarType update_dtype, int needs",
    # Gradients of x, update, experts and routing_weights have their dtypes; the others are float32.
    GRADIENTS.results,
    GRADIENTS.fake(_gradient, lambda a, name: not_needed(a.total, torch.float32)),
)


def _example(dtype: torch.dtype, device: str, size: Sizes) -> tuple[Tensors, Options]:
    batch, width, experts, query = size["batch"], size["width"], size["experts"], size["query"]
    of_prompts = torch.float32 if size["float32_prompts"] and dtype != torch.float64 else dtype

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    tensors: Tensors = {"x": randn(batch, size["rows"], width, dtype=size["residual"] or dtype)}
    tensors["update"] = randn(batch, size["rows"], width) if size["update"] else None
    tensors |= {n: randn(width) if size["affine"] else None for n in ("weight", "bias")}
    tensors["static"] = randn(size["static"], width, dtype=of_prompts) if size["static"] else None
    tensors["mapped"] = randn(batch, size["mapped"], width) if size["mapped"] else None
    tensors["experts"] = randn(experts, size["prompts"], width, dtype=of_prompts) if experts else None
    given, routed = size["routing"], experts > 0 and not size["routing"]
    sees_rows = routed and query > 0
    # The router computes in float32, regardless of the dtype of the model.
    router = {
        "cross_logits": (batch, experts) if routed and size["cross"] else None,
        "self_weight": (query, width) if sees_rows else None,
        "self_bias": (query,) if sees_rows else None,
        "self_keys": (query, experts) if sees_rows else None,
    }
    tensors |= {n: None if s is None else randn(*s, dtype=torch.float32) / s[-1] ** 0.5 for n, s in router.items()}
    tensors["noise"] = randn(batch, experts, dtype=torch.float32) / 8 if routed and size["noise"] else None
    tensors["routing_weights"] = tensors["routing_indices"] = None
    if given:
        logits = randn(batch, experts, dtype=torch.float32)
        tensors["routing_weights"], tensors["routing_indices"], _ = reference.route(logits, top_k=size["top_k"])
    options = {n: size[n] for n in ("top_k", "temperature", "renormalize")} if routed else {}
    options |= {} if size["residual"] is None else {"norm_dtype": dtype}
    return tensors, options | {"num_replaced": size["replaced"]}


def _arguments(options: Options, tensors: Tensors) -> dict[str, Any]:
    """Combine the tensors of a given routing into the argument `routing`."""
    tensors = dict(tensors)
    weights, indices = tensors.pop("routing_weights"), tensors.pop("routing_indices")
    routing = None if weights is None or indices is None else mope_kernels.Routing(weights, indices, weights)
    return {**tensors, "routing": routing, **options}


def _outputs(result: Any, options: Options) -> tuple[Tensor, ...]:
    total, normed, routing = result
    return (total, normed) if routing is None or "top_k" not in options else (total, normed, routing.weights, routing.probs)


def _define(options: Options, tensors: Tensors) -> tuple[Tensor, ...]:
    total, normed, routing = reference.prompted_norm(**_arguments(options, tensors))
    return (total, normed) if routing is None or "top_k" not in options else (total, normed, *routing[::2])


def _any_sizes(choose: Choose, impl: str) -> Sizes:
    experts = choose.integers(0, 6)
    # The mean needs at least one row.
    ranges = {"batch": (0, 3), "rows": (1, 20), "width": (8, 40), "static": (0, 3), "prompts": (0, 3), "mapped": (0, 2)}
    sizes: Sizes = {n: choose.integers(*r) for n, r in ranges.items()}
    sizes |= {n: choose.booleans() for n in ("update", "affine", "cross", "noise", "routing", "renormalize")}
    sizes["routing"] &= experts > 0
    return sizes | {
        "replaced": choose.integers(0, sizes["rows"]),
        "experts": experts,
        "query": choose.integers(0 if sizes["cross"] else 1, 5),
        "top_k": choose.sampled(None, choose.integers(1, max(experts, 1))),
    }


def _variants(short: bool) -> Iterator[Variant]:
    """Yield variants of stages of Swin-B (widths 128 to 1024), with gradients of tokens, prompts and router except its keys."""
    given: list[dict[str, Any]] = [{"width": width} for width in (128, 512, 1024)]
    given += [{"width": 512, "experts": 64, "top_k": 1}, {"width": 1024, "experts": 256}]
    given += [{"width": 512, "given": True}, {"width": 512, "residual": torch.float32}]
    for dtype in (torch.bfloat16, torch.float32):
        for options in given:
            if dtype == torch.float32 and (short or len(options) > 1) and options is not given[0]:
                continue
            width, ready_made, top_k = options["width"], "given" in options, options.get("top_k")
            sizes = {
                "batch": 16,
                "rows": 13 + (56 * 128 // width) ** 2,
                "replaced": 13,
                "width": width,
                "static": 6,
                "experts": options.get("experts", 4),
                "prompts": 6,
                "mapped": 1,
                "query": 2,
                "routing": ready_made,
                "top_k": 2 if ready_made else top_k,
                "temperature": 0.1,
                "residual": options.get("residual"),
                "float32_prompts": True,
            }
            wanted: tuple[str, ...] = ("x", "update", "static", "experts", "mapped")
            wanted += ("routing_weights",) if ready_made else ("cross_logits", "self_weight", "self_bias")
            described = " ".join(f"{k}={TYPES.get(v, v)}" for k, v in options.items()).replace("width", "C")
            # Only the probabilities of a routing have a gradient.
            yield Variant(f"{TYPES[dtype]} {described}", dtype, sizes, wanted, (0, 1) if ready_made else (0, 1, 3))


SPEC = Spec(
    "prompted_norm",
    definition=_define,
    example=_example,
    gradients=GRADIENTS,
    raw=(FORWARD, BACKWARD),
    implementations=("cpu", "triton"),
    arguments=_arguments,
    outputs=_outputs,
    also={"noise": "cross_logits"},
    shared_gradient={"update": "x"},
    per_item=("x", "update", "mapped", "cross_logits", "noise"),
    base={
        "batch": 2,
        "rows": 6,
        "replaced": 2,
        "width": 12,
        "update": True,
        "affine": True,
        "static": 1,
        "experts": 3,
        "prompts": 1,
        "mapped": 1,
        "query": 2,
        "cross": True,
        "noise": True,
        "routing": False,
        "top_k": None,
        "renormalize": False,
        "temperature": 0.5,
        "residual": None,
        "float32_prompts": False,
    },
    cases={
        "dense": {},
        "top2 renormalised": {"top_k": 2, "renormalize": True},
        "top1, sees psi only": {"top_k": 1, "query": 0, "noise": False},
        "sees its rows only": {"cross": False, "query": 5, "update": False},
        "given routing": {"routing": True, "top_k": 2, "prompts": 2},
        "no experts, none to replace": {"experts": 0, "static": 3, "replaced": 0},
        "no prompts, no weight": {"experts": 0, "static": 0, "mapped": 0, "affine": False},
        "experts without prompts": {"prompts": 0, "static": 0, "mapped": 0},
        "several blocks": {"rows": 35, "replaced": 5, "width": 150, "experts": 5, "top_k": 3},
        "wide, prompts only": {"rows": 2, "width": 600, "static": 0},
        "empty batch": {"batch": 0},
    },
    any_sizes=_any_sizes,
    varied=({}, {"top_k": 2, "noise": False}, {"routing": True, "affine": False}),
    statistics=(2, 3),
    # The elements of a LayerNorm row must not overlap in memory.
    last_axes=dict.fromkeys((*GRADIENTS.names, "noise"), 1),
    variants=_variants,
).register()
