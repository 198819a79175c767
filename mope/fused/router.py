"""Routers: from what a block sees to weights of its prompt experts."""

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
    """psi's part of the logits: (W psi + b) keys; weight (c,Cc), bias (c,), keys (c,K), None where c is K already."""

    weight: Tensor
    bias: Tensor
    keys: Tensor | None


class Router(nn.Module, ABC):
    """r = softmax(logits / temperature + noise); a subclass says what the logits are.

    Computes in the dtype of its parameters, also under autocast: a selection made in half precision is another selection.

    Args:
        num_experts: K.
        temperature: positive.
        noise_std: standard deviation of what `sample_noise` draws.
        renormalize: divide the weights of the selected experts by their sum.
        impl: as in `mope_kernels.route`.
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
        """(B,C), (B,Cc) -> (B,K) in the dtype of the router's parameters. `pooled` may be None where tokens are not seen."""

    def of_cross(self) -> CrossPart | None:
        """What makes psi's part of the logits; None where there is none, or where the router has to be called."""
        return None

    def of_tokens(self) -> dict[str, Tensor | None]:
        """What makes the tokens' part of the logits, as `mope_kernels.prompted_norm` takes it."""
        return {}

    def sample_noise(self, batch: int, *, always: bool = False) -> Tensor | None:
        """Noise (B,K) from the device's generator; None outside training, unless it is asked for always.

        A subclass may draw in another way. Noise is differentiable: what a subclass makes it of is trained.
        """
        if not (self.training or always) or self.noise_std == 0:
            return None
        like = next(self.parameters())
        return self.noise_std * torch.randn(batch, self.num_experts, device=like.device, dtype=like.dtype)

    def forward(self, pooled: Tensor | None, cross: Tensor, noise: Tensor | None = None, top_k: int | None = None) -> Routing:
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


class MultimodalRouter(Router):
    """logits = q K, q = [W_self pool(x) ; W_cross psi] (MoPE, arXiv 2403.10568).

    Args:
        dim: C, width of the main modality.
        cross_dim: Cc, width of the complementary modality's feature psi.
        num_experts: K.
        self_width, cross_width: widths of the two parts of the query. With `self_width=0` it sees psi only.
        embedding: the expert embedding K (self_width + cross_width, K), orthogonal at the start: "frozen", a buffer, or
            "learned", a parameter. Both stand in the state dict under the same name.
        temperature, noise_std, renormalize, impl: see `Router`.
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
                f"MultimodalRouter: needs a query of at least one value, got self_width={self_width}, cross_width={cross_width}"
            )
        if embedding not in ("frozen", "learned"):
            raise ValueError(f"MultimodalRouter: embedding must be 'frozen' or 'learned', got {embedding!r}")
        self.self_projection = nn.Linear(dim, self_width) if self_width else None
        self.cross_projection = nn.Linear(cross_dim, cross_width) if cross_width else None
        # LAPACK has no 16 bits, which may be what new tensors get here.
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
    """logits = W psi + b: sees the complementary modality only (Conditional Prompt Tuning, arXiv 2312.03734).

    The released code gives a single expert the weight 0, so that it never trains, and without dense routing it gives those that it
    selects the weight 1, which has no gradient. Here a single expert has the weight 1, and selected ones keep their probabilities.

    Args:
        cross_dim: Cc, width of psi.
        num_experts, temperature, noise_std, renormalize, impl: see `Router`.
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
    """A "multimodal" or a "complementary" router, from the options of both; None where there is no `kind`, psi or expert."""
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
    """Noise for each place of a router. A router that stands in several places draws once: it decides once for all of them.

    Routers that are alike draw together; one whose class draws in its own way, such as noise that it learns, draws for itself.
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
    """psi's part of the logits of many routers at once: (B,Cc) -> (B,K) for each of `parts`, in the dtype of their parameters.

    Two matrix products, whatever their number, where all have the same sizes.
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
    """softmax(z) from probs = softmax(z + noise), (B,K) each."""
    if noise is None:
        return probs
    scores = probs * torch.exp(-noise.to(probs.dtype))
    return scores / scores.sum(-1, keepdim=True)
