"""Spec of `mix_prompts`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mope_kernels import reference
from mope_kernels._ops import not_needed
from mope_kernels.spec import TYPES, Choose, Gradients, Options, RawOp, Sizes, Spec, Tensors, Variant

GRADIENTS = Gradients("experts", "weights")

FORWARD = RawOp(
    "mix_prompts",
    "Tensor experts, Tensor weights, Tensor indices",
    "Tensor out",
    lambda a: (a.experts.new_empty(a.weights.shape[0], a.experts.shape[1], a.experts.shape[2]),),
)
BACKWARD = RawOp(
    "mix_prompts_backward",
    "Tensor grad_out, Tensor experts, Tensor weights, Tensor indices, int needs",
    GRADIENTS.results,
    GRADIENTS.fake(
        lambda a, name: getattr(a, name).new_empty(getattr(a, name).shape), lambda a, name: not_needed(getattr(a, name))
    ),
)


def _dense(tensor: Tensor) -> Tensor:
    """Copy to the strides that `route` returns. `contiguous` would not, because a single row of any stride is contiguous."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _example(dtype: torch.dtype, device: str, size: Sizes) -> tuple[Tensors, Options]:
    weights, indices, _ = reference.route(torch.randn(size["batch"], size["experts"], device=device), top_k=size["top_k"])
    experts = torch.randn(size["experts"], size["prompts"], size["width"], dtype=dtype, device=device)
    return {"experts": experts, "weights": _dense(weights), "indices": _dense(indices)}, {}


def _any_sizes(choose: Choose, impl: str) -> Sizes:
    experts = choose.integers(1, 20)
    sizes = {"batch": choose.integers(0, 5), "prompts": choose.integers(0, 7), "width": choose.integers(1, 150)}
    return sizes | {"experts": experts, "top_k": choose.sampled(None, choose.integers(1, experts))}


def _variants(short: bool) -> Iterator[Variant]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for selected in (1, 2, 16) if dtype == torch.bfloat16 or not short else (1,):
            sizes = {"batch": 64, "experts": 16, "top_k": selected, "prompts": 6, "width": 768}
            yield Variant(f"{TYPES[dtype]} k={selected}", dtype, sizes)


SPEC = Spec(
    "mix_prompts",
    definition=lambda options, tensors: (reference.mix_prompts(**tensors),),  # type: ignore[arg-type]
    example=_example,
    gradients=GRADIENTS,
    raw=(FORWARD, BACKWARD),
    implementations=("cpu", "triton"),
    per_item=("weights",),
    base={"batch": 5, "experts": 4, "top_k": 2, "prompts": 6, "width": 24},
    cases={
        "dense": {"top_k": None},
        "top2": {"batch": 3, "experts": 16, "prompts": 1, "width": 40},
        "odd width": {"batch": 9, "experts": 3, "top_k": 1, "prompts": 2, "width": 7},
        "one of everything": {"batch": 1, "experts": 1, "top_k": 1, "prompts": 1, "width": 1},
        "empty batch": {"batch": 0},
        "no prompts": {"batch": 2, "prompts": 0},
    },
    any_sizes=_any_sizes,
    varied=({"top_k": None}, {"top_k": 2}),
    small=frozenset({"one of everything"}),
    variants=_variants,
).register()
