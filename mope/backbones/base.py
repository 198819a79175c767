"""Base classes that describe how to prompt a transformers model: one small adapter class per architecture.

An adapter names the layers, the modules of a layer's attention, and the computation of a block after its attention. It has no
state. Modules that are not plain layers are called, and their weights are never accessed. `attach` replaces layers with
`PromptedLayer`, which runs only with prompts; `Attachment.detach` puts the original modules back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from mope.fused import FrozenAttention
from mope.fused.padding import Padding

INTERPOLATE = "interpolate_pos_encoding"


class Architecture:
    """Description of an architecture, independent of how it is prompted; also defines when two models count as the same."""

    modality: ClassVar[str]
    # Prefixes of parameters that are not used here: not fingerprinted, not copied, and with `load_options` never created.
    unused: ClassVar[tuple[str, ...]] = ()
    # Prefixes of further parameters that affect no output here, which fine-tuning therefore does not train.
    unreached: ClassVar[tuple[str, ...]] = ()
    load_options: ClassVar[dict[str, Any]] = {}
    # Config fields that change what the model computes from the same weights.
    identity: ClassVar[tuple[str, ...]] = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "layer_norm_eps",
    )

    # The model class if it is not from transformers: a checkpoint names the class but cannot import it.
    model_class: ClassVar[Any] = None

    def hidden_size(self, model: Any) -> int:
        """Return the token width C."""
        return model.config.hidden_size

    def stable_name(self, name: str) -> str:
        """Return the name of a tensor in the fingerprint, which is the same for all versions of transformers."""
        return name

    def stable_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors covered by the fingerprint, given the result of `original_state_dict`."""
        return {self.stable_name(name): tensor for name, tensor in state.items()}

    def objections(self, config: Any) -> list[str]:
        """Return the reasons why a model with this config cannot be prompted; an empty list if it can."""
        found = []
        if getattr(config, "is_decoder", False):
            found.append("is_decoder=True: causal attention and its cache are not supported; use the encoder")
        if getattr(config, "add_cross_attention", False):
            found.append("add_cross_attention=True: blocks with cross-attention are not supported")
        position = getattr(config, "position_embedding_type", None) or "absolute"
        if position != "absolute":
            found.append(f"position_embedding_type={position!r}: only absolute positions are supported")
        if getattr(config, "output_attentions", False):
            found.append("output_attentions=True: the fused attention never forms the attention matrix")
        return found


class BackboneAdapter(Architecture, ABC):
    """Base class of adapters for architectures that are prompted layer by layer.

    Subclass it and register the subclass with `register_backbone`; it must implement all abstract methods.

    A block must consist of bidirectional attention over its (normalised) input, with separate query, key and value projections,
    followed by any computation. Queries and keys may be normalised or rotated after projection (`prepare`), and the scores may have
    a bias (`attention_bias`).
    """

    @abstractmethod
    def layers(self, model: Any) -> nn.ModuleList:
        """Return the blocks in order."""

    @abstractmethod
    def embed(self, model: Any, inputs: dict[str, Any], token_mask: Tensor | None) -> Tensor:
        """Embed inputs, given under the encoder's own names, as the input (B,L,C) of the first block.

        The inputs include those flags of the modality that are set; the adapter must support them (see `takes`). A bool
        `token_mask` (B,L) is given if padding may be anywhere, so that positions can be counted without padding.
        """

    @abstractmethod
    def attention(self, layer: Any) -> FrozenAttention:
        """Return the modules of the block's attention."""

    @abstractmethod
    def finish(self, layer: Any, hidden_states: Tensor, attention_output: Tensor) -> Tensor:
        """Compute the block's output (B,L,C) from its input (B,L,C) and the attention's output projection (B,L,C)."""

    @abstractmethod
    def pool(self, model: Any, hidden_states: Tensor, padding: Padding) -> Tensor:
        """Pool the tokens (B,L,C) after the last block into the model's feature (B,C), before `normalize`.

        Use `padding.first_tokens(hidden_states)` or `padding.mean_of_tokens(hidden_states)`. Every adapter must choose, because
        the first token of a model without a class token is its first patch.
        """

    def takes(self, flag: str) -> bool:
        """Return whether `embed` supports the modality's flag of this name."""
        return False

    def token_mask(self, model: Any, mask: Tensor) -> Tensor:
        """Return the mask of the tokens (B,L), given the mask of the input; they differ if embedding changes the length."""
        return mask

    def context(self, model: Any, tokens: Tensor, padding: Padding) -> Any:
        """Compute what the blocks need besides their tokens, such as rotations or relative biases, once per forward pass.

        `tokens` (B,L,C) is the result of `embed`. Return None if nothing is needed.
        """
        return None

    def prepare(self, layer: Any, query: Tensor, key: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        """Transform the queries and keys (B,H,L,D) of tokens after projection, for example by rotary positions or norms."""
        return query, key

    def prepare_prompts(self, layer: Any, key: Tensor) -> Tensor:
        """Transform the keys (B,H,P,D) of prompts as `prepare` does for tokens, except for positions, which prompts lack."""
        return key

    def attention_bias(self, layer: Any, context: Any) -> Tensor | None:
        """Return a bias on the scores of tokens, broadcastable to (B,H,L,L), or None."""
        return None

    # The methods between projections and scores that a class overrides. Computed once per class, because every layer needs it.
    own_between: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        between = ("prepare", "prepare_prompts", "attention_bias")
        cls.own_between = frozenset(name for name in between if getattr(cls, name) is not getattr(BackboneAdapter, name))

    def attend_to_prompts(self, layer: Any) -> FrozenAttention:
        """Return `attention` with the transformation of prompt keys, which does not depend on the tokens."""
        if "prepare_prompts" not in self.own_between:
            return self.attention(layer)
        return replace(self.attention(layer), prepare_prompts=partial(self.prepare_prompts, layer))

    def attend(self, layer: Any, context: Any = None) -> FrozenAttention:
        """Return `attention` with all overridden steps between projections and scores."""
        if not self.own_between:
            return self.attention(layer)
        between: dict[str, Any] = {}
        if "prepare" in self.own_between:
            between["prepare"] = partial(self.prepare, layer, context=context)
        if "attention_bias" in self.own_between:
            between["bias"] = self.attention_bias(layer, context)
        return replace(self.attend_to_prompts(layer), **between)

    def is_row_wise(self, model: Any) -> bool:
        """Return whether `finish` treats each row independently, so that rows may be dropped and reordered."""
        return False

    def normalize(self, model: Any, features: Tensor) -> Tensor:
        """Apply the norm after the last block to features (..., C)."""
        return features


class VisionAdapter(BackboneAdapter):
    """Base class of adapters for image encoders.

    `interpolates` tells whether `embed` supports images of other sizes, with `interpolate_pos_encoding`.
    """

    modality = "vision"
    interpolates = False
    identity = (*BackboneAdapter.identity, "image_size", "patch_size", "num_channels")

    def takes(self, flag: str) -> bool:
        """Return True for `interpolate_pos_encoding` if `embed` interpolates."""
        return flag == INTERPOLATE and self.interpolates


def interpolating(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the `interpolate_pos_encoding` flag among the inputs, if it is given, as keyword arguments."""
    return {name: inputs[name] for name in (INTERPOLATE,) if name in inputs}
