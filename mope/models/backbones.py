"""How prompts get into a transformers model: one small adapter class for each architecture.

An adapter says where the layers are, which modules make up a layer's attention, and what a block does after it. It has no
state; modules that are no plain layers are called, and their weights never touched. `attach` replaces layers by `PromptedLayer`,
which runs only when it is given prompts; `Attachment.detach` puts the same modules back.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import apply_chunking_to_forward

from mope.fused import ExpertAdapter, FrozenAttention, MoPEAttention
from mope_kernels import Routing

from .checks import check_encoder
from .feed_forward import add_then_norm, is_untouched, linear_gelu_linear, norm_and_mlp


class Architecture:
    """What has to be known of any architecture, however its prompts get in: which models are the same."""

    modality: ClassVar[str]
    # Parameters under these names play no part here: not fingerprinted, not copied; `load_options` keeps them from being made.
    unused: ClassVar[tuple[str, ...]] = ()
    # Parameters that no input given here reaches, so that fine-tuning leaves them out, beside those of `unused`.
    unreached: ClassVar[tuple[str, ...]] = ()
    load_options: ClassVar[dict[str, Any]] = {}
    # What else, beside the weights, says which function the model computes.
    identity: ClassVar[tuple[str, ...]] = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "layer_norm_eps",
    )

    def hidden_size(self, model: Any) -> int:
        """C."""
        return model.config.hidden_size

    def stable_name(self, name: str) -> str:
        """The name under which a tensor goes into the fingerprint, where versions of transformers name it differently."""
        return name

    def stable_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What goes into the fingerprint, from the names and tensors of `original_state_dict`."""
        return {self.stable_name(name): tensor for name, tensor in state.items()}

    def objections(self, config: Any) -> list[str]:
        """Why a model with this config cannot be prompted here."""
        found = []
        if getattr(config, "is_decoder", False):
            found.append("is_decoder=True: causal attention and its cache are not supported, use the encoder")
        if getattr(config, "add_cross_attention", False):
            found.append("add_cross_attention=True: blocks with cross-attention are not supported")
        position = getattr(config, "position_embedding_type", None) or "absolute"
        if position != "absolute":
            found.append(f"position_embedding_type={position!r}: only absolute positions are supported")
        if getattr(config, "output_attentions", False):
            found.append("output_attentions=True: the fused attention never forms the attention matrix")
        return found


class BackboneAdapter(Architecture, ABC):
    """How prompts get into the layers of an architecture. Subclass it and `register_backbone` the class.

    A block has to be: attention over its (normalised) input with separate query, key and value projections, all tokens attending
    to all, then anything. The model's feature is that of its first token. A class without one of the abstract methods cannot be
    registered.
    """

    @abstractmethod
    def layers(self, model: Any) -> nn.ModuleList:
        """The blocks, in order."""

    @abstractmethod
    def embed(self, model: Any, inputs: dict[str, Any], token_mask: Tensor | None) -> Tensor:
        """What goes into the first block, from `pixel_values` or `input_ids` and its companions -> (B,L,C).

        `interpolate_pos_encoding` is among them where it is asked for, and only if the class says `interpolates`.
        `token_mask` (B,L) bool is given where padding may stand anywhere, so that positions can be counted without it.
        """

    @abstractmethod
    def attention(self, layer: Any) -> FrozenAttention:
        """The modules of the block's attention."""

    @abstractmethod
    def finish(self, layer: Any, hidden_states: Tensor, attention_output: Tensor) -> Tensor:
        """The block from its attention on: input of the block (B,L,C), output projection (B,L,C) -> output of the block (B,L,C)."""

    def is_row_wise(self, model: Any) -> bool:
        """Whether `finish` makes of each row what it makes of it alone, so that rows may be left out and put anywhere."""
        return False

    def normalize(self, model: Any, features: Tensor) -> Tensor:
        """What the model does to its features after the last block: (..., C) -> (..., C)."""
        return features


class VisionAdapter(BackboneAdapter):
    """`interpolates` says whether `embed` takes images of other sizes, with `interpolate_pos_encoding`."""

    modality = "vision"
    interpolates = False
    identity = (*BackboneAdapter.identity, "image_size", "patch_size", "num_channels")


def _interpolating(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in ("interpolate_pos_encoding",) if name in inputs}


class ViTAdapter(VisionAdapter):
    interpolates = True
    unreached = ("embeddings.mask_token",)
    unused, load_options = ("pooler.",), {"add_pooling_layer": False}

    def layers(self, model: Any) -> nn.ModuleList:
        return model.layers

    def embed(self, model: Any, inputs: dict[str, Any], token_mask: Tensor | None) -> Tensor:
        return model.embeddings(inputs["pixel_values"].to(model.dtype), **_interpolating(inputs))

    def attention(self, layer: Any) -> FrozenAttention:
        a = layer.attention
        return FrozenAttention(a.q_proj, a.k_proj, a.v_proj, a.o_proj, a.num_attention_heads, layer.layernorm_before)

    def finish(self, layer: Any, hidden_states: Tensor, attention_output: Tensor) -> Tensor:
        hidden_states, update = norm_and_mlp(hidden_states, layer.dropout(attention_output), layer.layernorm_after, layer.mlp)
        return layer.dropout(update) + hidden_states

    def normalize(self, model: Any, features: Tensor) -> Tensor:
        return model.layernorm(features)


class Dinov2Adapter(VisionAdapter):
    # Always, whether asked or not.
    interpolates = True
    unreached = ("embeddings.mask_token",)

    def layers(self, model: Any) -> nn.ModuleList:
        return model.encoder.layer

    def embed(self, model: Any, inputs: dict[str, Any], token_mask: Tensor | None) -> Tensor:
        return model.embeddings(inputs["pixel_values"])

    def attention(self, layer: Any) -> FrozenAttention:
        a = layer.attention
        if hasattr(a, "q_proj"):
            return FrozenAttention(a.q_proj, a.k_proj, a.v_proj, a.o_proj, a.num_attention_heads, layer.norm1)
        # transformers < 5.23
        inner = a.attention
        return FrozenAttention(inner.query, inner.key, inner.value, a.output.dense, inner.num_attention_heads, layer.norm1)

    def finish(self, layer: Any, hidden_states: Tensor, attention_output: Tensor) -> Tensor:
        attention_output = layer.drop_path(layer.layer_scale1(attention_output))
        hidden_states, update = norm_and_mlp(hidden_states, attention_output, layer.norm2, layer.mlp)
        return layer.drop_path(layer.layer_scale2(update)) + hidden_states

    def normalize(self, model: Any, features: Tensor) -> Tensor:
        return model.layernorm(features)

    def stable_name(self, name: str) -> str:
        for old, new in (("query", "q"), ("key", "k"), ("value", "v")):
            name = name.replace(f".attention.attention.{old}.", f".attention.{new}_proj.")
        return name.replace(".attention.output.dense.", ".attention.o_proj.")


class CLIPVisionAdapter(VisionAdapter):
    interpolates = True

    def layers(self, model: Any) -> nn.ModuleList:
        return model.encoder.layers

    def embed(self, model: Any, inputs: dict[str, Any], token_mask: Tensor | None) -> Tensor:
        return model.pre_layrnorm(model.embeddings(inputs["pixel_values"], **_interpolating(inputs)))

    def attention(self, layer: Any) -> FrozenAttention:
        a = layer.self_attn
        return FrozenAttention(a.q_proj, a.k_proj, a.v_proj, a.out_proj, a.num_heads, layer.layer_norm1)

    def finish(self, layer: Any, hidden_states: Tensor, attention_output: Tensor) -> Tensor:
        hidden_states, update = norm_and_mlp(hidden_states, attention_output, layer.layer_norm2, layer.mlp)
        return hidden_states + update

    def normalize(self, model: Any, features: Tensor) -> Tensor:
        return model.post_layernorm(features)


class BertAdapter(BackboneAdapter):
    """Post-LN: the projections read the block input itself."""

    modality = "text"
    unused, load_options = ("pooler.",), {"add_pooling_layer": False}
    identity = (*BackboneAdapter.identity, "vocab_size", "max_position_embeddings", "pad_token_id", "type_vocab_size")

    def layers(self, model: Any) -> nn.ModuleList:
        return model.encoder.layer

    def embed(self, model: Any, inputs: dict[str, Any], token_mask: Tensor | None) -> Tensor:
        if token_mask is not None and "position_ids" not in inputs:
            inputs = {**inputs, "position_ids": (token_mask.cumsum(-1) - 1).clamp_min(0)}
        return model.embeddings(**inputs)

    def attention(self, layer: Any) -> FrozenAttention:
        a = layer.attention.self
        return FrozenAttention(a.query, a.key, a.value, layer.attention.output.dense, a.num_attention_heads)

    def finish(self, layer: Any, hidden_states: Tensor, attention_output: Tensor) -> Tensor:
        output = layer.attention.output
        hidden_states = add_then_norm(hidden_states, output.dropout(attention_output), output.LayerNorm)
        if not layer.chunk_size_feed_forward:
            return self._feed_forward(layer, hidden_states)
        chunk = partial(self._feed_forward, layer)
        return apply_chunking_to_forward(chunk, layer.chunk_size_feed_forward, layer.seq_len_dim, hidden_states)

    @staticmethod
    def _feed_forward(layer: Any, hidden_states: Tensor) -> Tensor:
        intermediate, output = layer.intermediate, layer.output
        if not (is_untouched(intermediate) and is_untouched(output)):
            return layer.feed_forward_chunk(hidden_states)
        update = linear_gelu_linear(hidden_states, intermediate.dense, intermediate.intermediate_act_fn, output.dense)
        return add_then_norm(hidden_states, output.dropout(update), output.LayerNorm)

    def is_row_wise(self, model: Any) -> bool:
        # Chunks ask for a number of rows that they divide.
        return not model.config.chunk_size_feed_forward


class RobertaAdapter(BertAdapter):
    """Its embeddings count positions themselves, of all tokens that are not the padding token."""

    def embed(self, model: Any, inputs: dict[str, Any], token_mask: Tensor | None) -> Tensor:
        if token_mask is not None:
            # Whatever stands where the mask hides it is not counted.
            padding = model.embeddings.padding_idx
            inputs = {**inputs, "input_ids": inputs["input_ids"].masked_fill(~token_mask, padding)}
        return model.embeddings(**inputs)


_ADAPTERS: dict[str, Architecture] = {
    "vit": ViTAdapter(),
    "dinov2": Dinov2Adapter(),
    "clip_vision_model": CLIPVisionAdapter(),
    "bert": BertAdapter(),
    "roberta": RobertaAdapter(),
}


def register_backbone(model_type: str, adapter_class: type[Architecture]) -> None:
    """Teach the library the architecture whose config says `model_type`. A second registration replaces the first.

    Raises:
        TypeError: `adapter_class` leaves abstract methods of `BackboneAdapter` out; the message names them.
    """
    _ADAPTERS[model_type] = adapter_class()


def architecture_for(model_type: str | None) -> Architecture:
    """What is registered for an architecture; ValueError if nothing is."""
    if model_type not in _ADAPTERS:
        raise ValueError(
            f"model_type {model_type!r} is not known; known are {', '.join(sorted(_ADAPTERS))}. Write a subclass of "
            "mope.models.BackboneAdapter (about 30 lines) and call mope.register_backbone(model_type, YourAdapter)."
        )
    return _ADAPTERS[model_type]


def find_architecture(backbone: nn.Module, modality: str | None = None) -> Architecture:
    """What is known of a backbone.

    Raises:
        ValueError: its architecture is unknown, it is of the other modality, or its config cannot be honoured.
    """
    config = getattr(backbone, "config", None)
    name = type(backbone).__name__
    try:
        architecture = architecture_for(getattr(config, "model_type", None))
    except ValueError as error:
        # A model of both, such as CLIP's.
        part = f"{modality}_model"
        if modality is not None and isinstance(getattr(backbone, part, None), nn.Module):
            raise ValueError(f"{name} holds encoders of both modalities: give its {modality} encoder, model.{part}") from None
        raise ValueError(f"{name}: {error}") from None
    if modality not in (None, architecture.modality):
        raise ValueError(f"{modality} was given {name}, a {architecture.modality} model")
    if objections := architecture.objections(config):
        raise ValueError(f"{name} cannot be prompted: {'; '.join(objections)}")
    return architecture


def find_adapter(backbone: nn.Module, modality: str | None = None) -> BackboneAdapter:
    """The adapter of a backbone that is prompted layer by layer; ValueError as in `find_architecture`, or if it is not."""
    adapter = find_architecture(backbone, modality)
    if not isinstance(adapter, BackboneAdapter):
        raise ValueError(
            f"{type(backbone).__name__} is not prompted layer by layer: give the model of transformers itself, without wrappers, "
            "to MoPEForClassification"
        )
    return adapter


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
        self, hidden_states: Tensor, *args: Any, prompts: MoPEAttention | None = None, **inputs: Any
    ) -> tuple[Tensor, Routing | None]:
        """(B,L,C) -> (B,L,C) and the routing; `inputs` are the other arguments of `prompts`."""
        if prompts is None:
            raise RuntimeError(
                "this backbone has prompts attached and was called by itself, which would skip them: call the fusion model, "
                "or detach() the prompts first"
            )
        attention_output, routing = prompts(hidden_states, frozen=self.adapter.attention(self.layer), **inputs)
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
