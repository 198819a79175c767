"""A fusion model with the prompts of many tasks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mope_kernels
from mope.encoders.windowed import MoPESwinEncoder
from mope.fused import MoPEAttention, MoPESwinBlock, Router
from mope.fused.plain import add, add_norm
from mope.fusion import MoPEConfig, MoPEForClassification
from mope.fusion.checkpoint import LOADABLE
from mope.fusion.heads import new_head
from mope.fusion.model import REQUIRED, Padding
from mope_kernels import Routing

from .stacks import LayerPrompts, LayerStatic, StackedHead, StackedModule, StackedRouter, TaskStack


class SwinStacks(nn.Module):
    """What a `MoPESwinEncoder` has of each task, but for routers."""

    def __init__(self, encoder: MoPESwinEncoder, capacity: int) -> None:
        super().__init__()
        stages = [[TaskStack(partial(_of_block, block), capacity) for block in stage] for stage in encoder.blocks()]
        self.stages: Any = nn.ModuleList(map(nn.ModuleList, stages))
        self.input = TaskStack(lambda: {"prompts": encoder.input_prompts}, capacity)
        self.mapper = None if encoder.mapper is None else StackedModule(encoder.mapper, capacity)
        self.stage_mappers: Any = nn.ModuleList(StackedModule(mapper, capacity) for mapper in encoder.stage_mappers)

    def mapped(self, task_ids: Tensor, cross: Tensor) -> list[Tensor]:
        """The mapped prompt of each stage (B,1,C_s) from psi (B,Cc)."""
        hidden = cross if self.mapper is None else self.mapper(task_ids, cross)
        return [mapper(task_ids, hidden)[:, None] for mapper in self.stage_mappers]


class MultiTaskModel(MoPEForClassification):
    """Classifies each item of a batch with prompts, routers, mapper and head of its own task. For inference.

    Its own parameters are those of one task at a time, the last that was staged. `stage` puts a task there and projects its
    experts, `write` copies the result into a slot. `classify` reads slots only.

    Args:
        config: of the tasks; labels aside, all have the same.
        vision, text: the backbones of all tasks.
        capacity: number of slots.
        max_labels: the number of logits that each item gets, -inf behind those of its task.
        dtype: of frozen weights, see `cast_frozen`.
    """

    def __init__(
        self,
        config: MoPEConfig,
        *,
        vision: nn.Module,
        text: nn.Module,
        capacity: int,
        max_labels: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, vision=vision, text=text)
        self.capacity = capacity
        main: Any = {"vision": vision, "text": text}[config.main]
        self.added_dtype = torch.promote_types(next(main.parameters()).dtype, torch.float32)
        try:
            self.eval().requires_grad_(False)
            self.load_state_dict(self._in_added_dtype(self.added_state_dict()), strict=False, assign=True)
            # Experts are projected by what is left of the weights.
            self.cast_frozen(dtype)
            with torch.no_grad(), self._autocast():
                self._make_stacks(max_labels)
        except BaseException:
            self.detach()
            raise

    def _make_stacks(self, max_labels: int) -> None:
        config, capacity = self.config, self.capacity
        routers = {id(router): router for router in self._routers().values()}
        self._stack_of_router = {key: StackedRouter(router, capacity) for key, router in routers.items()}
        self.router_stacks = nn.ModuleList(self._stack_of_router.values())
        self.layer_stacks: Any = nn.ModuleDict()
        self.swin_stacks: SwinStacks | None = None
        for modality in config.modalities:
            if isinstance(encoder := self.backbone(modality), MoPESwinEncoder):
                self.swin_stacks = SwinStacks(encoder, capacity)
            else:
                stacks = (self._layer_stack(modality, i, prompts) for i, prompts in self._prompts_of(modality).items())
                self.layer_stacks[modality] = nn.ModuleList(stacks)
        self.stacked_mapper = None if self.mapper is None else StackedModule(self.mapper, capacity)
        self.stacked_head = StackedHead(self._head, max_labels, capacity)

    def _layer_stack(self, modality: str, layer: int, prompts: MoPEAttention) -> TaskStack:
        if modality == self.config.main:
            router: Any = prompts.router or self.router
            return LayerPrompts(
                lambda: prompts.build_bank(self._frozen(modality, layer)),
                self._stack_of_router[id(router)],
                self.capacity,
                self.config.impl,
            )
        return LayerStatic(lambda: prompts.static, self.capacity, self.config.impl)

    def _head(self) -> nn.Sequential:
        return self.head

    def stacks(self) -> list[TaskStack]:
        return [module for module in self.modules() if isinstance(module, TaskStack)]

    def stage(self, config: MoPEConfig, tensors: dict[str, Tensor], file: Path) -> list[tuple[Tensor, Tensor]]:
        """Put a task there: what goes into its slot, from the tensors of its file.

        Raises:
            ValueError: tensors are missing, do not fit, or hold numbers that are not finite. No slot has changed.
        """
        # A damaged file may ask for more labels than there is memory for.
        with torch.device("meta"):
            self.head = new_head(config, self._widths[config.main]).to(self.added_dtype)
        self.load_added(self._in_added_dtype(tensors), file)
        broken = [name for name, tensor in self.added_state_dict().items() if not tensor.isfinite().all()]
        if broken:
            raise ValueError(f"{file} holds numbers that are not finite, in {', '.join(broken)}")
        with torch.no_grad(), self._autocast():
            if config.num_labels > self.stacked_head.num_labels:
                narrow, self.stacked_head = self.stacked_head, StackedHead(self._head, config.num_labels, self.capacity)
                self.stacked_head.take(narrow)
            return [pair for stack in self.stacks() for pair in stack.staged()]

    @torch.no_grad()
    def write(self, slot: int, staged: list[tuple[Tensor, Tensor]]) -> None:
        for stack, tensor in staged:
            stack[slot].copy_(tensor)

    def clear(self, slot: int) -> None:
        for stack in self.stacks():
            for tensor in stack.buffers(recurse=False):
                tensor[slot].zero_()

    def classify(
        self,
        task_ids: Tensor,
        *,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cross_features: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> Tensor:
        """Logits (B,max_labels) from slots (B,) and what `forward` takes.

        Raises:
            ValueError: an input is missing or does not fit, see `forward`.
        """
        main, other = self.config.modalities
        inputs, padding = self._inputs(
            pixel_values, input_ids, attention_mask, token_type_ids, position_ids, interpolate_pos_encoding
        )
        self._check_given(inputs, (main, other) if cross_features is None else (main,))
        batch = inputs[main][REQUIRED[main]].shape[0]
        if tuple(task_ids.shape) != (batch,):
            raise ValueError(f"tasks (task_ids) must be ({batch},), one for each item, got {tuple(task_ids.shape)}")
        if batch == 0:
            # vmap knows no empty batch for some layers.
            return torch.empty(0, self.stacked_head.num_labels, dtype=self.added_dtype, device=self.device)
        with torch.no_grad(), self._autocast():
            if cross_features is None:
                cross = self._encode_tasks(other, inputs[other], padding[other], task_ids)
            else:
                cross = self._check_cross_features(cross_features, batch)
            features = self._encode_tasks(main, inputs[main], padding[main], task_ids, cross.to(self.added_dtype))
            return self.stacked_head(task_ids, features.to(self.added_dtype))

    def _encode_tasks(
        self, modality: str, inputs: dict[str, Tensor], padding: Padding, task_ids: Tensor, cross: Tensor | None = None
    ) -> Tensor:
        """The feature of an encoder (B,C); of the main one if `cross` is given."""
        if isinstance(encoder := self.backbone(modality), MoPESwinEncoder):
            return self._encode_swin_tasks(encoder, inputs["pixel_values"], task_ids, cross)
        backbone, adapter = self.backbone(modality), self._adapters[modality]
        of_layer = dict(zip(self._layers[modality], self.layer_stacks[modality], strict=True))
        of_main: dict[str, Any] = {}
        if cross is not None:
            mapped = None if self.stacked_mapper is None else self.stacked_mapper(task_ids, cross)[:, None]
            of_main = {"cross": cross, "mapped": mapped, "top_k": self.config.eval_top_k}
        hidden_states, packing = adapter.embed(backbone, inputs, padding.token_mask), None
        if padding.packing is not None and adapter.is_row_wise(backbone):
            packing, padding = padding.packing, Padding()
            hidden_states = packing.pack(hidden_states)
        mask = padding.as_mask(hidden_states.shape[1])
        for i, layer in enumerate(adapter.layers(backbone)):
            if i in of_layer:
                hidden_states, _ = layer(
                    hidden_states, prompts=of_layer[i], task_ids=task_ids, lengths=padding.lengths, packing=packing, **of_main
                )
            else:
                attended = adapter.attention(layer).plain(hidden_states, mask, packing)
                hidden_states = adapter.finish(layer, hidden_states, attended)
        first = padding.first_tokens(hidden_states) if packing is None else packing.first_tokens(hidden_states)
        return adapter.normalize(backbone, first)

    def _encode_swin_tasks(self, encoder: MoPESwinEncoder, pixel_values: Tensor, task_ids: Tensor, cross: Tensor | None) -> Tensor:
        """As `MoPESwinEncoder`, with the task (B,) of each item."""
        stacks = self.swin_stacks
        assert stacks is not None
        x, update = encoder.embed(pixel_values), None
        if encoder.input_prompts is not None:
            x = torch.cat([stacks.input["prompts"][task_ids].to(x.dtype), x], dim=1)
        mapped = [] if cross is None else stacks.mapped(task_ids, cross)
        # A router that sees psi only decides once for all its blocks.
        decided: dict[int, Routing] = {}
        for stage, (blocks, routers) in enumerate(zip(encoder.blocks(), encoder.routers(), strict=True)):
            for i, (block, router) in enumerate(zip(blocks, routers, strict=True)):
                stack, prompts = stacks.stages[stage][i], []
                if block.static is not None:
                    prompts.append(stack["static"][task_ids])
                if router is not None and cross is not None:
                    routing = decided.get(id(router))
                    if routing is None:
                        x, update = add(x, update), None
                        routing = self._route(router, x, task_ids, cross)
                    if not router.sees_tokens:
                        decided[id(router)] = routing
                    experts = stack["experts"]
                    indices = routing.indices + experts.shape[1] * task_ids[:, None]
                    prompts.append(mope_kernels.mix_prompts(experts.flatten(0, 1), routing.weights, indices, impl=block.impl))
                if mapped and prompts:
                    prompts.append(mapped[stage])
                own = {"mapped": torch.cat(prompts, dim=1)} if prompts else None
                x, update, _ = block.step(x, update, own)
            if stage < len(encoder.merges):
                x, update = encoder.merges[stage](add(x, update)), None
        _, normed = add_norm(x, update, encoder.norm, impl=encoder.impl)
        return normed.mean(1)

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
        return nullcontext() if self.frozen_dtype is None else torch.autocast(self.device.type, dtype=self.frozen_dtype)

    def _in_added_dtype(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.to(self.added_dtype) if t.dtype in LOADABLE else t for name, t in tensors.items()}


def _of_block(block: MoPESwinBlock) -> dict[str, Tensor | None]:
    return {"static": block.static, "experts": None if block.experts is None else block.experts.prompts}
