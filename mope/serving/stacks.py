"""Stacked tensors of many tasks, and modules that process each item with the tensors of its own task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import mope_kernels
from mope.fused import FrozenAttention, PromptBank, Router
from mope.fused.attention import mean_over_tokens
from mope.fused.packing import Packing
from mope.fused.prompts import split_heads
from mope_kernels import ExpertBank, Routing


class TaskStack(nn.Module):
    """Tensors of `capacity` tasks, stacked along the first axis, with one slot per task.

    All memory is allocated when the stack is created and never moves, so compiled code and recorded graphs stay valid.

    Args:
        of_task: Function that returns the slot's tensors by name, computed from the weights in the model's own modules; None for
            tensors that do not exist.
        capacity: Number of slots.
    """

    def __init__(self, of_task: Callable[[], Mapping[str, Tensor | None]], capacity: int) -> None:
        super().__init__()
        self.of_task = of_task
        for name, tensor in of_task().items():
            stack = None if tensor is None else tensor.new_zeros(capacity, *tensor.shape)
            self.register_buffer(_buffer(name), stack, persistent=False)

    def __getitem__(self, name: str) -> Tensor:
        """Return a stack (capacity, ...) by its name in `of_task`."""
        return self.get_buffer(_buffer(name))

    def staged(self) -> list[tuple[Tensor, Tensor]]:
        """Return each stack (capacity, ...) with the tensor to be written to one of its slots."""
        return [(self[name], tensor) for name, tensor in self.of_task().items() if tensor is not None]


class StackedModule(TaskStack):
    """Module that processes each item, (B, ...) -> (B, ...), with the weights of the item's task.

    Args:
        module: Module that holds the weights of one task; it must treat items independently.
        capacity: Number of slots.
    """

    def __init__(self, module: nn.Module, capacity: int) -> None:
        super().__init__(lambda: _tensors(module), capacity)
        self.names = tuple(_tensors(module))

        def of_item(weights: dict[str, Tensor], item: tuple[Tensor, ...]) -> Tensor:
            output: Tensor = functional_call(module, weights, tuple(x[None] for x in item))
            return output[0]

        self._of_items = torch.vmap(of_item)

    def forward(self, task_ids: Tensor, *inputs: Tensor) -> Tensor:
        """Apply the module: slots (B,) and inputs (B, ...) -> outputs (B, ...)."""
        return self._of_items({name: self[name][task_ids] for name in self.names}, inputs)


class StackedHead(StackedModule):
    """Heads with any number of labels up to `num_labels`; logits after the labels of an item's task are -inf.

    Args:
        head: Function that returns the head in the model's own modules.
        num_labels: Number of logits.
        capacity: Number of slots.
    """

    def __init__(self, head: Callable[[], nn.Sequential], num_labels: int, capacity: int) -> None:
        super().__init__(_widened(head(), num_labels), capacity)
        self.of_task = lambda: _tensors(_widened(head(), num_labels))
        self.num_labels = num_labels

    def take(self, other: StackedHead) -> None:
        """Copy the heads of a stack that has fewer labels."""
        for name in self.names:
            self[name].fill_(-math.inf if name.endswith("bias") else 0.0)
            self[name][tuple(map(slice, other[name].shape))] = other[name]


class StackedRouter(StackedModule):
    """Router that computes the logits of each item with the weights of the item's task."""

    def __init__(self, router: Router, capacity: int) -> None:
        super().__init__(_Logits(router), capacity)
        self.sees_tokens, self.temperature, self.renormalize = router.sees_tokens, router.temperature, router.renormalize

    def logits(self, task_ids: Tensor, pooled: Tensor | None, cross: Tensor) -> Tensor:
        """Compute routing logits (B,K) from slots (B,), pooled tokens (B,C) or None, and psi (B,Cc)."""
        return self(task_ids, cross) if pooled is None else self(task_ids, cross, pooled)


class StackedPrompts(TaskStack):
    """Static prompts and experts of one layer, projected when a task is loaded, see `MoPEAttention.build_bank`.

    Args:
        build: Function that builds the bank from the weights in the model's own modules.
        router: Router of this layer; layers may share it.
        capacity: Number of slots.
        impl: Implementation of the op.
    """

    def __init__(self, build: Callable[[], PromptBank], router: StackedRouter, capacity: int, impl: str) -> None:
        def of_task() -> dict[str, Tensor | None]:
            bank = build()
            experts = {name: getattr(bank.experts, name) for name in ("key", "value", "gram")}
            return {**experts, "static_key": bank.static_key, "static_value": bank.static_value}

        super().__init__(of_task, capacity)
        self.router, self.impl = router, impl
        # These belong to the frozen layer and are the same for all tasks.
        experts = build().experts
        self.offsets = {"key_offset": experts.key_offset, "value_offset": experts.value_offset}
        self.eps = experts.eps

    def forward(
        self,
        x: Tensor,
        *,
        frozen: FrozenAttention,
        task_ids: Tensor,
        cross: Tensor,
        mapped: Tensor | None,
        lengths: Tensor | None,
        packing: Packing | None,
        top_k: int | None,
        token_mask: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """Attend like `MoPEAttention`, with slots (B,); return the output in the shape of x, and the routing."""
        _refuse_mask(token_mask)
        instance_key = instance_value = None
        if mapped is not None:
            instance_key, instance_value = frozen.keys_and_values(frozen.normalize(mapped.to(x.dtype)))
        router = self.router
        pooled = None
        if router.sees_tokens:
            pooled = mean_over_tokens(x, lengths) if packing is None else packing.mean(x)
        query, key, value = frozen.project(x)
        if packing is not None:
            # The op needs a padded batch. Everything around it runs without padding.
            query, key, value = (_unpacked(heads, packing) for heads in (query, key, value))
            lengths = packing.offsets.diff()
        bank = ExpertBank(
            self["key"].flatten(0, 1),
            self["value"].flatten(0, 1),
            gram=self._buffers["gram"],
            eps=self.eps,
            **self.offsets,
        )
        out, routing = mope_kernels.mope_attention(
            query,
            key,
            value,
            router.logits(task_ids, pooled, cross),
            bank,
            static_key=self._buffers["static_key"],
            static_value=self._buffers["static_value"],
            instance_key=instance_key,
            instance_value=instance_value,
            top_k=top_k,
            temperature=router.temperature,
            renormalize=router.renormalize,
            lengths=lengths,
            scale=frozen.scale,
            task_ids=task_ids,
            impl=self.impl,
        )
        return frozen.merge(out if packing is None else _packed(out, packing)), routing


class LayerStatic(TaskStack):
    """Static prompts (S,C) of a layer without experts.

    Args:
        static: Function that returns the prompts in the model's own modules.
        capacity: Number of slots.
        impl: Implementation of the op.
    """

    def __init__(self, static: Callable[[], Tensor | None], capacity: int, impl: str) -> None:
        super().__init__(lambda: {"static": static()}, capacity)
        self.impl = impl

    def forward(
        self,
        x: Tensor,
        *,
        frozen: FrozenAttention,
        task_ids: Tensor,
        lengths: Tensor | None,
        packing: Packing | None,
        token_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attend like `MoPEAttention`, with slots (B,); return the output in the shape of x, and None for the routing."""
        _refuse_mask(token_mask)
        out = mope_kernels.prompt_attention(
            *frozen.project(x),
            *frozen.keys_and_values(frozen.normalize(self["static"][task_ids].to(x.dtype))),
            lengths=lengths,
            offsets=None if packing is None else packing.offsets,
            max_length=None if packing is None else packing.max_length,
            scale=frozen.scale,
            impl=self.impl,
        )
        return frozen.merge(out), None


def _refuse_mask(token_mask: Tensor | None) -> None:
    if token_mask is not None:
        raise ValueError("only padding on the right is served: put the tokens before the padding in each item")


class _Logits(nn.Module):
    """Part of a router that computes its logits."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, cross: Tensor, pooled: Tensor | None = None) -> Tensor:
        return self.router.logits(pooled, cross)


def _unpacked(heads: Tensor, packing: Packing) -> Tensor:
    """Unpack heads (1,H,T,D) -> (B,H,L,D)."""
    return split_heads(packing.unpack(heads.transpose(1, 2).flatten(2)), heads.shape[1])


def _packed(heads: Tensor, packing: Packing) -> Tensor:
    """Pack heads (B,H,L,D) -> (1,H,T,D)."""
    return split_heads(packing.pack(heads.transpose(1, 2).flatten(2)), heads.shape[1])


def _widened(head: nn.Sequential, num_labels: int) -> nn.Sequential:
    """Return a head widened to `num_labels` labels, with logits of -inf for the additional ones."""
    *others, last = cast(Any, head)
    more = num_labels - last.out_features
    wide = nn.Linear(last.in_features, num_labels, device="meta")
    wide.weight = nn.Parameter(F.pad(last.weight, (0, 0, 0, more)), requires_grad=False)
    wide.bias = nn.Parameter(F.pad(last.bias, (0, more), value=-math.inf), requires_grad=False)
    return nn.Sequential(*others, wide)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _buffer(name: str) -> str:
    """Return a valid name for a buffer, which may not contain dots."""
    return name.replace(".", "/")
