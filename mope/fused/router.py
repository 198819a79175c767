"""Routers, which compute the weights of a block's prompt experts from its input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mope_kernels
from mope_kernels import Routing
from mope_kernels.reference import autocast_off

from .modules import is_plain

ROUTERS = ("multimodal", "complementary")


class CrossPart(NamedTuple):
    """Parameters of psi's part of the logits, (W psi + b) keys.

    Shapes: weight (c,Cc), bias (c,), keys (c,K). `keys` is None if W already maps to K.
    """

    weight: Tensor
    bias: Tensor
    keys: Tensor | None


class Router(nn.Module, ABC):
    """Base class of routers, r = softmax(logits / temperature + noise); subclasses define the logits.

    It computes in the dtype of its parameters, even under autocast, because half precision could select different experts.

    Args:
        num_experts: Number of experts K.
        temperature: Positive temperature of the softmax.
        noise_std: Standard deviation of the noise drawn by `sample_noise`.
        renormalize: Divide the weights of the selected experts by their sum.
        impl: Implementation, see `mope_kernels.route`.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        temperature: float = 0.1,
        noise_std: float = 1 / 256,
        renormalize: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"{type(self).__name__}: needs num_experts >= 1, got {num_experts}")
        self.num_experts, self.temperature, self.noise_std = num_experts, temperature, noise_std
        self.renormalize, self.impl = renormalize, impl

    @property
    @abstractmethod
    def sees_tokens(self) -> bool:
        """Whether the logits depend on the pooled tokens, and so on the block."""

    @abstractmethod
    def logits(self, pooled: Tensor | None, cross: Tensor) -> Tensor:
        """Compute the logits (B,K) from pooled tokens (B,C) and psi (B,Cc), in the dtype of the router's parameters.

        `pooled` may be None if the router does not see tokens.
        """

    def of_cross(self) -> CrossPart | None:
        """Return the parameters of psi's part of the logits; None if there is no such part or the router must be called."""
        return None

    def of_tokens(self) -> dict[str, Tensor | None]:
        """Return the parameters of the tokens' part of the logits, as arguments of `mope_kernels.prompted_norm`."""
        return {}

    def sample_noise(self, batch: int, *, always: bool = False) -> Tensor | None:
        """Draw noise (B,K) from the device's generator; return None outside training unless `always` is set.

        Subclasses may draw noise differently, for example from trained parameters: gradients flow through the noise.
        """
        if not (self.training or always) or self.noise_std == 0:
            return None
        like = next(self.parameters())
        return self.noise_std * torch.randn(batch, self.num_experts, device=like.device, dtype=like.dtype)

    def forward(self, pooled: Tensor | None, cross: Tensor, noise: Tensor | None = None, top_k: int | None = None) -> Routing:
        """Route by pooled tokens (B,C) and psi (B,Cc).

        Returns a `Routing` with weights (B,k), indices (B,k) and probs (B,K); see `mope_kernels.route`.
        """
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


class MultimodalRouter(Router):
    """Router with logits = q K, q = [W_self pool(x) ; W_cross psi] (MoPE, arXiv 2403.10568).

    Args:
        dim: Token width C of the main modality.
        cross_dim: Width Cc of the complementary modality's feature psi.
        num_experts: Number of experts K.
        self_width: Width of the tokens' part of the query; with 0, the router sees psi only.
        cross_width: Width of psi's part of the query.
        embedding: Kind of the expert embedding K (self_width + cross_width, K), initialised orthogonally: "frozen" makes it a
            buffer, "learned" a parameter. The name in the state dict is the same for both.
        temperature, noise_std, renormalize, impl: See `Router`.
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
        super().__init__(num_experts, temperature=temperature, noise_std=noise_std, renormalize=renormalize, impl=impl)
        if self_width < 0 or cross_width < 0 or self_width + cross_width == 0:
            raise ValueError(
                f"MultimodalRouter: self_width and cross_width must be >= 0 and not both 0, got {self_width} and {cross_width}"
            )
        if embedding not in ("frozen", "learned"):
            raise ValueError(f"MultimodalRouter: embedding must be 'frozen' or 'learned', got {embedding!r}")
        self.self_projection = nn.Linear(dim, self_width) if self_width else None
        self.cross_projection = nn.Linear(cross_dim, cross_width) if cross_width else None
        # LAPACK does not support 16-bit dtypes, which may be the default dtype.
        dtype = torch.get_default_dtype()
        keys = torch.empty(self_width + cross_width, num_experts, dtype=torch.promote_types(dtype, torch.float32))
        keys = nn.init.orthogonal_(keys).to(dtype)
        if embedding == "learned":
            self.expert_embedding = nn.Parameter(keys)
        else:
            self.register_buffer("expert_embedding", keys)

    @property
    def sees_tokens(self) -> bool:
        return self.self_projection is not None

    def logits(self, pooled: Tensor | None, cross: Tensor) -> Tensor:
        keys = self.expert_embedding
        parts = ((self.self_projection, pooled), (self.cross_projection, cross))
        with autocast_off(keys.device):
            query = torch.cat([project(x.to(keys.dtype)) for project, x in parts if project is not None and x is not None], dim=-1)
            return query @ keys

    def of_cross(self) -> CrossPart | None:
        own, cross = self.self_projection, self.cross_projection
        if cross is None or not is_plain(self, MultimodalRouter) or not is_plain(cross, nn.Linear):
            return None
        if own is not None and not is_plain(own, nn.Linear):
            return None
        return CrossPart(cross.weight, cross.bias, self.expert_embedding[len(self.expert_embedding) - cross.out_features :])

    def of_tokens(self) -> dict[str, Tensor | None]:
        own = self.self_projection
        if own is None:
            return {}
        return {"self_weight": own.weight, "self_bias": own.bias, "self_keys": self.expert_embedding[: own.out_features]}


class ComplementaryRouter(Router):
    """Router with logits = W psi + b, which sees only psi (Conditional Prompt Tuning, arXiv 2312.03734).

    The released code gives a single expert weight 0, so it never trains. Without dense routing, it gives the selected experts
    weight 1, which has no gradient. Here a single expert has weight 1, and selected experts keep their probabilities.

    Args:
        cross_dim: Width Cc of the complementary modality's feature psi.
        num_experts, temperature, noise_std, renormalize, impl: See `Router`.
    """

    def __init__(
        self,
        cross_dim: int,
        num_experts: int,
        *,
        temperature: float = 0.1,
        noise_std: float = 1 / 256,
        renormalize: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__(num_experts, temperature=temperature, noise_std=noise_std, renormalize=renormalize, impl=impl)
        self.projection = nn.Linear(cross_dim, num_experts)

    @property
    def sees_tokens(self) -> bool:
        return False

    def logits(self, pooled: Tensor | None, cross: Tensor) -> Tensor:
        weight = self.projection.weight
        with autocast_off(weight.device):
            return self.projection(cross.to(weight.dtype))

    def of_cross(self) -> CrossPart | None:
        if not is_plain(self, ComplementaryRouter) or not is_plain(self.projection, nn.Linear):
            return None
        return CrossPart(self.projection.weight, self.projection.bias, None)


def make_router(
    kind: str | None,
    dim: int,
    cross_dim: int | None,
    num_experts: int,
    *,
    self_width: int = 2,
    cross_width: int = 8,
    temperature: float = 0.1,
    noise_std: float = 1 / 256,
    router_embedding: str = "frozen",
    renormalize: bool = False,
    impl: str = "auto",
) -> Router | None:
    """Build a "multimodal" or "complementary" router; return None without a kind, psi (`cross_dim`) or experts.

    Options that only the other kind of router uses are ignored.
    """
    if kind is None or cross_dim is None or num_experts == 0:
        return None
    if kind not in ROUTERS:
        raise ValueError(f"router must be one of {', '.join(map(repr, ROUTERS))}, got {kind!r}")
    if kind == "complementary":
        return ComplementaryRouter(
            cross_dim, num_experts, temperature=temperature, noise_std=noise_std, renormalize=renormalize, impl=impl
        )
    return MultimodalRouter(
        dim,
        cross_dim,
        num_experts,
        self_width=self_width,
        cross_width=cross_width,
        temperature=temperature,
        noise_std=noise_std,
        embedding=router_embedding,
        renormalize=renormalize,
        impl=impl,
    )


def sample_noise(routers: Sequence[Router], batch: int, *, always: bool = False) -> list[Tensor | None]:
    """Draw noise for each entry of `routers`; a router that occurs several times draws once, because it decides once.

    Identically configured routers draw together, unless one of their classes overrides `sample_noise`, for example to learn it.
    """
    once = {id(router): router for router in routers}
    drawn: dict[int, Tensor | None] = dict.fromkeys(once)
    common = all(type(router).sample_noise is Router.sample_noise for router in routers)
    if common and len({(router.num_experts, router.noise_std, router.training) for router in routers}) == 1:
        noise = routers[0].sample_noise(len(once) * batch, always=always)
        if noise is not None:
            drawn = dict(zip(once, noise.unflatten(0, (len(once), batch)).unbind(), strict=True))
    else:
        drawn = {key: router.sample_noise(batch, always=always) for key, router in once.items()}
    return [drawn[id(router)] for router in routers]


def cross_logits(parts: Sequence[CrossPart], cross: Tensor) -> list[Tensor]:
    """Compute psi's part of the logits of many routers at once: (B,Cc) -> (B,K) for each part, in the dtype of its parameters.

    If all parts have the same shapes, this takes two matrix products, however many parts there are.
    """
    if not parts:
        return []
    weights, biases, keys = zip(*parts, strict=True)
    if len({(weight.shape, None if key is None else key.shape) for weight, _, key in parts}) > 1:
        return [logits for part in parts for logits in cross_logits([part], cross)]
    with autocast_off(cross.device):
        query = F.linear(cross.to(weights[0].dtype), torch.cat(weights), torch.cat(biases))
        of_routers = query.unflatten(1, (len(parts), -1)).transpose(0, 1)
        return list((of_routers if keys[0] is None else of_routers @ torch.stack(keys)).unbind())


def without_noise(probs: Tensor, noise: Tensor | None) -> Tensor:
    """Return softmax(z), given probs = softmax(z + noise); all are (B,K)."""
    if noise is None:
        return probs
    scores = probs * torch.exp(-noise.to(probs.dtype))
    return scores / scores.sum(-1, keepdim=True)
