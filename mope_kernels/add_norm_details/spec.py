"""Spec of `add_norm`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mope_kernels import reference
from mope_kernels._ops import not_needed
from mope_kernels.spec import TYPES, Choose, Gradients, Options, RawOp, Sizes, Spec, Tensors, Variant

# x and update share a gradient. That of update is requested only if its dtype differs.
GRADIENTS = Gradients("x", "update", "weight", "bias")


def _fake(a: Any) -> tuple[Tensor, ...]:
    total = not_needed(a.x)
    if a.update is not None:
        total = a.x.new_empty(a.x.shape, dtype=torch.promote_types(a.x.dtype, a.update.dtype))
    return total, a.x.new_empty(a.x.shape, dtype=a.norm_dtype)


def _gradient(a: Any, name: str) -> Tensor:
    if name in ("x", "update"):
        return a.total.new_empty(a.total.shape, dtype=a.x_dtype if name == "x" else a.update_dtype)
    return a.total.new_empty(a.total.shape[-1:], dtype=torch.float32)


FORWARD = RawOp(
    "add_norm",
    "Tensor x, Tensor? update, Tensor? weight, Tensor? bias, float eps, ScalarType norm_dtype",
    # Without update, total is empty, because it would repeat x.
    "Tensor total, Tensor normed",
    _fake,
)
BACKWARD = RawOp(
    "add_norm_backward",
    "Tensor? grad_total, Tensor? grad_normed, Tensor total, Tensor? weight, float eps, ScalarType x_dtype, "
    "ScalarType update_dtype, int needs",
    # Gradients of x and update have their dtypes; those of weight and bias (C,) are float32.
    GRADIENTS.results,
    GRADIENTS.fake(_gradient, lambda a, name: not_needed(a.total, torch.float32)),
)


def _example(dtype: torch.dtype, device: str, size: Sizes) -> tuple[Tensors, Options]:
    shape, width = (size["batch"], size["rows"], size["width"]), size["width"]
    residual = size["residual"] or dtype
    tensors: Tensors = {"x": torch.randn(shape, dtype=residual, device=device)}
    tensors["update"] = torch.randn(shape, dtype=dtype, device=device) if size["update"] else None
    tensors |= {n: torch.randn(width, dtype=dtype, device=device) if size["affine"] else None for n in ("weight", "bias")}
    return tensors, {} if size["residual"] is None else {"norm_dtype": dtype}


def _any_sizes(choose: Choose, impl: str) -> Sizes:
    # With narrow rows the standard deviation may be close to 0, and gradients divide by it.
    sizes = {"batch": choose.integers(0, 3), "rows": choose.integers(0, 20), "width": choose.integers(8, 300)}
    return sizes | {n: choose.booleans() for n in ("update", "affine")}


def _variants(short: bool) -> Iterator[Variant]:
    """Yield the widths of Swin Transformers, one that is not a power of two, and a wide one; bfloat16 adds other options."""
    frozen, sizes = ("x", "update"), {"batch": 64, "rows": 62}
    for dtype in (torch.bfloat16, torch.float32):
        for width in (128, 100, 512, 1024, 4096):
            if dtype == torch.bfloat16 or not short or width == 128:
                yield Variant(f"{TYPES[dtype]} C={width}", dtype, sizes | {"width": width}, frozen)
        if dtype == torch.bfloat16:
            yield Variant("bf16 C=512 trained=True", dtype, sizes | {"width": 512})
            yield Variant("bf16 C=512 residual=fp32", dtype, sizes | {"width": 512, "residual": torch.float32}, frozen)


SPEC = Spec(
    "add_norm",
    definition=lambda options, tensors: reference.add_norm(**tensors, **options),  # type: ignore[arg-type]
    example=_example,
    gradients=GRADIENTS,
    raw=(FORWARD, BACKWARD),
    implementations=("cpu", "triton"),
    shared_gradient={"update": "x"},
    per_item=("x", "update"),
    base={"batch": 2, "rows": 5, "width": 12, "update": True, "affine": True, "residual": None},
    cases={
        "plain": {},
        "nothing to add, no weight": {"update": False, "affine": False},
        "several blocks of odd rows": {"rows": 20, "width": 97},
        "one number": {"width": 1},
        "wide": {"rows": 1, "width": 1500},
        "empty batch": {"batch": 0},
    },
    any_sizes=_any_sizes,
    varied=({}, {"affine": False}),
    # The elements of a LayerNorm row must not overlap in memory.
    last_axes=dict.fromkeys(GRADIENTS.names, 1),
    variants=_variants,
).register()
