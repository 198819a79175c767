"""Spec of `expert_adapter`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mope_kernels import reference
from mope_kernels._ops import not_needed
from mope_kernels.spec import TYPES, Choose, Gradients, Options, RawOp, Sizes, Spec, Tensors, Variant

PARAMETERS = ("down_weight", "down_bias", "up_weight", "up_bias", "router_weight", "router_bias")
GRADIENTS = Gradients("x", *PARAMETERS)

# x is (T,d). All parameters have the same dtype, which may differ from that of x.
_INPUTS = (
    "Tensor x, Tensor down_weight, Tensor down_bias, Tensor up_weight, Tensor up_bias, Tensor? router_weight, "
    "Tensor? router_bias, Tensor? seed, float temperature, bool is_gelu, float dropout_p"
)


def _results(a: Any) -> tuple[Tensor, Tensor]:
    shape = (a.x.shape[0], a.up_weight.shape[0]) if a.return_weights else (0,)
    return a.x.new_empty(a.x.shape), a.x.new_empty(shape, dtype=torch.float32)


# With return_weights, weights are the routing weights (T,E).
FORWARD = RawOp("expert_adapter", f"{_INPUTS}, bool return_weights", "Tensor out, Tensor weights", _results)
BACKWARD = RawOp(
    "expert_adapter_backward",
    f"Tensor grad_out, Tensor? grad_weights, {_INPUTS}, int needs",
    GRADIENTS.results,
    GRADIENTS.fake(lambda a, name: getattr(a, name).new_empty(getattr(a, name).shape), lambda a, name: not_needed(a.grad_out)),
)


def _example(dtype: torch.dtype, device: str, size: Sizes) -> tuple[Tensors, Options]:
    d, r, e = size["width"], size["bottleneck"], size["experts"]
    shapes = {"x": (*size["batch"], d), "down_weight": (r, d), "down_bias": (r,), "up_weight": (e, d, r), "up_bias": (e, d)}
    shapes |= {"router_weight": (e, d), "router_bias": (e,)} if size["router"] else {}
    tensors: Tensors = {"router_weight": None, "router_bias": None}
    for name, shape in shapes.items():
        in_float32 = size["float32_parameters"] and name != "x" and dtype != torch.float64
        tensors[name] = torch.randn(shape, dtype=torch.float32 if in_float32 else dtype, device=device) / shape[-1] ** 0.5
    return tensors, {n: size[n] for n in ("activation", "temperature", "dropout_p", "return_weights")}


def _define(options: Options, tensors: Tensors) -> tuple[Tensor, ...]:
    given: dict[str, Any] = {**tensors, **options}
    return_weights = given.pop("return_weights")
    return reference.expert_adapter(**given)[: 1 + return_weights]


def _any_sizes(choose: Choose, impl: str) -> Sizes:
    router = choose.booleans()
    return {
        "batch": [choose.integers(0, 4) for _ in range(choose.integers(0, 3))],
        "width": choose.integers(1, 40),
        "bottleneck": choose.integers(1, 20),
        "experts": choose.integers(1, 8) if router else 1,
        "router": router,
        "float32_parameters": choose.booleans(),
        "activation": choose.sampled("relu", "gelu"),
    }


def _variants(short: bool) -> Iterator[Variant]:
    """Yield the plain adapter (experts=1), routed adapters, and wide ones with every option that costs registers."""
    given: list[dict[str, Any]] = [{"experts": experts} for experts in (1, 3, 8)]
    wide = {"width": 770, "parameters": torch.float32, "gelu": True}
    given += [{"experts": e, "bottleneck": r, **wide, "dropout_p": 0.1} for e, r in ((3, 16), (1, 32), (7, 61), (8, 20))]
    for dtype in (torch.bfloat16, torch.float32):
        for options in given:
            if short and dtype == torch.float32 and options is not given[1]:
                continue
            sizes = {
                "batch": (64 * 128,),
                "width": options.get("width", 768),
                "bottleneck": options.get("bottleneck", 16),
                "experts": options["experts"],
                "router": options["experts"] > 1,
                "float32_parameters": "parameters" in options,
                "activation": "gelu" if "gelu" in options else "relu",
                "temperature": 10.0,
                "dropout_p": options.get("dropout_p", 0.0),
                "return_weights": False,
            }
            described = " ".join(f"{k}={TYPES.get(v, v)}" for k, v in options.items())
            yield Variant(f"{TYPES[dtype]} {described}", dtype, sizes)


SPEC = Spec(
    "expert_adapter",
    definition=_define,
    example=_example,
    gradients=GRADIENTS,
    raw=(FORWARD, BACKWARD),
    implementations=("cpu", "triton"),
    per_item=("x",),
    base={
        "batch": (3, 4),
        "width": 12,
        "bottleneck": 5,
        "experts": 3,
        "router": True,
        "float32_parameters": False,
        "activation": "gelu",
        "temperature": 2.0,
        "dropout_p": 0.0,
        "return_weights": True,
    },
    cases={
        "routed": {},
        "plain": {"experts": 1, "router": False, "activation": "relu"},
        "one expert, parameters in float32": {"experts": 1, "float32_parameters": True, "width": 32, "batch": (20,)},
        "several blocks": {"batch": (17,), "width": 80, "bottleneck": 16, "activation": "relu"},
        "several groups of experts": {"batch": (3,), "width": 16, "bottleneck": 33},
        "empty": {"batch": (0, 4)},
    },
    any_sizes=_any_sizes,
    varied=({}, {"experts": 1, "router": False}),
    of_items=lambda items: {"batch": (items, 4)},
    statistics=(1,),
    variants=_variants,
).register()
