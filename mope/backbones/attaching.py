"""Attach prompted layers to a transformers model, and detach them."""

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
    """Return the state dict of a backbone under the names it has without prompts, excluding the adapter's `unused` parameters."""
    unused = find_architecture(backbone).unused
    return {name: t for name, t in _under_original_names(backbone).items() if not (unused and name.startswith(unused))}


def _under_original_names(backbone: nn.Module) -> dict[str, Tensor]:
    prefixes = {f"{name}.layer.": f"{name}." for name, module in backbone.named_modules() if isinstance(module, PromptedLayer)}

    def original(name: str) -> str:
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        return name if prefix is None else prefixes[prefix] + name[len(prefix) :]

    return {original(name): t for name, t in backbone.state_dict().items()}


def _save_under_original_names(backbone: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Run `save_pretrained` for a prompted encoder, saving weights under their original names."""
    if len(args) < 3:
        kwargs.setdefault("state_dict", _under_original_names(backbone))
    return type(backbone).save_pretrained(backbone, *args, **kwargs)


def wrapped_by_peft(backbone: nn.Module) -> str:
    """Return the name of the first peft class around or in a backbone, "" if there is none."""
    for module in backbone.modules():
        if type(module).__module__.partition(".")[0] == "peft":
            return type(module).__name__
    return ""


def base_model(backbone: nn.Module) -> nn.Module:
    """Return the bare model under a task head, such as the ViTModel of a ViTForImageClassification.

    Raises:
        TypeError: See `check_encoder`.
        ValueError: See `check_encoder`.
    """
    check_encoder(backbone)
    return backbone.base_model if isinstance(backbone, PreTrainedModel) else backbone


class PromptedLayer(nn.Module):
    """Replacement for a frozen block that runs it with prompts.

    It refuses to run without prompts, because they would be skipped silently.
    """

    def __init__(self, layer: nn.Module, adapter: BackboneAdapter) -> None:
        super().__init__()
        self.layer, self.adapter = layer, adapter

    def forward(
        self, hidden_states: Tensor, *args: Any, prompts: MoPEAttention | None = None, context: Any = None, **inputs: Any
    ) -> tuple[Tensor, Routing | None]:
        """Run the block with prompts on (B,L,C), giving (B,L,C) and the routing.

        `context` is the result of `BackboneAdapter.context`, and `inputs` are the other arguments of `prompts`.
        """
        if prompts is None:
            raise RuntimeError(
                "this backbone has prompts attached and was called directly, which would skip them: call the fusion model, "
                "or detach() the prompts first"
            )
        attention_output, routing = prompts(hidden_states, frozen=self.adapter.attend(self.layer, context), **inputs)
        return self.adapter.finish(self.layer, hidden_states, attention_output), routing


class Attachment:
    """Prompted layers attached to a backbone, which is in eval mode and frozen unless fine-tuned; undone by `detach`."""

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
                # Prompted layers add a component to the names of weights, and a file with such names could not be loaded.
                vars(backbone)["save_pretrained"] = partial(_save_under_original_names, backbone)
            if not finetune and (peft := wrapped_by_peft(backbone)):
                warnings.warn(
                    f"{peft}: the peft adapters in this encoder are frozen with the rest of it; prompts, routers and head train. "
                    "Call merge_and_unload() first to merge the adapters into its weights",
                    stacklevel=4,
                )
            self.join_projections()
        except BaseException:
            self.detach()
            raise

    def join_projections(self) -> None:
        """Compute the frozen query, key and value projections of each layer in one product; repeat after moving parameters."""
        for attention in self._attentions():
            attention.join()

    def _attentions(self) -> Iterator[FrozenAttention]:
        for block in self.adapter.layers(self.backbone):
            yield self.adapter.attention(block.layer if isinstance(block, PromptedLayer) else block)

    def detach(self) -> None:
        """Put the original modules back, and restore training modes and requires_grad. A second call does nothing."""
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
    """Freeze a transformers model and prepare its `layers` (default: all) to be called with prompts.

    With `finetune`, its own parameters train too, except for those that the adapter lists as `unused` or `unreached`.

    Raises:
        ValueError: If the architecture or its config is not supported, prompts or ModeX adapters are already attached, or a
            layer does not exist.
    """
    adapter = find_adapter(backbone)
    blocks = adapter.layers(backbone)
    if any(isinstance(block, PromptedLayer) for block in blocks):
        raise ValueError(
            f"{type(backbone).__name__} already has prompts attached: detach() them first, or give each model its own copy"
        )
    if any(isinstance(getattr(block, kind, None), ExpertAdapter) for block in blocks for kind in ("visual_msa", "textual_msa")):
        raise ValueError(
            f"{type(backbone).__name__} has ModeX adapters attached, which prompted attention would skip: detach() them first"
        )
    layers = range(len(blocks)) if layers is None else layers
    if any(not 0 <= i < len(blocks) for i in layers):
        raise ValueError(f"layers to prompt must be in 0..{len(blocks) - 1}, got {list(layers)}")
    return Attachment(backbone, layers, adapter, finetune)
