"""Residual add followed by LayerNorm, as between two branches of a block."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._checks import Arguments, any_needs_gradient, first_derivative_only
from ._ops import Kernel, backward_kernel, forward_kernel
from .add_norm_details import _launch as _launch
from .add_norm_details.spec import GRADIENTS
from .impl import Operation, extension_check, reference_check, triton_check
from .plans import Plan


class AddNormFunction(torch.autograd.Function):
    """Autograd of `add_norm`: (implementation, kernel, eps, norm_dtype, x, update, weight, bias) -> total, normed.

    Only total (x if there is no update) and weight are saved for backward. Without an update, total would repeat x, so it is
    empty and has no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, implementation: str, kernel: Kernel, eps: float, norm_dtype: torch.dtype, *tensors: Any
    ) -> tuple[Tensor, Tensor]:
        x, update, weight, bias = tensors
        total, normed = kernel(x, update, weight, bias, eps, norm_dtype)
        ctx.implementation, ctx.eps, ctx.nothing_added = implementation, eps, update is None
        ctx.save_for_backward(x if update is None else total, weight)
        ctx.dtypes = (x.dtype, x.dtype if update is None else update.dtype)
        ctx.parameter_dtypes = tuple(None if t is None else t.dtype for t in (weight, bias))
        ctx.set_materialize_grads(False)
        if update is None:
            ctx.mark_non_differentiable(total)
        return total, normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        first_derivative_only("add_norm")
        grad_total, grad_normed = grads
        if ctx.nothing_added:
            # Without `update`, `total` is a placeholder; torch.compile still passes zeros as its gradient.
            grad_total = None
        x, update, weight, bias = ctx.needs_input_grad[4:]
        if grad_total is None and grad_normed is None:
            return (None,) * 8
        shared = ctx.dtypes[0] == ctx.dtypes[1]
        asked = {"x": x or (shared and update), "update": update and not shared, "weight": weight, "bias": bias}
        grad_x, grad_update, grad_weight, grad_bias = backward_kernel(ctx.implementation, "add_norm_backward")(
            grad_total, grad_normed, *ctx.saved_tensors, ctx.eps, *ctx.dtypes, GRADIENTS.needs(asked)
        )
        return (
            *(None,) * 4,
            grad_x if x else None,
            (grad_x if shared else grad_update) if update else None,
            grad_weight.to(ctx.parameter_dtypes[0]) if weight else None,
            grad_bias.to(ctx.parameter_dtypes[1]) if bias else None,
        )


# Length of the longest row that one program holds in registers.
TRITON_WIDTH = 16384


def triton_norm_check(x: Tensor, norm_dtype: torch.dtype, *others: Tensor | None) -> list[str]:
    """Return the reasons why the Triton kernels cannot run a LayerNorm over the last axis of x; empty if they can."""
    reasons = triton_check(x, *(t for t in others if t is not None))
    if x.shape[-1] > TRITON_WIDTH:
        reasons.append(f"the Triton kernel takes rows of at most {TRITON_WIDTH} numbers, got {x.shape[-1]}")
    if norm_dtype == torch.float64:
        reasons.append("the Triton kernels compute in float32, norm_dtype is float64")
    return reasons


def cpu_norm_check(x: Tensor, norm_dtype: torch.dtype, *others: Tensor | None) -> list[str]:
    """Return the reasons why the C++ kernels cannot run a LayerNorm over the last axis of x; empty if they can."""
    reasons = extension_check(x, *(t for t in others if t is not None))
    if norm_dtype not in (torch.float32, torch.bfloat16):
        reasons.append(f"the C++ kernels write float32 and bfloat16, norm_dtype is {norm_dtype}")
    return reasons


def _triton_check(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    norm_dtype: torch.dtype | None = None,
    **_: Any,
) -> list[str]:
    return triton_norm_check(x, norm_dtype or x.dtype, update, weight, bias)


def _cpu_check(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    norm_dtype: torch.dtype | None = None,
    **_: Any,
) -> list[str]:
    return cpu_norm_check(x, norm_dtype or x.dtype, update, weight, bias)


_ADD_NORM = Operation("add_norm", triton=_triton_check, cpu=_cpu_check, reference=reference_check)


def add_norm(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    norm_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add and normalize: total = x + update and normed = LayerNorm(total) * weight + bias.

    Args:
        x: (..., C), floating point, the residual stream.
        update: (..., C), the output of a branch. If None, nothing is added and `total` is `x` itself.
        weight: (C,) or None.
        bias: (C,) or None.
        eps: Positive, added to the variance.
        norm_dtype: dtype of `normed`, by default that of `total`. Statistics are always float32 (float64).
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        The pair (total, normed), both (..., C). `total` has the dtype that x and update promote to.

    Raises:
        ValueError: Shapes, dtypes or devices do not match, or `impl` cannot run.
    """
    return _ADD_NORM.plans.run(_plan, (x, update, weight, bias), (eps, norm_dtype, impl))


def _plan(
    direct: bool,
    x: Tensor,
    update: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm_dtype: torch.dtype | None,
    impl: str,
) -> Plan:
    arguments = Arguments("add_norm")
    arguments.rows("x", x, "R C")
    if update is not None and update.shape != x.shape:
        raise arguments.error(f"update must have the shape of x, {tuple(x.shape)}, got {tuple(update.shape)}")
    arguments.rows("update", update, "R C")
    arguments.tensor("weight", weight, "C")
    arguments.tensor("bias", bias, "C")
    arguments.norm_dtype(norm_dtype)
    arguments.positive("eps", eps)
    implementation = _ADD_NORM.choose(impl, x, update, weight, bias, norm_dtype=norm_dtype)
    if implementation == "reference":
        return partial(reference.add_norm, eps=eps, norm_dtype=norm_dtype)
    dtype = norm_dtype or (x.dtype if update is None else torch.promote_types(x.dtype, update.dtype))
    kernel = forward_kernel(implementation, "add_norm", direct)
    if any_needs_gradient(x, update, weight, bias):
        add: Plan = partial(AddNormFunction.apply, implementation, kernel, eps, dtype)
    else:

        def add(*tensors: Tensor | None) -> Any:
            return kernel(*tensors, eps, dtype)

    if update is None:
        return lambda x, *others: (x, add(x, *others)[1])
    return add
