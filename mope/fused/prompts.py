"""Prompt experts, and their projection through a frozen layer."""

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

HALF = {torch.float16, torch.bfloat16}
FLOATS = HALF | {torch.float32, torch.float64}


def call_in_full_precision(module: nn.Module | Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """A frozen projection of float32 (float64) rows: (R,C) -> (R,N) in the dtype of the rows, autocast off.

    A 16-bit module runs with float32 copies of its parameters, made for this call; a quantised one decides for itself.
    """
    with torch.autocast(rows.device.type, enabled=False):
        if isinstance(module, nn.Module):
            tensors = dict(chain(module.named_parameters(), module.named_buffers()))
            dtypes = {t.dtype for t in tensors.values()}
            if dtypes & HALF and dtypes <= FLOATS:
                return functional_call(module, {name: t.to(rows.dtype) for name, t in tensors.items()}, (rows,))
        return module(rows).to(rows.dtype)


def split_heads(rows: Tensor, num_heads: int) -> Tensor:
    """(..., L, H*D) -> (..., H, L, D), a view."""
    return rows.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


class PromptExperts(nn.Module):
    """K experts of P prompts each, drawn from U(-bound, bound); `bound` defaults to sqrt(3 / dim).

    Args:
        num_experts: K.
        prompt_length: P.
        dim: C, width of the tokens that the prompts stand beside.
        impl: as in `mope_kernels.mix_prompts`.
    """

    def __init__(self, num_experts: int, prompt_length: int, dim: int, *, bound: float | None = None, impl: str = "auto") -> None:
        super().__init__()
        bound = math.sqrt(3 / dim) if bound is None else bound
        self.prompts = nn.Parameter(torch.empty(num_experts, prompt_length, dim).uniform_(-bound, bound))
        self.impl = impl

    def forward(self, weights: Tensor, indices: Tensor) -> Tensor:
        """Routing weights (B,k) and indices (B,k) -> dynamic prompts (B,P,C), in the dtype of the experts."""
        return mope_kernels.mix_prompts(self.prompts, weights, indices, impl=self.impl)

    def bank(
        self, project_key: nn.Module, project_value: nn.Module, norm: nn.Module | None = None, num_heads: int = 1
    ) -> ExpertBank:
        """The experts as keys and values of one frozen layer, differentiable: what `mope_kernels.mope_attention` takes.

        The projections, affine maps C -> H*D, are called, once each, and never read: f gives W x = f(x) - f(0) and, for the
        prompts that LayerNorm leaves at beta, f(beta). Float32, float64 for float64 experts; autocast is off.

        Raises:
            TypeError: `norm` is no LayerNorm over the last dimension; such a layer cannot be folded into a bank.
        """
        num_experts, length, dim = self.prompts.shape
        experts = self.prompts.to(torch.promote_types(self.prompts.dtype, torch.float32))
        origin, gram = experts.new_zeros(1, dim), None
        beta = origin
        if norm is not None:
            if not isinstance(norm, nn.LayerNorm) or norm.normalized_shape != (dim,):
                raise TypeError(f"PromptExperts.bank: norm must be None or nn.LayerNorm({dim}), got {norm}")
            with torch.autocast(experts.device.type, enabled=False):
                experts = experts - experts.mean(-1, keepdim=True)
                gram = torch.einsum("ipc,jpc->pij", experts, experts) / dim
            if norm.weight is not None:
                experts = experts * norm.weight.to(experts.dtype)
            if norm.bias is not None:
                beta = norm.bias.to(experts.dtype)[None]
        rows = torch.cat([experts.flatten(0, 1), origin, beta])

        def project(module: nn.Module) -> tuple[Tensor, Tensor]:
            out = call_in_full_precision(module, rows)
            linear = (out[:-2] - out[-2]).unflatten(0, (num_experts, length))
            return split_heads(linear, num_heads), out[-1].unflatten(0, (num_heads, -1))

        (key, key_offset), (value, value_offset) = project(project_key), project(project_value)
        return ExpertBank(
            key,
            value,
            gram=gram,
            key_offset=key_offset,
            value_offset=value_offset,
            eps=1e-5 if norm is None else norm.eps,
        )

    def extra_repr(self) -> str:
        return "num_experts={}, prompt_length={}, dim={}".format(*self.prompts.shape)


def layer_norm_in_full_precision(norm: nn.Module | None, rows: Tensor) -> Tensor:
    """LayerNorm of float32 (float64) rows, whatever the dtype of the frozen module."""
    if norm is None:
        return rows
    if isinstance(norm, nn.LayerNorm):
        weight, bias = (None if t is None else t.to(rows.dtype) for t in (norm.weight, norm.bias))
        return F.layer_norm(rows, norm.normalized_shape, weight, bias, norm.eps)
    return call_in_full_precision(norm, rows)
