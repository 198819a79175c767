"""Spec of `gelu_mlp`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any

import torch
from torch import Tensor

from mope_kernels import reference
from mope_kernels._ops import not_needed
from mope_kernels.spec import TYPES, Choose, Gradients, Options, RawOp, Sizes, Spec, Tensors, Variant

GRADIENTS = Gradients("x", "weight1", "bias1", "weight2", "bias2")


def _results(a: Any) -> tuple[Tensor, Tensor]:
    hidden = a.x.new_empty(a.x.shape[0], a.weight1.shape[0]) if a.keep_hidden else not_needed(a.x)
    return a.x.new_empty(a.x.shape[0], a.weight2.shape[0]), hidden


def _gradient(a: Any, name: str) -> Tensor:
    if name == "x":
        return a.hidden.new_empty(a.hidden.shape[0], a.weight1.shape[1])
    like = a.weight1 if name.endswith("1") else a.weight2
    return a.hidden.new_empty(like.shape if name.startswith("weight") else like.shape[:1])


# `way` is one of configs.gelu_mlp.WAYS, or "" for the one in its table.
FORWARD = RawOp(
    "gelu_mlp",
    "Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, bool keep_hidden, str way=''",
    # out (N,O); with keep_hidden also h (N,F) for backward.
    "Tensor out, Tensor hidden",
    _results,
)
BACKWARD = RawOp(
    "gelu_mlp_backward",
    # x is needed only for the gradient of weight1.
    "Tensor grad_out, Tensor hidden, Tensor? x, Tensor weight1, Tensor weight2, int needs, str way=''",
    GRADIENTS.results,
    GRADIENTS.fake(_gradient, lambda a, name: not_needed(a.grad_out)),
)


def _example(dtype: torch.dtype, device: str, size: Sizes) -> tuple[Tensors, Options]:
    c, hidden, out = size["width"], size["hidden"], size["out"]
    shapes = {"weight1": (hidden, c), "bias1": (hidden,), "weight2": (out, hidden), "bias2": (out,)}
    tensors: Tensors = {n: torch.randn(*s, dtype=dtype, device=device) / s[-1] ** 0.5 for n, s in shapes.items()}
    if not size["bias"]:
        tensors["bias1"] = tensors["bias2"] = None
    x = torch.randn(size["batch"], size["rows"], c, dtype=dtype, device=device)
    return {"x": x} | tensors, {"way": size["way"]} if size["way"] else {}


def _arguments(options: Options, tensors: Tensors) -> dict[str, Any]:
    return dict(tensors)


def _around(options: Options) -> AbstractContextManager[None]:
    # Import here, because the package exports a function with the same name as the module, which is loaded by now.
    from mope_kernels.gelu_mlp import taking

    return taking(options["way"]) if "way" in options else nullcontext()


def _any_sizes(choose: Choose, impl: str) -> Sizes:
    sizes: Sizes = {n: choose.integers(low, 40) for n, low in (("rows", 0), ("width", 1), ("hidden", 1), ("out", 1))}
    return sizes | {"batch": choose.integers(0, 4), "bias": choose.booleans()}


def _variants(short: bool) -> Iterator[Variant]:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    # The elementwise kernels depend only on whether the width is a multiple of their blocks.
    for way, widths, usual in (("triton", (100, 128, 256, 512, 768, 1024), 128), ("cublas", (100, 1024), 1024)):
        for dtype, width in product(dtypes, widths):
            if short and dtype != torch.bfloat16 and width != usual:
                continue
            sizes = {"batch": 64, "rows": 62, "width": width, "hidden": 4 * width, "out": width, "way": way}
            label = f"{TYPES[dtype]} C={width}" + (" way=cublas" if way == "cublas" else "")
            # Without and with the tensors that backward needs.
            yield Variant(label, dtype, sizes, ())
            yield Variant(label, dtype, sizes, ("x",))


SPEC = Spec(
    "gelu_mlp",
    definition=lambda options, tensors: (reference.gelu_mlp(**tensors),),  # type: ignore[arg-type]
    example=_example,
    gradients=GRADIENTS,
    raw=(FORWARD, BACKWARD),
    implementations=("triton",),
    arguments=_arguments,
    around=_around,
    per_item=("x",),
    base={"batch": 3, "rows": 4, "width": 12, "hidden": 40, "out": 8, "bias": True, "way": None},
    cases={
        "plain": {},
        "no bias": {"bias": False},
        "several blocks": {"batch": 2, "rows": 70, "width": 80, "hidden": 144, "out": 80},
        "by cuBLAS": {"way": "cublas"},
        "several blocks by cuBLAS": {"batch": 2, "rows": 3, "hidden": 1200, "way": "cublas"},
        "odd sizes": {"rows": 5, "width": 7, "hidden": 13, "out": 3},
        "one of everything": {"batch": 1, "rows": 1, "width": 1, "hidden": 1, "out": 1},
        "empty batch": {"batch": 0},
    },
    any_sizes=_any_sizes,
    varied=({}, {"bias": False}, {"way": "cublas"}),
    small=frozenset({"one of everything"}),
    variants=_variants,
).register()
