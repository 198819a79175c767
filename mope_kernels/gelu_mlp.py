"""MLP of a transformer block with exact GELU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._checks import Arguments, any_needs_gradient, first_derivative_only, last_dim_contiguous
from ._ops import Kernel, backward_kernel, forward_kernel
from .configs.gelu_mlp import WAYS as WAYS
from .gelu_mlp_details import _launch
from .gelu_mlp_details.spec import GRADIENTS
from .impl import Operation, reference_check, triton_check
from .plans import Plan

# One of WAYS to override the tuning table, or "" to follow it.
_way = ""


@contextlib.contextmanager
def taking(way: str) -> Iterator[None]:
    """Force one of the `WAYS` for calls in this context and their gradients, overriding the tuning table.

    For benchmarks and tests.
    """
    global _way
    if way not in WAYS:
        raise ValueError(f"way must be one of {', '.join(WAYS)}, got {way!r}")
    outer, _way = _way, way
    try:
        yield
    finally:
        _way = outer


class GeluMlpFunction(torch.autograd.Function):
    """Autograd of `gelu_mlp`.

    (kernel, way, whether to save h for backward, x (..., C), weight1, bias1, weight2, bias2) -> out (N,O).
    """

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, way: str, keep_hidden: bool, *tensors: Any) -> Tensor:
        x, weight1, _, weight2, _ = tensors
        rows = _rows(x)
        out, hidden = kernel(rows, *tensors[1:], keep_hidden, way)
        ctx.way, ctx.shape = way, x.shape
        trains_weight1 = ctx.needs_input_grad[4]
        ctx.save_for_backward(hidden, rows if trains_weight1 else None, weight1, weight2)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only("gelu_mlp")
        asked = dict(zip(GRADIENTS.names, ctx.needs_input_grad[3:], strict=True))
        found = backward_kernel("triton", "gelu_mlp_backward")(
            last_dim_contiguous(grads[0]), *ctx.saved_tensors, GRADIENTS.needs(asked), ctx.way
        )
        grad_x, *others = (grad if need else None for grad, need in zip(found, asked.values(), strict=True))
        return None, None, None, None if grad_x is None else grad_x.view(ctx.shape), *others


def _rows(x: Tensor) -> Tensor:
    """Reshape (..., C) to (N,C)."""
    return last_dim_contiguous(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))


def _triton_check(x: Tensor, *_: Any, **__: Any) -> list[str]:
    return triton_check(x)


def _left_to_the_library(x: Tensor, *_: Any, **__: Any) -> list[str]:
    """Prefer cuBLAS for float32: tensor cores would lose digits, and without them cuBLAS is faster than Triton."""
    if x.dtype == torch.float32 and x.is_cuda and not torch.version.hip:
        return ["in float32 the products take longer than the GELU's memory traffic, and cuBLAS is faster at them"]
    return []


_SAID = {"triton": "the first product and its GELU in one kernel", "cublas": "the first product by cuBLAS, its GELU by a kernel"}


def _said_way(x: Tensor, weight1: Tensor, *_: Any, **__: Any) -> str:
    way = _way or _launch.chosen_way(x, weight1.shape[1])
    return f"{way}: {_SAID[way]}"


_GELU_MLP = Operation(
    "gelu_mlp",
    ways={"triton": _said_way},
    left_out={"triton": _left_to_the_library},
    triton=_triton_check,
    reference=reference_check,
)


def gelu_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, *, impl: str = "auto"
) -> Tensor:
    """Apply an MLP with exact GELU: gelu(h) W2' + b2 with h = x W1' + b1.

    gelu(h) = h Phi(h), where Phi is the normal CDF, computed with erf rather than the tanh approximation. If gradients are
    needed, h (..., F) is saved, and also x if weight1 is trained.

    Args:
        x: (..., C), floating point.
        weight1: W1 (F,C), laid out as in `nn.Linear`. All parameters have the dtype of x.
        bias1: b1 (F,) or None.
        weight2: W2 (O,F).
        bias2: b2 (O,) or None.
        impl: "auto", "triton" or "reference".

    Returns:
        (..., O) in the dtype of x; products are accumulated in float32 (float64).

    Raises:
        ValueError: Shapes, dtypes or devices do not match, or `impl` cannot run.
    """
    return _GELU_MLP.plans.run(_plan, (x, weight1, bias1, weight2, bias2), (impl, _way))


def _plan(
    direct: bool,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    impl: str,
    way: str,
) -> Plan:
    arguments = Arguments("gelu_mlp")
    arguments.rows("x", x, "N C")
    for name, value, axes in (
        ("weight1", weight1, "F C"),
        ("bias1", bias1, "F"),
        ("weight2", weight2, "O F"),
        ("bias2", bias2, "O"),
    ):
        arguments.tensor(name, value, axes, dtype=x.dtype)
    if _GELU_MLP.choose(impl, x, weight1, bias1, weight2, bias2) == "reference":
        return reference.gelu_mlp
    shape = (*x.shape[:-1], weight2.shape[0])
    kernel = forward_kernel("triton", "gelu_mlp", direct)
    run: Plan
    if any_needs_gradient(x, weight1, bias1, weight2, bias2):
        # If only the last bias needs a gradient, h is not needed.
        run = partial(GeluMlpFunction.apply, kernel, way, any_needs_gradient(x, weight1, bias1, weight2))
    else:

        def run(x: Tensor, *weights: Tensor | None) -> Tensor:
            return kernel(_rows(x), *weights, False, way)[0]

    # Outside the Function, because a view made inside could not be changed in place.
    return run if x.dim() == 2 else lambda *tensors: run(*tensors).view(shape)
