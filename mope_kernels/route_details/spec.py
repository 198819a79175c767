"""Spec of `route`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mope_kernels import reference
from mope_kernels.spec import TYPES, Choose, Gradients, Options, RawOp, Sizes, Spec, Tensors, Variant

GRADIENTS = Gradients("logits")


def empty_routing(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate probs (B,K), weights and indices (B,k). For dense routing (`top_k` 0), weights and indices have no columns."""
    batch = logits.shape[0]
    probs = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    return probs, probs.new_empty(batch, top_k), probs.new_empty(batch, top_k, dtype=torch.int64)


FORWARD = RawOp(
    "route",
    "Tensor logits, Tensor? noise, int top_k, float temperature, bool renormalize",
    # For dense routing, weights and indices have no columns, because they would repeat probs and arange.
    "Tensor probs, Tensor weights, Tensor indices",
    lambda a: empty_routing(a.logits, a.top_k),
)
BACKWARD = RawOp(
    "route_backward",
    "Tensor? grad_probs, Tensor? grad_weights, Tensor probs, Tensor weights, Tensor indices, float temperature, bool renormalize",
    # The result has the dtype of probs. The gradient of the noise is derived from it.
    GRADIENTS.results,
    lambda a: (a.probs.new_empty(a.probs.shape),),
)


def draw_logits(dtype: torch.dtype, device: str, size: Sizes) -> tuple[Tensors, Options]:
    """Draw logits and noise, and return them with the options of `route`."""
    shape = (size["batch"], size["experts"])
    noise = torch.randn(shape, device=device) / 8 if size["noise"] else None
    logits = torch.randn(shape, dtype=dtype, device=device)
    return {"logits": logits, "noise": noise}, {n: size[n] for n in ("top_k", "renormalize", "temperature")}


def _outputs(result: Any, options: Options) -> tuple[Tensor, ...]:
    return result.weights, result.probs


def _any_sizes(choose: Choose, impl: str) -> Sizes:
    experts = choose.integers(1, 40)
    return {
        "batch": choose.integers(0, 5),
        "experts": experts,
        "top_k": choose.sampled(None, choose.integers(1, experts)),
        "renormalize": choose.booleans(),
        "temperature": choose.sampled(0.1, 1.0, 3.0),
        "noise": choose.booleans(),
    }


def _variants(short: bool) -> Iterator[Variant]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for experts, top_k in ((4, None), (16, 1), (16, 2), (64, 4), (1024, 8)):
            if short and (dtype == torch.float16) != (experts == 4):
                continue
            sizes = {"batch": 64, "experts": experts, "top_k": top_k, "renormalize": (top_k or 0) > 1}
            yield Variant(f"{TYPES[dtype]} K={experts} k={top_k or 'all'}", dtype, sizes, ("logits",))


SPEC = Spec(
    "route",
    definition=lambda options, tensors: reference.route(**tensors, **options)[::2],  # type: ignore[arg-type]
    example=draw_logits,
    gradients=GRADIENTS,
    raw=(FORWARD, BACKWARD),
    implementations=("cpu", "triton"),
    outputs=_outputs,
    also={"noise": "logits"},
    per_item=("logits", "noise"),
    base={"batch": 5, "experts": 4, "top_k": 2, "renormalize": False, "temperature": 0.5, "noise": True},
    cases={
        "dense": {"top_k": None, "temperature": 0.1},
        "top1": {"batch": 3, "experts": 16, "top_k": 1, "temperature": 0.1, "noise": False},
        "top2 renormalised": {"batch": 7, "experts": 5, "renormalize": True, "temperature": 1.0},
        "top-all renormalised": {"batch": 2, "experts": 6, "top_k": 6, "renormalize": True, "noise": False},
        "one expert": {"batch": 1, "experts": 1, "top_k": 1, "temperature": 1.0, "noise": False},
        "many experts": {"batch": 4, "experts": 100, "top_k": 3, "temperature": 0.3},
        "empty batch": {"batch": 0, "temperature": 1.0, "noise": False},
    },
    any_sizes=_any_sizes,
    varied=({"top_k": None}, {"top_k": 2, "renormalize": True}),
    statistics=(0, 1),
    small=frozenset({"one expert"}),
    variants=_variants,
).register()
