"""Spec of `importance_loss`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mope_kernels import reference
from mope_kernels.spec import Choose, Gradients, Options, RawOp, Sizes, Spec, Tensors, Variant

GRADIENTS = Gradients("probs")

FORWARD = RawOp(
    "importance_loss",
    # probs (L,B,K)
    "Tensor probs, float threshold",
    # (L,) and (L,K)
    "Tensor loss, Tensor load",
    lambda a: tuple(a.probs.new_empty(a.probs.shape[:1] + last, dtype=torch.float32) for last in ((), a.probs.shape[2:])),
)
BACKWARD = RawOp(
    "importance_loss_backward",
    "Tensor grad_loss, Tensor load, float threshold",
    # (L,K): the gradient of every row of a block's probs.
    GRADIENTS.results,
    lambda a: (a.load.new_empty(a.load.shape),),
)


def _example(dtype: torch.dtype, device: str, size: Sizes) -> tuple[Tensors, Options]:
    blocks = () if size["blocks"] is None else (size["blocks"],)
    probs = (4 * torch.randn(*blocks, size["batch"], size["experts"], device=device)).softmax(-1)
    return {"probs": probs.to(dtype)}, {"threshold": size["threshold"]}


def _any_sizes(choose: Choose, impl: str) -> Sizes:
    blocks = choose.sampled(None, choose.integers(0, 3))
    return {"blocks": blocks, "batch": choose.integers(0, 50), "experts": choose.integers(1, 40)}


def _variants(short: bool) -> Iterator[Variant]:
    for experts in (4, 16, 64, 1024):
        sizes = {"blocks": 20, "batch": 64, "experts": experts, "threshold": 0.1}
        yield Variant(f"K={experts}", torch.float32, sizes)


SPEC = Spec(
    "importance_loss",
    definition=lambda options, tensors: (reference.importance_loss(**tensors, **options),),  # type: ignore[arg-type]
    example=_example,
    gradients=GRADIENTS,
    raw=(FORWARD, BACKWARD),
    implementations=("cpu", "triton"),
    # The op reduces over the whole batch, so no tensor is per item.
    base={"blocks": 2, "batch": 6, "experts": 4, "threshold": 0.0},
    cases={
        "even": {"batch": 40, "experts": 2},
        "one block": {"blocks": None},
        "no block": {"blocks": 0},
        "above the threshold": {"batch": 3, "experts": 17, "threshold": 0.1},
        "below the threshold": {"batch": 40, "experts": 3, "threshold": 1e9},
        "one item": {"batch": 1, "experts": 5},
        "one expert": {"batch": 5, "experts": 1},
        "empty batch": {"batch": 0},
    },
    any_sizes=_any_sizes,
    varied=({}, {"blocks": None}),
    statistics=(0,),
    variants=_variants,
).register()
