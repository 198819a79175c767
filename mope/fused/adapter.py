"""ModeX adapters: a bottleneck beside a frozen layer, with one up-projection per modality expert."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

import mope_kernels
from mope_kernels.expert_adapter import ACTIVATIONS

# The two adapters of the released code: down-projection, up-projections in expert order (text, vision, both), router.
_RELEASED = (
    ("D_fc1", ("D_fc2",), None),
    ("down_proj", ("up_proj", "visual_up_proj", "multi_up_proj"), "expert_weights"),
)


class ExpertAdapter(nn.Module):
    """Adapter with routed experts, applied to each token.

    It computes x + sum_e w_e (U_e h + b_e) with h = activation(W x + b) and w = softmax((R x + c) / temperature). With one expert
    there is no router, which makes it a plain adapter. The up-projections start at zero, so the adapter starts as the identity.
    State dicts of the released code's adapters can be loaded too.

    Args:
        dim: Token width d.
        num_experts: Number of experts E.
        bottleneck: Bottleneck width r.
        temperature: Temperature of the router.
        activation: "relu" or "gelu" (exact).
        dropout: Dropout probability on h in training.
        impl: Implementation, see `mope_kernels.expert_adapter`.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int = 3,
        *,
        bottleneck: int = 16,
        temperature: float = 10.0,
        activation: str = "relu",
        dropout: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if min(dim, num_experts, bottleneck) < 1:
            raise ValueError(
                f"ExpertAdapter: dim, num_experts and bottleneck must be at least 1, got {dim}, {num_experts} and {bottleneck}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"ExpertAdapter: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if not temperature > 0 or not 0 <= dropout < 1:
            raise ValueError(f"ExpertAdapter: needs temperature > 0 and dropout in [0, 1), got {temperature} and {dropout}")
        self.temperature, self.activation, self.dropout, self.impl = temperature, activation, dropout, impl
        self.down_weight, self.down_bias = nn.Parameter(torch.empty(bottleneck, dim)), nn.Parameter(torch.empty(bottleneck))
        self.up_weight = nn.Parameter(torch.empty(num_experts, dim, bottleneck))
        self.up_bias = nn.Parameter(torch.empty(num_experts, dim))
        routed = num_experts > 1
        self.router_weight = nn.Parameter(torch.empty(num_experts, dim)) if routed else None
        self.router_bias = nn.Parameter(torch.empty(num_experts)) if routed else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the down-projection and the router like `nn.Linear`, and the up-projections to zero."""
        bound = self.down_weight.shape[1] ** -0.5
        for parameter in (self.down_weight, self.down_bias, self.router_weight, self.router_bias):
            if parameter is not None:
                parameter.uniform_(-bound, bound)
        self.up_weight.zero_()
        self.up_bias.zero_()

    @overload
    def forward(self, x: Tensor, return_weights: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, return_weights: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, return_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Map x (..., d) to (..., d) in the same dtype.

        With `return_weights`, also return the expert weights (..., E) in float32 (float64 for float64 inputs).
        """
        return mope_kernels.expert_adapter(
            x,
            self.down_weight,
            self.down_bias,
            self.up_weight,
            self.up_bias,
            self.router_weight,
            self.router_bias,
            temperature=self.temperature,
            activation=self.activation,
            dropout_p=self.dropout if self.training else 0.0,
            return_weights=return_weights,
            impl=self.impl,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for down, ups, router in _RELEASED:
            # Incomplete adapters are not converted, so that errors report the original names.
            modules = [down, *ups, *([] if router is None else [router])]
            if len(ups) == len(self.up_weight) and all(
                f"{prefix}{m}.{p}" in state_dict for m in modules for p in ("weight", "bias")
            ):
                for part in ("weight", "bias"):
                    state_dict[f"{prefix}down_{part}"] = state_dict.pop(f"{prefix}{down}.{part}")
                    state_dict[f"{prefix}up_{part}"] = torch.stack([state_dict.pop(f"{prefix}{up}.{part}") for up in ups])
                    if router is not None:
                        state_dict[f"{prefix}router_{part}"] = state_dict.pop(f"{prefix}{router}.{part}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        num_experts, dim, bottleneck = self.up_weight.shape
        return f"dim={dim}, num_experts={num_experts}, bottleneck={bottleneck}, activation={self.activation}"
