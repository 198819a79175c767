"""ModeX: a bottleneck adapter whose up-projections are routed per token."""

from __future__ import annotations

from torch import Tensor

from . import reference
from ._checks import Arguments
from .impl import Operation, reference_check

_EXPERT_ADAPTER = Operation("expert_adapter", reference=reference_check)

ACTIVATIONS = ("relu", "gelu")


def expert_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    router_weight: Tensor | None = None,
    router_bias: Tensor | None = None,
    *,
    temperature: float = 10.0,
    activation: str = "relu",
    dropout_p: float = 0.0,
    return_weights: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """x + sum_e w_e (U_e h + b_e), h = activation(W x + b), w = softmax((R x + c) / temperature), for each token.

    Args:
        x: (..., d), floating point.
        down_weight, down_bias: (r,d), (r,).
        up_weight, up_bias: (E,d,r), (E,d).
        router_weight, router_bias: (E,d), (E,). Without a router there is one expert: the plain adapter.
        temperature: positive.
        activation: "relu" or "gelu" (exact).
        dropout_p: of h.
        return_weights: also return the routing weights.
        impl: "auto" or "reference".

    Returns:
        (..., d), residual included; with `return_weights` also (..., E) float32 (float64).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `impl` cannot run.

    ModeX (Sci. China Inf. Sci. 67(12) 220107), modality-expert coordinator.
    """
    arguments = Arguments("expert_adapter")
    if x.dim() < 1:
        raise arguments.error("x must have a last axis d, got a scalar")
    arguments.tensor("x", x.reshape(-1, x.shape[-1]), "T d")
    arguments.tensor("down_weight", down_weight, "r d")
    arguments.tensor("down_bias", down_bias, "r")
    arguments.tensor("up_weight", up_weight, "E d r")
    arguments.tensor("up_bias", up_bias, "E d")
    arguments.both_or_neither("router_weight", router_weight, "router_bias", router_bias)
    arguments.tensor("router_weight", router_weight, "E d")
    arguments.tensor("router_bias", router_bias, "E")
    if router_weight is None and up_weight.shape[0] != 1:
        raise arguments.error(f"{up_weight.shape[0]} experts need router_weight and router_bias; without a router there is one")
    if activation not in ACTIVATIONS:
        raise arguments.error(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    arguments.positive("temperature", temperature)
    arguments.probability("dropout_p", dropout_p)
    _EXPERT_ADAPTER.choose(impl, x)
    out, weights = reference.expert_adapter(
        x,
        down_weight,
        down_bias,
        up_weight,
        up_bias,
        router_weight,
        router_bias,
        temperature=temperature,
        activation=activation,
        dropout_p=dropout_p,
    )
    return (out, weights) if return_weights else out
