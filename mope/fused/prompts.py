"""Prompt experts and their projection through a frozen layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import mope_kernels
from mope_kernels import ExpertBank
from mope_kernels.reference import autocast_off

from .plain import autocast_dtype

HALF = {torch.float16, torch.bfloat16}
FLOATS = HALF | {torch.float32, torch.float64}


def call_in_full_precision(module: nn.Module | Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Apply a frozen projection to float32 (float64) rows (R,C), giving (R,N) in the dtype of the rows, with autocast off.

    A 16-bit module runs with temporary copies of its parameters in the dtype of the rows. Under autocast, every module does, with
    its parameters first rounded to autocast's dtype, because it projects the tokens with those. Quantised modules are called
    unchanged.
    """
    rounded = autocast_dtype(rows.device, rows.dtype)
    with autocast_off(rows.device):
        if isinstance(module, nn.Module):
            tensors = dict(chain(module.named_parameters(), module.named_buffers()))
            dtypes = {t.dtype for t in tensors.values()}
            if dtypes <= FLOATS and (rounded is not None or dtypes & HALF):
                tensors = {name: t.to(rounded or t.dtype).to(rows.dtype) for name, t in tensors.items()}
                return functional_call(module, tensors, (rows,))
        return module(rows).to(rows.dtype)


def split_heads(rows: Tensor, num_heads: int) -> Tensor:
    """Split rows (..., L, H*D) into heads (..., H, L, D), as a view."""
    *outer, width = rows.shape
    return rows.view(*outer, num_heads, width // num_heads).transpose(-3, -2)


class PromptExperts(nn.Module):
    """Experts of prompts: K experts of P prompts each, initialised from U(-bound, bound).

    Args:
        num_experts: Number of experts K.
        prompt_length: Number of prompts per expert P.
        dim: Token width C.
        bound: Bound of the initialisation. Default: sqrt(3 / dim).
        impl: Implementation, see `mope_kernels.mix_prompts`.
    """

    def __init__(self, num_experts: int, prompt_length: int, dim: int, *, bound: float | None = None, impl: str = "auto") -> None:
        super().__init__()
        bound = math.sqrt(3 / dim) if bound is None else bound
        self.prompts = nn.Parameter(torch.empty(num_experts, prompt_length, dim).uniform_(-bound, bound))
        self.impl = impl

    def forward(self, weights: Tensor, indices: Tensor) -> Tensor:
        """Mix the experts by routing weights (B,k) and indices (B,k) into prompts (B,P,C), in the dtype of the experts."""
        return mope_kernels.mix_prompts(self.prompts, weights, indices, impl=self.impl)

    def bank(
        self, project_key: nn.Module, project_value: nn.Module, norm: nn.Module | None = None, num_heads: int = 1
    ) -> ExpertBank:
        """Project the experts to keys and values of one frozen layer, differentiably, for `mope_kernels.mope_attention`.

        The projections are affine maps C -> H*D. Each is called once and its parameters are never read: a projection f gives W x =
        f(x) - f(0), and f(beta) = W beta + b for the LayerNorm's bias beta. Computes in float32 (float64 for float64 experts), with
        autocast off.

        Raises:
            TypeError: If `norm` is not a LayerNorm over the last dimension, because the layer cannot be folded into a bank then.
        """
        return project_prompts(self.prompts, None, project_key, project_value, norm, num_heads)[0]

    def extra_repr(self) -> str:
        return "num_experts={}, prompt_length={}, dim={}".format(*self.prompts.shape)


class InputPrompts(nn.Module):
    """Prompts in front of the tokens of the first layer, passed through all layers (VPT-shallow, PromptFuse).

    Args:
        length: Number of prompts S; 0 for mapped prompts only.
        dim: Token width C.
        bound: Prompts are initialised from U(-bound, bound).
        dropout: Dropout probability on all prompts, including mapped ones, in training.
        blind: Prompts attend only to each other, not to tokens or mapped prompts, all of which attend to them (BlindPrompt).
    """

    def __init__(self, length: int, dim: int, *, bound: float, dropout: float = 0.0, blind: bool = False) -> None:
        super().__init__()
        self.length, self.prompts = length, nn.Parameter(torch.empty(length, dim).uniform_(-bound, bound)) if length else None
        self.dropout, self.blind = nn.Dropout(dropout), blind

    def forward(self, x: Tensor, mapped: Tensor | None = None) -> Tensor:
        """Put the prompts and the mapped prompts (B,M,C) in front of the tokens x (B,L,C), giving (B,S+M+L,C)."""
        added = [] if self.prompts is None else [self.prompts.expand(x.shape[0], -1, -1)]
        added += [] if mapped is None else [mapped]
        return torch.cat([*(self.dropout(prompts).to(x.dtype) for prompts in added), x], dim=1)

    def visible(self, token_mask: Tensor | None, x: Tensor) -> Tensor | None:
        """Extend a token mask (B,L) to the prompts, for `FrozenAttention.plain`.

        Args:
            token_mask: Mask of the tokens (B,L), without the prompts; None if all are visible.
            x: Output of `forward`.

        Returns:
            Mask (B,S+M+L), or (B or 1,S+M+L,S+M+L) if the prompts are blind; None if everything is visible.
        """
        rows = x.shape[1]
        if token_mask is not None:
            added = token_mask.new_ones(x.shape[0], rows - token_mask.shape[1])
            token_mask = torch.cat([added, token_mask], dim=1)
        if not self.blind:
            return token_mask
        is_prompt = torch.arange(rows, device=x.device) < self.length
        sees = ~is_prompt[:, None] | is_prompt
        return sees[None] if token_mask is None else sees & token_mask[:, None]

    def extra_repr(self) -> str:
        return f"length={self.length}, blind={self.blind}"


def project_prompts(
    experts: Tensor,
    static: Tensor | None,
    project_key: nn.Module,
    project_value: nn.Module,
    norm: nn.Module | None,
    num_heads: int,
) -> tuple[ExpertBank, Tensor | None, Tensor | None]:
    """Project experts (K,P,C) and static prompts (S,C) through one layer, calling each projection once.

    Returns the bank, and the keys and values of the static prompts, (H,S,D) each (None without static prompts).
    """
    num_experts, length, dim = experts.shape
    experts = experts.to(torch.promote_types(experts.dtype, torch.float32))
    beta = origin = experts.new_zeros(1, dim)
    shared = experts.new_empty(0, dim) if static is None else static.to(experts.dtype)
    gram, eps = None, 1e-5
    if norm is not None:
        if not isinstance(norm, nn.LayerNorm) or norm.normalized_shape != (dim,):
            raise TypeError(f"a bank needs norm to be None or nn.LayerNorm({dim}), got {norm}")
        eps = norm.eps
        gamma, bias = (None if t is None else t.to(experts.dtype) for t in (norm.weight, norm.bias))
        with autocast_off(experts.device):
            shared = F.layer_norm(shared, (dim,), gamma, bias, eps)
            experts = experts - experts.mean(-1, keepdim=True)
            gram = torch.einsum("ipc,jpc->pij", experts, experts) / dim
        experts = experts if gamma is None else experts * gamma
        beta = origin if bias is None else bias[None]
    rows = torch.cat([experts.flatten(0, 1), shared, origin, beta])

    def project(module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        out = split_heads(call_in_full_precision(module, rows), num_heads)
        of_experts, of_static, at_origin, offset = out.split([num_experts * length, len(shared), 1, 1], dim=1)
        return (of_experts - at_origin).unflatten(1, (num_experts, length)).transpose(0, 1), of_static, offset[:, 0]

    (key, static_key, key_offset), (value, static_value, value_offset) = project(project_key), project(project_value)
    bank = ExpertBank(key, value, gram=gram, key_offset=key_offset, value_offset=value_offset, eps=eps)
    return (bank, None, None) if static is None else (bank, static_key, static_value)
