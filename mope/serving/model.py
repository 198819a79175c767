"""Fusion model that holds the prompts of many tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mope_kernels
from mope.encoders.layerwise import LayerPrompts, LayerwiseEncoder, as_prompts
from mope.encoders.windowed import MoPESwinEncoder, WindowedEncoder, WindowPrompts
from mope.fused import MoPEAttention, MoPESwinBlock, Router
from mope.fused.plain import add
from mope.fusion import MoPEConfig, MoPEForClassification
from mope.fusion.checkpoint import LOADABLE
from mope.fusion.heads import new_head
from mope.fusion.model import EncoderInputs
from mope_kernels import Routing

from .stacks import LayerStatic, StackedHead, StackedModule, StackedPrompts, StackedRouter, TaskStack


class SwinStacks(nn.Module):
    """Task-specific parts of a `MoPESwinEncoder`, excluding routers."""

    def __init__(self, encoder: MoPESwinEncoder, capacity: int) -> None:
        super().__init__()
        stages = [[TaskStack(partial(_of_block, block), capacity) for block in stage] for stage in encoder.blocks()]
        self.stages: Any = nn.ModuleList(map(nn.ModuleList, stages))
        self.input = TaskStack(lambda: {"prompts": encoder.input_prompts}, capacity)
        self.mapper = None if encoder.mapper is None else StackedModule(encoder.mapper, capacity)
        self.stage_mappers: Any = nn.ModuleList(StackedModule(mapper, capacity) for mapper in encoder.stage_mappers)

    def mapped(self, task_ids: Tensor, cross: Tensor) -> list[Tensor]:
        """Compute the mapped prompt of each stage (B,1,C_s) from psi (B,Cc)."""
        hidden = cross if self.mapper is None else self.mapper(task_ids, cross)
        return [mapper(task_ids, hidden)[:, None] for mapper in self.stage_mappers]


class TaskPrompts(LayerPrompts):
    """Prompts of each item's own task, for the layers of an encoder.

    Args:
        stacks: Stack of each prompted layer, by layer index.
        task_ids: (B,) slots.
        **of_main: Additional arguments of layers of the main encoder: `cross`, `mapped` and `top_k`.
    """

    def __init__(self, stacks: Mapping[int, TaskStack], task_ids: Tensor, **of_main: Any) -> None:
        self._stacks, self._given = stacks, {"task_ids": task_ids, **of_main}

    def of_layer(self, index: int) -> dict[str, Any] | None:
        """Return the prompts and the arguments for the stack of a layer; None for a layer without prompts."""
        stack = self._stacks.get(index)
        return None if stack is None else {"prompts": stack, **self._given}


class TaskWindowPrompts(WindowPrompts):
    """Prompts of each item's own task, for a `MoPESwinEncoder`.

    Args:
        encoder: Encoder that uses the prompts.
        stacks: Stacks that hold the prompts.
        task_ids: (B,) slots.
        route: Function of a router, tokens, slots and psi that returns the routing of each item.
        cross: psi (B,Cc) in the main encoder; None in others.
    """

    def __init__(
        self,
        encoder: MoPESwinEncoder,
        stacks: SwinStacks,
        task_ids: Tensor,
        route: Callable[[Router, Tensor, Tensor, Tensor], Routing],
        cross: Tensor | None = None,
    ) -> None:
        self.routers = encoder.routers()
        self._stacks, self._task_ids, self._route, self._cross = stacks, task_ids, route, cross
        self._has_input = encoder.input_prompts is not None
        self._mapped = [] if cross is None else stacks.mapped(task_ids, cross)
        # A router that sees only psi makes one decision for all its blocks.
        self._decided: dict[int, Routing] = {}

    def of_input(self, tokens: Tensor) -> list[Tensor]:
        """Return the prompts of the encoder's input."""
        return [self._stacks.input["prompts"][self._task_ids].to(tokens.dtype)] if self._has_input else []

    def of_block(
        self, place: tuple[int, int], block: MoPESwinBlock, router: Router | None, x: Tensor, update: Tensor | None
    ) -> tuple[Tensor, Tensor | None, dict[str, Any] | None, Routing | None]:
        """Return the block's tokens and pending update, its static, routed and mapped prompts, and the routing."""
        (stage, i), task_ids = place, self._task_ids
        stack, prompts, routing = self._stacks.stages[stage][i], [], None
        if block.static is not None:
            prompts.append(stack["static"][task_ids])
        if router is not None and self._cross is not None:
            routing = self._decided.get(id(router))
            if routing is None:
                x, update = add(x, update), None
                routing = self._route(router, x, task_ids, self._cross)
            experts = stack["experts"]
            indices = routing.indices + experts.shape[1] * task_ids[:, None]
            prompts.append(mope_kernels.mix_prompts(experts.flatten(0, 1), routing.weights, indices, impl=block.impl))
        if self._mapped and prompts:
            prompts.append(self._mapped[stage])
        return x, update, {"mapped": torch.cat(prompts, dim=1)} if prompts else None, routing

    def decide(self, router: Router | None, routing: Routing | None) -> Routing | None:
        """Keep the routing for the other blocks of the router if it does not depend on the tokens."""
        if router is not None and routing is not None and not router.sees_tokens:
            self._decided[id(router)] = routing
        return routing


class MultiTaskModel(nn.Module):
    """Inference model that classifies each item of a batch with prompts, routers, mapper and head of its own task.

    `task` is a fusion model that holds the parameters of one task at a time, the last one staged. `stage` loads a task into it and
    projects the experts, `write` copies the result into a slot, and `classify` reads only slots.

    Args:
        config: Configuration of the tasks, which is the same for all of them except for labels.
        backbones: Backbones of all tasks, by modality.
        capacity: Number of slots.
        max_labels: Number of logits of each item; those after the labels of its task are -inf.
        dtype: Dtype of frozen weights, see `cast_frozen`.
    """

    def __init__(
        self,
        config: MoPEConfig,
        backbones: Mapping[str, nn.Module],
        *,
        capacity: int,
        max_labels: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.task = MoPEForClassification(config, **backbones)
        self.capacity = capacity
        self.added_dtype = torch.promote_types(next(backbones[config.main].parameters()).dtype, torch.float32)
        try:
            self.eval().requires_grad_(False)
            self.task.load_state_dict(self._in_added_dtype(self.task.added_state_dict()), strict=False, assign=True)
            # Cast first, because experts are projected with the cast weights.
            self.task.cast_frozen(dtype)
            with torch.no_grad(), self._autocast():
                self._make_stacks(max_labels)
        except BaseException:
            self.task.detach()
            raise

    @property
    def config(self) -> MoPEConfig:
        """Configuration of the tasks."""
        return self.task.config

    @property
    def device(self) -> torch.device:
        """Device of the backbones."""
        return self.task.device

    def _make_stacks(self, max_labels: int) -> None:
        task, capacity = self.task, self.capacity
        routers = {id(router): router for router in task.routers().values()}
        self._stack_of_router = {key: StackedRouter(router, capacity) for key, router in routers.items()}
        self.router_stacks = nn.ModuleList(self._stack_of_router.values())
        self.layer_stacks: Any = nn.ModuleDict()
        self.swin_stacks: Any = nn.ModuleDict()
        for modality in task.config.modalities:
            if isinstance(encoder := task.backbone(modality), MoPESwinEncoder):
                self.swin_stacks[modality] = SwinStacks(encoder, capacity)
            else:
                stacks = (self._layer_stack(modality, i, prompts) for i, prompts in task.prompts_of(modality).items())
                self.layer_stacks[modality] = nn.ModuleList(stacks)
        self.stacked_mapper = None if task.mapper is None else StackedModule(task.mapper, capacity)
        self.stacked_head = StackedHead(self._head, max_labels, capacity)

    def _layer_stack(self, modality: str, layer: int, prompts: MoPEAttention) -> TaskStack:
        task, encoder = self.task, self.task.encoder(modality)
        assert isinstance(encoder, LayerwiseEncoder)
        can_bank = modality != task.config.main or task.frozen_attention(modality, layer).can_bank
        if "attention_bias" in encoder.adapter.own_between or not can_bank:
            raise ValueError(
                f"the {modality} encoder cannot be served for many tasks, because its layers add a bias to scores or change the "
                "keys of prompts after projecting them: serve each task with model.serving()"
            )
        if modality == task.config.main:
            router: Any = prompts.router or task.router
            return StackedPrompts(
                lambda: prompts.build_bank(task.frozen_attention(modality, layer)),
                self._stack_of_router[id(router)],
                self.capacity,
                task.config.impl,
            )
        return LayerStatic(lambda: prompts.static, self.capacity, task.config.impl)

    def _head(self) -> nn.Sequential:
        return self.task.head

    def stacks(self) -> list[TaskStack]:
        """Return all modules that have slots."""
        return [module for module in self.modules() if isinstance(module, TaskStack)]

    def stage(self, config: MoPEConfig, tensors: dict[str, Tensor], file: Path) -> list[tuple[Tensor, Tensor]]:
        """Load a task into `task`, and return the pairs of stack and tensor to be written to its slot.

        Args:
            config: Configuration of the task.
            tensors: Tensors read from its file.
            file: The file, for errors.

        Raises:
            ValueError: Tensors are missing, do not fit, or hold numbers that are not finite. No slot is changed.
        """
        task = self.task
        # On the meta device: a corrupt file could request more labels than fit in memory.
        with torch.device("meta"):
            task.head = new_head(config, task.widths[config.main]).to(self.added_dtype)
        task.load_saved(self._in_added_dtype(tensors), file)
        broken = [name for name, tensor in task.added_state_dict().items() if not tensor.isfinite().all()]
        if broken:
            raise ValueError(f"{file} holds numbers that are not finite, in {', '.join(broken)}")
        with torch.no_grad(), self._autocast():
            if config.num_labels > self.stacked_head.num_labels:
                narrow, self.stacked_head = self.stacked_head, StackedHead(self._head, config.num_labels, self.capacity)
                self.stacked_head.take(narrow)
            return [pair for stack in self.stacks() for pair in stack.staged()]

    @torch.no_grad()
    def write(self, slot: int, staged: list[tuple[Tensor, Tensor]]) -> None:
        """Copy the result of `stage` to a slot."""
        for stack, tensor in staged:
            stack[slot].copy_(tensor)

    def clear(self, slot: int) -> None:
        """Zero the contents of a slot."""
        for stack in self.stacks():
            for tensor in stack.buffers(recurse=False):
                tensor[slot].zero_()

    def classify(self, task_ids: Tensor, *, cross_features: Tensor | None = None, **inputs: Any) -> Tensor:
        """Classify a batch, and return logits (B,max_labels).

        Args:
            task_ids: (B,) slots of the items' tasks.
            cross_features: See `MoPEForClassification.forward`.
            **inputs: See `MoPEForClassification.forward`.

        Raises:
            ValueError: An input is missing or does not fit, see `MoPEForClassification.forward`.
        """
        task, (main, *others) = self.task, self.config.modalities
        read = task.read(inputs, (main, *others) if cross_features is None else (main,))
        batch = read[main].batch
        if tuple(task_ids.shape) != (batch,):
            raise ValueError(f"tasks (task_ids) must be ({batch},), one for each item, got {tuple(task_ids.shape)}")
        if batch == 0:
            # vmap does not support an empty batch for some layers.
            return torch.empty(0, self.stacked_head.num_labels, dtype=self.added_dtype, device=self.device)
        with torch.no_grad(), self._autocast():
            if cross_features is None:
                cross = task.combine([self._encode(other, read[other], task_ids) for other in others])
            else:
                cross = task.check_cross_features(cross_features, batch)
            features = self._encode(main, read[main], task_ids, cross.to(self.added_dtype))
            return self.stacked_head(task_ids, features.to(self.added_dtype))

    def _encode(self, modality: str, inputs: EncoderInputs, task_ids: Tensor, cross: Tensor | None = None) -> Tensor:
        """Compute the feature (B,C) of an encoder; `cross` is given for the main encoder only."""
        encoder = self.task.encoder(modality)
        if isinstance(encoder, WindowedEncoder):
            stacks = self.swin_stacks[modality]
            return encoder.encode(*inputs, TaskWindowPrompts(encoder.backbone, stacks, task_ids, self._route, cross))[0]
        of_main: dict[str, Any] = {}
        if cross is not None:
            mapped = None if self.stacked_mapper is None else as_prompts(self.stacked_mapper(task_ids, cross))
            of_main = {"cross": cross, "mapped": mapped, "top_k": self.config.eval_top_k}
        stacks = dict(zip(self.task.prompts_of(modality), self.layer_stacks[modality], strict=True))
        return encoder.encode(*inputs, TaskPrompts(stacks, task_ids, **of_main))[0]

    def _route(self, router: Router, x: Tensor, task_ids: Tensor, cross: Tensor) -> Routing:
        pooled = x.mean(1, dtype=torch.promote_types(x.dtype, torch.float32)) if router.sees_tokens else None
        return mope_kernels.route(
            self._stack_of_router[id(router)].logits(task_ids, pooled, cross),
            top_k=self.config.eval_top_k,
            temperature=router.temperature,
            renormalize=router.renormalize,
            impl=router.impl,
        )

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = self.task.frozen_dtype
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def _in_added_dtype(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.to(self.added_dtype) if t.dtype in LOADABLE else t for name, t in tensors.items()}


def _of_block(block: MoPESwinBlock) -> dict[str, Tensor | None]:
    return {"static": block.static, "experts": None if block.experts is None else block.experts.prompts}
