"""Putting prompted layers into a transformers model, and taking them out again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from mope.checks import check_encoder
from mope.fused import ExpertAdapter, FrozenAttention, MoPEAttention
from mope_kernels import Routing

from .base import BackboneAdapter
from .registry import find_adapter, find_architecture


def original_state_dict(backbone: nn.Module) -> dict[str, Tensor]:
    """The state dict of a backbone under the names that it has without prompts; what plays no part here is left out."""
    unused = find_architecture(backbone).unused
    return {name: t for name, t in _under_original_names(backbone).items() if not (unused and name.startswith(unused))}


def _under_original_names(backbone: nn.Module) -> dict[str, Tensor]:
    prefixes = {f"{name}.layer.": f"{name}." for name, module in backbone.named_modules() if isinstance(module, PromptedLayer)}

    def original(name: str) -> str:
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        return name if prefix is None else prefixes[prefix] + name[len(prefix) :]

    return {original(name): t for name, t in backbone.state_dict().items()}


def _save_under_original_names(backbone: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """`save_pretrained` of an encoder while it is prompted."""
    if len(args) < 3:
        kwargs.setdefault("state_dict", _under_original_names(backbone))
    return type(backbone).save_pretrained(backbone, *args, **kwargs)


def wrapped_by_peft(backbone: nn.Module) -> str:
    """Return the class of peft around or in a backbone, "" if there is none."""
    for module in backbone.modules():
        if type(module).__module__.partition(".")[0] == "peft":
            return type(module).__name__
    return ""


def base_model(backbone: nn.Module) -> nn.Module:
    """The bare model under a task head: ViTModel of a ViTForImageClassification. TypeError or ValueError: see `check_encoder`."""
    check_encoder(backbone)
    return backbone.base_model if isinstance(backbone, PreTrainedModel) else backbone


class PromptedLayer(nn.Module):
    """Stands for a frozen block and runs it with prompts. Without prompts it refuses: they would be skipped in silence."""

    def __init__(self, layer: nn.Module, adapter: BackboneAdapter) -> None:
        super().__init__()
        self.layer, self.adapter = layer, adapter

    def forward(
        self, hidden_states: Tensor, *args: Any, prompts: MoPEAttention | None = None, context: Any = None, **inputs: Any
    ) -> tuple[Tensor, Routing | None]:
        """(B,L,C) -> (B,L,C) and the routing; `context` is that of the adapter, `inputs` are the other arguments of `prompts`."""
        if prompts is None:
            raise RuntimeError(
                "this backbone has prompts attached and was called by itself, which would skip them: call the fusion model, "
                "or detach() the prompts first"
            )
        attention_output, routing = prompts(hidden_states, frozen=self.adapter.attend(self.layer, context), **inputs)
        return self.adapter.finish(self.layer, hidden_states, attention_output), routing


class Attachment:
    """A backbone that is frozen (unless it is fine-tuned), in eval mode, and prompted in some of its layers. `detach` undoes it."""

    def __init__(self, backbone: nn.Module, layers: Sequence[int], adapter: BackboneAdapter, finetune: bool = False) -> None:
        self.backbone, self.adapter, self.attached = backbone, adapter, True
        blocks = adapter.layers(backbone)
        self.layers = tuple(layers)
        self._original = {i: blocks[i] for i in self.layers}
        self._training = {module: module.training for module in backbone.modules()}
        self._requires_grad = {parameter: parameter.requires_grad for parameter in backbone.parameters()}
        try:
            backbone.eval()
            for name, parameter in backbone.named_parameters():
                parameter.requires_grad_(finetune and not name.startswith((*adapter.unused, *adapter.unreached)))
            for i, layer in self._original.items():
                blocks[i] = PromptedLayer(layer, adapter).eval()
            if isinstance(backbone, PreTrainedModel):
                # The prompted layers add a part to the names of weights, and such a file could not be loaded.
                vars(backbone)["save_pretrained"] = partial(_save_under_original_names, backbone)
            if not finetune and (peft := wrapped_by_peft(backbone)):
                warnings.warn(
                    f"{peft}: the adapters of peft in this encoder are frozen like all of it; prompts, routers and head train. "
                    "Call merge_and_unload() on it before to make them a part of its weights",
                    stacklevel=4,
                )
            self.join_projections()
        except BaseException:
            self.detach()
            raise

    def join_projections(self) -> None:
        """Let one product compute query, key and value of a layer, where they are frozen. Again after parameters were moved."""
        for attention in self._attentions():
            attention.join()

    def _attentions(self) -> Iterator[FrozenAttention]:
        for block in self.adapter.layers(self.backbone):
            yield self.adapter.attention(block.layer if isinstance(block, PromptedLayer) else block)

    def detach(self) -> None:
        """Put the same modules back, with the training mode and requires_grad that they had. A second call does nothing."""
        if not self.attached:
            return
        for attention in self._attentions():
            attention.separate()
        vars(self.backbone).pop("save_pretrained", None)
        blocks = self.adapter.layers(self.backbone)
        for i, layer in self._original.items():
            blocks[i] = layer
        for module, training in self._training.items():
            module.training = training
        for parameter, requires_grad in self._requires_grad.items():
            parameter.requires_grad_(requires_grad)
        self.attached = False


def attach(backbone: nn.Module, layers: Sequence[int] | None = None, *, finetune: bool = False) -> Attachment:
    """Freeze a transformers model and make its `layers` (all of them by default) wait for prompts.

    With `finetune` its own parameters train as well, all that play a part here.

    Raises:
        ValueError: the architecture is unknown or its config cannot be honoured, prompts are attached already, or a layer
            does not exist.
    """
    adapter = find_adapter(backbone)
    blocks = adapter.layers(backbone)
    if any(isinstance(block, PromptedLayer) for block in blocks):
        raise ValueError(
            f"{type(backbone).__name__} has prompts attached already: detach() them first, or give each model its own copy"
        )
    if any(isinstance(getattr(block, kind, None), ExpertAdapter) for block in blocks for kind in ("visual_msa", "textual_msa")):
        raise ValueError(
            f"{type(backbone).__name__} has ModeX adapters attached, which prompted attention would skip: detach() them first"
        )
    layers = range(len(blocks)) if layers is None else layers
    if any(not 0 <= i < len(blocks) for i in layers):
        raise ValueError(f"layers to prompt must lie in 0..{len(blocks) - 1}, got {list(layers)}")
    return Attachment(backbone, layers, adapter, finetune)
