"""A stand-in for `xformers.ops` where the library cannot run: plain PyTorch on any device instead of the library's kernels.

It covers the functions that mope_kernels uses, on the documented layout (B,L,H,D), and refuses what version 0.0.35 refuses:
other shapes, mixed dtypes, dropout of partial attentions, unaligned rows. `PlainKernels` covers the rest: it runs the library's
own Python code with plain PyTorch in place of its kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


class LowerTriangularMask:
    """Causal mask: query i sees keys 0..i."""


@dataclass
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    attn_bias: Tensor | LowerTriangularMask | None = None
    p: float = 0.0
    scale: float | None = None
    is_partial: bool = False

    def validate(self) -> None:
        batch, length, heads, width = self.key.shape
        if self.value.shape != self.key.shape or self.query.shape != (batch, self.query.shape[1], heads, width):
            raise ValueError("Incompatible shapes for attention inputs: broadcasting is not supported")
        if not self.query.dtype == self.key.dtype == self.value.dtype:
            raise ValueError("Query/Key/Value should all have the same dtype")
        if isinstance(self.attn_bias, Tensor):
            if self.attn_bias.shape != (batch, heads, self.query.shape[1], length):
                raise ValueError(f"Invalid shape for attention bias: {tuple(self.attn_bias.shape)}")
            if self.attn_bias.dtype != self.query.dtype:
                raise RuntimeError("invalid dtype for bias - should match query's dtype")
        # The kernels load 16 bytes at a time, although the Python checks do not enforce the alignment.
        for t in (self.query, self.key, self.value, self.attn_bias):
            if isinstance(t, Tensor) and t.numel() and (t.stride(-1) != 1 or t.data_ptr() % 16):
                raise RuntimeError("must be contiguous at last dim, and aligned")


class _Kernel:
    NAME: str
    DTYPES: tuple[torch.dtype, ...]
    BIASES: tuple[type, ...]
    LARGEST_HEAD = 65_536
    PARTIAL = True

    @classmethod
    def not_supported_reasons(cls, inputs: Inputs) -> list[str]:
        reasons = []
        alignment = 128 // torch.finfo(inputs.query.dtype).bits
        if inputs.query.shape[-1] > cls.LARGEST_HEAD:
            reasons.append(f"max(query.shape[-1], value.shape[-1]) > {cls.LARGEST_HEAD}")
        if inputs.query.dtype not in cls.DTYPES:
            reasons.append(f"dtype={inputs.query.dtype} (supported: {cls.DTYPES})")
        if type(inputs.attn_bias) not in cls.BIASES:
            reasons.append(f"attn_bias type is {type(inputs.attn_bias)}")
        if inputs.is_partial and not cls.PARTIAL:
            reasons.append("Partial attention not supported")
        for name in ("query", "key", "value"):
            t = getattr(inputs, name)
            if t.shape[-1] % alignment:
                reasons.append(f"{name}.shape[-1] % {alignment} != 0")
            elif t.stride(-2) % alignment:
                reasons.append(f"{name}.stride(-2) % {alignment} != 0")
            if t.stride(-1) > 1:
                reasons.append(f"{name}.stride(-1) > 1")
        if isinstance(inputs.attn_bias, Tensor):
            if any(s % alignment for s in inputs.attn_bias.stride()[:-1]):
                reasons.append(f"attn_bias.stride(-2) % {alignment} != 0")
            if inputs.attn_bias.stride(-1) > 1:
                reasons.append("attn_bias.stride(-1) > 1")
        return reasons


class Flash(_Kernel):
    NAME = "flash (stand-in)"
    DTYPES = (torch.float16, torch.bfloat16)
    BIASES = (type(None), LowerTriangularMask)
    LARGEST_HEAD = 256


class CutlassBackward(_Kernel):
    NAME = "cutlass (stand-in)"
    DTYPES = (torch.float32, torch.float16, torch.bfloat16)
    BIASES = (type(None), LowerTriangularMask, Tensor)


class Cutlass(CutlassBackward):
    PARTIAL = False


def _attend(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return output (B,M,H,D) and log-sum-exp (B,H,M); products use the inputs' dtype, sums float32."""
    inputs.validate()
    refusals = [reasons for kernel in (Flash, Cutlass) if (reasons := kernel.not_supported_reasons(inputs))]
    if len(refusals) == 2:
        # The library raises this error if no kernel accepts the inputs.
        raise NotImplementedError(f"No operator found: {refusals}")
    query, key, value = (t.float().transpose(1, 2) for t in (inputs.query, inputs.key, inputs.value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if inputs.scale is None else inputs.scale)
    if isinstance(inputs.attn_bias, LowerTriangularMask):
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    elif inputs.attn_bias is not None:
        scores = scores + inputs.attn_bias
    probabilities = torch.nn.functional.dropout(scores.softmax(-1), inputs.p)
    out = probabilities.to(inputs.value.dtype).float() @ value
    return out.transpose(1, 2).contiguous().to(inputs.value.dtype), scores.logsumexp(-1)


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | LowerTriangularMask | None = None,
    p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    return _attend(Inputs(query, key, value, attn_bias, p, scale))[0]


def memory_efficient_attention_partial_autograd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | LowerTriangularMask | None = None,
    p: float = 0.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    if p:
        # The library's error, since its partial attention has no dropout.
        raise NotImplementedError("dropout is not supported.")
    return _attend(Inputs(query, key, value, attn_bias, p, scale, is_partial=True))


def merge_attentions_autograd(*partials: tuple[Tensor, Tensor]) -> Tensor:
    outputs, sums = zip(*partials, strict=True)
    # (B,H,M) -> (B,M,H,1)
    weights = torch.stack(sums).softmax(0).transpose(-1, -2)[..., None]
    return sum(weight * out.float() for weight, out in zip(weights, outputs, strict=True)).to(outputs[0].dtype)


fmha = SimpleNamespace(
    Inputs=Inputs,
    merge_training=SimpleNamespace(
        memory_efficient_attention_partial_autograd=memory_efficient_attention_partial_autograd,
        merge_attentions_autograd=merge_attentions_autograd,
    ),
)
MemoryEfficientAttentionFlashAttentionOp = (Flash, Flash)
MemoryEfficientAttentionCutlassOp = (Cutlass, CutlassBackward)


class PlainKernels:
    """Run the real xformers on the CPU: its own checks, dispatch, layouts and autograd over plain PyTorch kernels.

    Forward kernels return the log-sum-exp, and backward kernels recompute the probabilities from the log-sum-exp they receive. This
    tests how the library merges the log-sum-exps of two parts.
    """

    @classmethod
    def install(cls, library: Any, patch: pytest.MonkeyPatch) -> None:
        flash, cutlass = library.fmha.flash, library.fmha.cutlass
        # These depend on the GPU: the order of the kernels and some of their limits.
        patch.setattr(torch.version, "cuda", "12.8")
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(cutlass, "_minimum_gemm_alignment", lambda inputs: 128 // torch.finfo(inputs.query.dtype).bits)
        patch.setattr(library.fmha.triton_splitk, "merge_attentions_varargs", cls.merge)
        kernels = {
            flash.FwOp: cls.flash_forward,
            flash.BwOp: cls.flash_backward,
            cutlass.FwOp: cls.cutlass_forward,
            cutlass.BwOp: cls.cutlass_backward,
        }
        for operator, kernel in kernels.items():
            patch.setattr(operator, "OPERATOR", kernel)
            patch.setattr(operator, "SUPPORTED_DEVICES", {"cpu"})

    @staticmethod
    def _scores(query: Tensor, key: Tensor, bias: Tensor | None, scale: float, is_causal: bool) -> Tensor:
        scores = query.float().transpose(1, 2) @ key.float().permute(0, 2, 3, 1) * scale
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
        return scores if bias is None else scores + bias

    @staticmethod
    def _kept(scores: Tensor, p: float, seed: Tensor | None) -> Tensor | float:
        """Return the factor that dropout applies to the probabilities."""
        if not p:
            return 1.0
        return torch.rand(scores.shape, generator=torch.Generator().manual_seed(int(seed))).ge(p) / (1 - p)

    @classmethod
    def _forward(
        cls, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, p: float, scale: float, is_causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores, seed = cls._scores(query, key, bias, scale, is_causal), torch.randint(2**30, ())
        probabilities = (scores.softmax(-1) * cls._kept(scores, p, seed)).to(value.dtype).float()
        out = (probabilities @ value.float().transpose(1, 2)).transpose(1, 2).contiguous()
        return out.to(value.dtype), scores.logsumexp(-1), seed

    @classmethod
    def _backward(
        cls,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        out: Tensor,
        lse: Tensor,
        p: float,
        scale: float,
        is_causal: bool,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores = cls._scores(query, key, bias, scale, is_causal)
        kept, probabilities = cls._kept(scores, p, seed), (scores - lse[:, :, : query.shape[1], None]).exp()
        g, q, k, v, o = (t.float().transpose(1, 2) for t in (grad, query, key, value, out))
        grad_scores = probabilities * (g @ v.mT * kept - (g * o).sum(-1, keepdim=True)) * scale
        grads = (grad_scores @ k, grad_scores.mT @ q, (probabilities * kept).mT @ g)
        return tuple(t.transpose(1, 2).to(query.dtype) for t in grads)

    @classmethod
    def flash_forward(cls, query, key, value, _cu_q, _cu_k, _used, _max_q, _max_k, p, scale, is_causal, **_: Any):
        return cls._forward(query, key, value, None, p, scale, is_causal)

    @classmethod
    def flash_backward(
        cls, _shared, grad, query, key, value, out, lse, _cu_q, _cu_k, _max_q, _max_k, p, scale, is_causal, *, rng_state, **_: Any
    ):
        return cls._backward(grad, query, key, value, None, out, lse, p, scale, is_causal, rng_state)

    @classmethod
    def cutlass_forward(cls, *, query, key, value, bias, dropout_p, custom_mask_type, scale, **_: Any):
        out, lse, seed = cls._forward(query, key, value, bias, dropout_p, scale, custom_mask_type == 1)
        # The kernel pads its log-sum-exp to multiples of 32.
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)
        return out, lse, seed, seed, query.shape[1], key.shape[1]

    @classmethod
    def cutlass_backward(
        cls, grad, query, key, value, *, bias, logsumexp, out, dropout_p, philox_seed, custom_mask_type, scale, **_: Any
    ):
        is_causal = custom_mask_type == 1
        grads = cls._backward(grad, query, key, value, bias, out, logsumexp, dropout_p, scale, is_causal, philox_seed)
        return *grads, None

    @staticmethod
    def merge(outputs, sums, _write, dtype, *_sizes: int) -> list[Tensor]:
        """Merge parts (B,G,H,M,D) with log-sum-exps (B,G,H,M) into (B,M,G,H,D) and (B,G,H,M)."""
        sums = torch.stack(list(sums))
        merged = (sums.softmax(0)[..., None] * torch.stack(list(outputs)).float()).sum(0)
        return [merged.permute(0, 3, 1, 2, 4).to(dtype or outputs[0].dtype), sums.logsumexp(0)]
