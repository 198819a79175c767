"""The multimodal router."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import mope_kernels
from mope_kernels import Routing
from mope_kernels.reference import autocast_off


class MultimodalRouter(nn.Module):
    """r = softmax(q K / temperature + noise), q = [W_self pool(x) ; W_cross psi] (MoPE, arXiv 2403.10568).

    Computes in the dtype of its parameters, also under autocast: a selection made in half precision is another selection.

    Args:
        dim: C, width of the main modality.
        cross_dim: Cc, width of the complementary modality's feature psi.
        num_experts: K.
        self_width, cross_width: widths of the two parts of the query. `self_width=0` is the router that sees the
            complementary modality only.
        temperature: positive.
        noise_std: standard deviation of what `sample_noise` draws.
        embedding: the expert embedding K (self_width + cross_width, K), orthogonal at the start: "frozen", a buffer, or
            "learned", a parameter. Both stand in the state dict under the same name.
        renormalize: divide the weights of the selected experts by their sum.
        impl: as in `mope_kernels.route`.
    """

    expert_embedding: Tensor

    def __init__(
        self,
        dim: int,
        cross_dim: int,
        num_experts: int,
        *,
        self_width: int = 2,
        cross_width: int = 8,
        temperature: float = 0.1,
        noise_std: float = 1 / 256,
        embedding: str = "frozen",
        renormalize: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if num_experts < 1 or self_width < 0 or cross_width < 0 or self_width + cross_width == 0:
            raise ValueError(
                "MultimodalRouter: needs num_experts >= 1 and a query of at least one value, got "
                f"num_experts={num_experts}, self_width={self_width}, cross_width={cross_width}"
            )
        if embedding not in ("frozen", "learned"):
            raise ValueError(f"MultimodalRouter: embedding must be 'frozen' or 'learned', got {embedding!r}")
        self.num_experts, self.temperature, self.noise_std = num_experts, temperature, noise_std
        self.renormalize, self.impl = renormalize, impl
        self.self_projection = nn.Linear(dim, self_width) if self_width else None
        self.cross_projection = nn.Linear(cross_dim, cross_width) if cross_width else None
        keys = nn.init.orthogonal_(torch.empty(self_width + cross_width, num_experts))
        if embedding == "learned":
            self.expert_embedding = nn.Parameter(keys)
        else:
            self.register_buffer("expert_embedding", keys)

    def logits(self, pooled: Tensor, cross: Tensor) -> Tensor:
        """(B,C), (B,Cc) -> (B,K) in the dtype of the router's parameters."""
        keys = self.expert_embedding
        parts = ((self.self_projection, pooled), (self.cross_projection, cross))
        with autocast_off(keys.device):
            query = torch.cat([project(x.to(keys.dtype)) for project, x in parts if project is not None], dim=-1)
            return query @ keys

    def sample_noise(self, batch: int, *, always: bool = False) -> Tensor | None:
        """Noise (B,K) from the device's generator; None outside training, unless it is asked for always."""
        if not (self.training or always) or self.noise_std == 0:
            return None
        return self.noise_std * torch.randn(
            batch, self.num_experts, device=self.expert_embedding.device, dtype=self.expert_embedding.dtype
        )

    def forward(self, pooled: Tensor, cross: Tensor, noise: Tensor | None = None, top_k: int | None = None) -> Routing:
        """(B,C), (B,Cc) -> `Routing` with weights (B,k), indices (B,k), probs (B,K); see `mope_kernels.route`."""
        return mope_kernels.route(
            self.logits(pooled, cross),
            top_k=top_k,
            temperature=self.temperature,
            noise=noise,
            renormalize=self.renormalize,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, temperature={self.temperature:g}, noise_std={self.noise_std:g}"
