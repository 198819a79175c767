"""Prompted self-attention that reuses the projections of one frozen layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mope_kernels
from mope_kernels import ExpertBank, Routing

from .modules import version
from .packing import Packing
from .projections import call_linear, join_linear, separate_linear
from .prompts import PromptExperts, project_prompts, split_heads
from .router import Router, make_router


@dataclass(frozen=True, eq=False)
class FrozenAttention:
    """Modules of one frozen attention layer.

    The modules are called, so LoRA, quantised and sharded projections work. Query, key and value projections that are plain frozen
    `nn.Linear` layers and have been joined (see `join`) are computed as one matrix product instead.

    Attributes:
        query: Query projection, C -> H*D.
        key: Key projection, C -> H*D.
        value: Value projection, C -> H*D.
        output: Output projection, H*D -> C.
        num_heads: Number of heads H.
        norm: LayerNorm between the block input and the projections in pre-LN blocks; None in post-LN blocks.
        scale: Factor applied to the scores; D^-0.5 if None.
        prepare: Changes the queries and keys (B,H,L,D) of tokens after projection, for example by rotary positions or norms.
        prepare_prompts: Changes the keys (B,H,P,D) of prompts after projection, for example by norms; prompts have no position.
            If set, experts cannot be projected into a bank.
        bias: Added to the scores of tokens; broadcastable to (B,H,L,L).
    """

    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    num_heads: int
    norm: nn.Module | None = None
    scale: float | None = None
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    prepare_prompts: Callable[[Tensor], Tensor] | None = None
    bias: Tensor | None = None

    @property
    def can_bank(self) -> bool:
        """True if prompts can be projected before mixing: apart from a LayerNorm, their keys are an affine function of them."""
        return self.prepare_prompts is None and (self.norm is None or isinstance(self.norm, nn.LayerNorm))

    def normalize(self, x: Tensor) -> Tensor:
        return x if self.norm is None else self.norm(x)

    def join(self) -> None:
        """Store the query, key and value weights side by side; see `mope.fused.projections.join_linear`."""
        join_linear((self.query, self.key, self.value))

    def separate(self) -> None:
        """Undo `join`."""
        separate_linear((self.query, self.key, self.value))

    def keys_and_values(self, normalized: Tensor) -> tuple[Tensor, Tensor]:
        """Project normalised prompts (B,L,C) to keys and values, each (B,H,L,D)."""
        keys, value = call_linear((self.key, self.value), normalized)
        key = split_heads(keys, self.num_heads)
        return key if self.prepare_prompts is None else self.prepare_prompts(key), split_heads(value, self.num_heads)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project the block input (B,L,C) to query, key and value, each (B,H,L,D)."""
        queries, keys, values = call_linear((self.query, self.key, self.value), self.normalize(x))
        query, key = split_heads(queries, self.num_heads), split_heads(keys, self.num_heads)
        if self.prepare is not None:
            query, key = self.prepare(query, key)
        return query, key, split_heads(values, self.num_heads)

    def merge(self, heads: Tensor) -> Tensor:
        """Merge the heads (B,H,L,D) and apply the output projection, giving (B,L,C) before the residual add."""
        return self.output(heads.transpose(1, 2).flatten(2))

    def plain(self, x: Tensor, token_mask: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        """Apply the layer's attention without prompts.

        Args:
            x: Block input (B,L,C), or (1,T,C) if packed.
            token_mask: Bool (B,L), True for tokens and False for padding; or (B,L,L), True where a query (row) sees a token.
            packing: Packing of the batch, if x is packed.

        Returns:
            Attention output in the shape of x, before the residual add.
        """
        if packing is not None:
            query, key, value = self.project(x)
            none = key[:, :, :0]
            offsets, max_length = packing.offsets, packing.max_length
            out = mope_kernels.prompt_attention(
                query, key, value, none, none, offsets=offsets, max_length=max_length, scale=self.scale
            )
            return self.merge(out)
        mask = None if token_mask is None else token_mask[:, None, None] if token_mask.ndim == 2 else token_mask[:, None]
        query, key, value = self.project(x)
        if self.bias is not None:
            bias = self.bias.to(query.dtype)
            mask = bias if mask is None else bias.masked_fill(~mask, -math.inf)
        return self.merge(F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale))


@dataclass(frozen=True, eq=False)
class PromptBank:
    """Projected prompts of one layer that do not depend on the batch.

    It holds the experts, and the static prompts as keys and values of shape (H,S,D). `versions` records the version of each
    parameter it was built from, so that a stale bank is detected.
    """

    experts: ExpertBank
    static_key: Tensor | None
    static_value: Tensor | None
    versions: tuple[int, ...]


class MoPEAttention(nn.Module):
    """Self-attention of a frozen layer over [static; mapped; dynamic prompts; tokens]; only prompts and router are trained.

    Prompts serve as keys and values only; no queries are computed for them. Static, mapped and dynamic prompts are each optional.
    Without experts there is no router and no routing. The state dict contains nothing of the frozen layer and does not depend
    on `impl`.

    Args:
        frozen: Modules of the layer. They are not registered here and stay part of the backbone.
        dim: Token width C.
        cross_dim: Width Cc of the complementary modality's feature; required with experts.
        num_experts: Number of experts K; 0 for no dynamic prompts.
        prompt_length: Number P of dynamic prompts per expert.
        static_length: Number S of prompts shared by all instances.
        bound: Prompts are initialised from U(-bound, bound). Default: sqrt(3 / C) in front of a LayerNorm, otherwise 0.3.
        prompt_dropout: Dropout probability on all prompts in training. It acts on the prompts of each instance, so the one-pass op
            is not used with it.
        router: "multimodal", "complementary", or None if several layers share a router, which is then passed to each call.
        router_options: self_width, cross_width, temperature, noise_std, router_embedding and renormalize; see `MultimodalRouter`.
        impl: Implementation of the fused ops.
    """

    def __init__(
        self,
        frozen: FrozenAttention,
        dim: int,
        cross_dim: int | None = None,
        *,
        num_experts: int = 0,
        prompt_length: int = 6,
        static_length: int = 0,
        bound: float | None = None,
        prompt_dropout: float = 0.0,
        router: str | None = "multimodal",
        impl: str = "auto",
        **router_options: Any,
    ) -> None:
        super().__init__()
        if num_experts and cross_dim is None:
            raise ValueError("MoPEAttention: a router needs the width of the complementary modality's feature: give cross_dim")
        bound = default_bound(frozen.norm, dim) if bound is None else bound
        self.frozen, self.impl = frozen, impl
        self.static = nn.Parameter(torch.empty(static_length, dim).uniform_(-bound, bound)) if static_length else None
        self.prompt_dropout = nn.Dropout(prompt_dropout)
        self.experts: PromptExperts | None = None
        if num_experts:
            self.experts = PromptExperts(num_experts, prompt_length, dim, bound=bound, impl=impl)
        self.router = make_router(router, dim, cross_dim, num_experts, impl=impl, **router_options)

    def forward(
        self,
        x: Tensor,
        cross: Tensor | None = None,
        mapped: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        token_mask: Tensor | None = None,
        packing: Packing | None = None,
        attn_bias: Tensor | None = None,
        noise: Tensor | None = None,
        top_k: int | None = None,
        bank: PromptBank | None = None,
        router: Router | None = None,
        frozen: FrozenAttention | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Attend from every token to the prompts and the tokens.

        Args:
            x: Block input (B,L,C).
            cross: Feature of the complementary modality (B,Cc), for the router.
            mapped: Mapped prompts (B,M,C).
            lengths: Number of tokens of each item, integer (B,), for right padding. Faster than `token_mask`.
            token_mask: Bool (B,L), True for tokens and False for padding, which may be anywhere.
            packing: Packing of the batch if x is (1,T,C) without padding. Prompts are then mixed before they are projected.
            attn_bias: Floating-point bias added to the scores of tokens; broadcastable to (B,H,L,L).
            noise: Router noise (B,K), drawn by the caller (`router.sample_noise`) so that recomputation uses the same noise.
            top_k: Number of experts to select; None for all.
            bank: Result of `build_bank`, to project the prompts once for many batches.
            router: Router shared by several layers, if this layer has none of its own.
            frozen: Modules of the layer, if they were replaced after construction.

        Returns:
            The attention output in the shape of x, before the residual add, and the `Routing` (None without experts).

        Raises:
            ValueError: If the layer has experts and no router or `cross` is given, or if `bank` is stale or was built without
                gradients for training.
        """
        frozen, router = frozen or self.frozen, router or self.router
        if frozen.bias is not None:
            attn_bias = frozen.bias.to(x.dtype) if attn_bias is None else attn_bias + frozen.bias
        if bank is not None:
            self._check_bank(bank)
        if self.experts is None:
            return self._attend(frozen, x, (mapped,), lengths, token_mask, packing, attn_bias), None

        if router is None:
            raise ValueError("MoPEAttention: this layer has experts but no router of its own: pass router")
        if cross is None:
            raise ValueError("MoPEAttention: the router needs cross, the feature (B,Cc) of the complementary modality")
        pooled = None
        if router.sees_tokens:
            pooled = mean_over_tokens(x, lengths, token_mask) if packing is None else packing.mean(x)
        is_plain = token_mask is None and packing is None and attn_bias is None
        if not (is_plain and self._bank_pays(frozen, x.shape[0], bank)):
            routing = router(pooled, cross, noise, top_k)
            dynamic = self.experts(routing.weights, routing.indices)
            return self._attend(frozen, x, (mapped, dynamic), lengths, token_mask, packing, attn_bias), routing

        bank = bank or self.build_bank(frozen)
        instance_key = instance_value = None
        if mapped is not None:
            instance_key, instance_value = frozen.keys_and_values(frozen.normalize(mapped.to(x.dtype)))
        out, routing = mope_kernels.mope_attention(
            *frozen.project(x),
            router.logits(pooled, cross),
            bank.experts,
            static_key=bank.static_key,
            static_value=bank.static_value,
            instance_key=instance_key,
            instance_value=instance_value,
            top_k=top_k,
            temperature=router.temperature,
            noise=noise,
            renormalize=router.renormalize,
            lengths=lengths,
            scale=frozen.scale,
            impl=self.impl,
        )
        return frozen.merge(out), routing

    def build_bank(self, frozen: FrozenAttention | None = None) -> PromptBank:
        """Project experts and static prompts in float32 (float64); the result is valid until a parameter changes.

        Raises:
            TypeError: If the experts cannot be folded into a bank, because the layer's norm is not a LayerNorm or the layer
                changes the keys of prompts after projection.
            ValueError: If there are no experts.
        """
        frozen = frozen or self.frozen
        if frozen.prepare_prompts is not None:
            raise TypeError("MoPEAttention: cannot build a bank, because this layer changes the keys of prompts after projection")
        if self.experts is None:
            raise ValueError("MoPEAttention: cannot build a bank, because this layer has no experts (num_experts=0)")
        projected = project_prompts(self.experts.prompts, self.static, frozen.key, frozen.value, frozen.norm, frozen.num_heads)
        return PromptBank(*projected, self._versions())

    def _bank_pays(self, frozen: FrozenAttention, batch: int, bank: PromptBank | None) -> bool:
        """Tell whether to use the one-pass op: its bank projects K*P rows, whereas mixing first projects B*P rows."""
        assert self.experts is not None
        if self._drops_prompts or not frozen.can_bank:
            return False
        # An implementation requested by name means one of the one-pass op.
        return bank is not None or self.impl not in ("auto", "reference") or len(self.experts.prompts) <= batch

    def _attend(
        self,
        frozen: FrozenAttention,
        x: Tensor,
        instance_prompts: tuple[Tensor | None, ...],
        lengths: Tensor | None,
        token_mask: Tensor | None,
        packing: Packing | None,
        attn_bias: Tensor | None,
    ) -> Tensor:
        """Attend from tokens x (B,L,C) to [static; instance prompts, each (B,M,C); tokens]; returns (B,L,C)."""
        batch, dim = x.shape[0] if packing is None else packing.shape[0], x.shape[-1]
        prompts = [p.to(x.dtype) for p in instance_prompts if p is not None]
        if self.static is not None:
            shared = not prompts and not self._drops_prompts
            prompts.insert(0, self.static.to(x.dtype).expand(1 if shared else batch, -1, -1))
        rows = self.prompt_dropout(torch.cat(prompts, dim=1)) if prompts else x.new_empty(1, 0, dim)
        if token_mask is not None:
            hidden = torch.zeros(token_mask.shape, dtype=x.dtype, device=x.device).masked_fill(~token_mask, -math.inf)
            attn_bias = hidden[:, None, None] if attn_bias is None else attn_bias + hidden[:, None, None]
        out = mope_kernels.prompt_attention(
            *frozen.project(x),
            *frozen.keys_and_values(frozen.normalize(rows)),
            lengths=lengths,
            attn_bias=attn_bias,
            offsets=None if packing is None else packing.offsets,
            max_length=None if packing is None else packing.max_length,
            scale=frozen.scale,
            impl=self.impl,
        )
        return frozen.merge(out)

    @property
    def _drops_prompts(self) -> bool:
        return self.training and self.prompt_dropout.p > 0

    def _versions(self) -> tuple[int, ...]:
        """Return the in-place version counters of the parameters that a bank is built from."""
        if torch.compiler.is_compiling():
            return ()
        return tuple(version(parameter) for name, parameter in self.named_parameters() if not name.startswith("router."))

    def _check_bank(self, bank: PromptBank) -> None:
        if bank.versions != self._versions() and not torch.compiler.is_compiling():
            raise ValueError("MoPEAttention: the prompts have changed since this bank was built: call build_bank() again")
        if self.training and torch.is_grad_enabled() and not bank.experts.key.requires_grad:
            raise ValueError(
                "MoPEAttention: this bank was built without gradients, so the experts would not train: do not pass bank"
            )


def default_bound(norm: nn.Module | None, dim: int) -> float:
    """Return the default bound of the initialisation U(-bound, bound) of prompts.

    It is sqrt(3 / dim) in front of a LayerNorm, that is variance 1 / dim, and otherwise 0.3, as published for BERT.
    """
    return 0.3 if norm is None else math.sqrt(3 / dim)


def mean_over_tokens(x: Tensor, lengths: Tensor | None = None, token_mask: Tensor | None = None) -> Tensor:
    """Average x (B,L,C) over the tokens that are not padding, in float32 (float64): (B,C). Padding may hold any values."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if lengths is not None:
        visible = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        token_mask = visible if token_mask is None else visible & token_mask
    if token_mask is None:
        return x.mean(1, dtype=dtype)
    total = x.masked_fill(~token_mask[..., None], 0).sum(1, dtype=dtype)
    return total / token_mask.sum(1, keepdim=True).clamp_min(1)
