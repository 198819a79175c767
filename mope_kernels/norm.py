"""Residual add and LayerNorm: where one branch of a block ends and the next begins."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._checks import Arguments
from .impl import Operation, reference_check

_ADD_NORM = Operation("add_norm", reference=reference_check)


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
    """total = x + update and normed = LayerNorm(total) * weight + bias.

    Args:
        x: (..., C), floating point: the residual stream.
        update: (..., C), what a branch adds to it; None: nothing, and `total` is `x` itself.
        weight, bias: (C,), or None.
        eps: added to the variance.
        norm_dtype: of `normed`; that of `total` if None. Statistics are float32 (float64) in any case.
        impl: "auto" or "reference".

    Returns:
        total (..., C) in the dtype that x and update promote to, and normed (..., C).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `impl` cannot run.
    """
    arguments = Arguments("add_norm")
    if x.dim() < 1:
        raise arguments.error("x must have a last axis C, got a scalar")
    if update is not None and update.shape != x.shape:
        raise arguments.error(f"update must have the shape of x, {tuple(x.shape)}, got {tuple(update.shape)}")
    arguments.tensor("x", x.reshape(-1, x.shape[-1]), "R C")
    arguments.tensor("update", None if update is None else update.reshape(-1, x.shape[-1]), "R C")
    arguments.tensor("weight", weight, "C")
    arguments.tensor("bias", bias, "C")
    arguments.norm_dtype(norm_dtype)
    _ADD_NORM.choose(impl, x, update, weight, bias)
    return reference.add_norm(x, update, weight, bias, eps=eps, norm_dtype=norm_dtype)
