"""The MLP of a transformer block, with the exact GELU."""

from __future__ import annotations

from torch import Tensor

from . import reference
from ._checks import Arguments
from .impl import Operation, reference_check

_GELU_MLP = Operation("gelu_mlp", reference=reference_check)


def gelu_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, *, impl: str = "auto"
) -> Tensor:
    """gelu(x W1' + b1) W2' + b2 with gelu(h) = h Phi(h), Phi the normal distribution: by erf, not by tanh.

    Args:
        x: (..., C), floating point.
        weight1, bias1: (F,C), and (F,) or None, as of `nn.Linear`, in the dtype of x.
        weight2, bias2: (O,F), and (O,) or None.
        impl: "auto" or "reference".

    Returns:
        (..., O) in the dtype of x, products accumulated in float32 (float64).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `impl` cannot run.

    Where gradients are needed h is kept, (..., F), and x where weight1 is trained.
    """
    arguments = Arguments("gelu_mlp")
    if x.dim() < 1:
        raise arguments.error("x must have a last axis C, got a scalar")
    arguments.tensor("x", x.reshape(-1, x.shape[-1]), "N C")
    for name, value, axes in (
        ("weight1", weight1, "F C"),
        ("bias1", bias1, "F"),
        ("weight2", weight2, "O F"),
        ("bias2", bias2, "O"),
    ):
        arguments.tensor(name, value, axes, dtype=x.dtype)
    _GELU_MLP.choose(impl, x, weight1, bias1, weight2, bias2)
    return reference.gelu_mlp(x, weight1, bias1, weight2, bias2)
