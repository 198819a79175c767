"""How prompts get into a transformers model: one small adapter class for each architecture.

An adapter says where the layers are, which modules make up a layer's attention, and what a block does after it. It has no
state; modules that are no plain layers are called, and their weights never touched. `attach` replaces layers by `PromptedLayer`,
which runs only when it is given prompts; `Attachment.detach` puts the same modules back.
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
    """Say which models of an architecture are the same, however prompts get into them."""

    modality: ClassVar[str]
    # Parameters under these names play no part here: not fingerprinted, not copied; `load_options` keeps them from being made.
    unused: ClassVar[tuple[str, ...]] = ()
    # Parameters that no input given here reaches, so that fine-tuning leaves them out, beside those of `unused`.
    unreached: ClassVar[tuple[str, ...]] = ()
    load_options: ClassVar[dict[str, Any]] = {}
    # Fields of the config that change what the model computes with the same weights.
    identity: ClassVar[tuple[str, ...]] = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "layer_norm_eps",
    )

    # The class of the model, where it is not one of transformers' own: a checkpoint names it, and cannot import it.
    model_class: ClassVar[Any] = None

    def hidden_size(self, model: Any) -> int:
        """C."""
        return model.config.hidden_size

    def stable_name(self, name: str) -> str:
        """The name under which a tensor goes into the fingerprint, where versions of transformers name it differently."""
        return name

    def stable_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that the fingerprint covers, from those of `original_state_dict`."""
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
    to all, then anything. Between projections and scores there may be norms and rotations of queries and keys (`prepare`), and
    beside the scores a bias (`attention_bias`). A class without one of the abstract methods cannot be registered.
    """

    @abstractmethod
    def layers(self, model: Any) -> nn.ModuleList:
        """The blocks, in order."""

    @abstractmethod
    def embed(self, model: Any, inputs: dict[str, Any], token_mask: Tensor | None) -> Tensor:
        """Embed the inputs, which have the encoder's own names -> the input of the first block (B,L,C).

        The modality's flags are among them where they are asked for, and only if the adapter `takes` them.
        `token_mask` (B,L) bool is given where padding may stand anywhere, so that positions can be counted without it.
        """

    @abstractmethod
    def attention(self, layer: Any) -> FrozenAttention:
        """The modules of the block's attention."""

    @abstractmethod
    def finish(self, layer: Any, hidden_states: Tensor, attention_output: Tensor) -> Tensor:
        """The block from its attention on: input of the block (B,L,C), output projection (B,L,C) -> output of the block (B,L,C)."""

    @abstractmethod
    def pool(self, model: Any, hidden_states: Tensor, padding: Padding) -> Tensor:
        """Return the model's feature (B,C) from its tokens (B,L,C) after the last block, before `normalize`.

        Nothing is said by default, since the first token of a model without a class token is its first patch:
        `padding.first_tokens(hidden_states)`, or `padding.mean_of_tokens(hidden_states)`.
        """

    def takes(self, flag: str) -> bool:
        """Return whether `embed` knows a flag of the modality, by its name."""
        return False

    def token_mask(self, model: Any, mask: Tensor) -> Tensor:
        """Return the mask of tokens (B,L) from that of the input, where embedding changes the length."""
        return mask

    def context(self, model: Any, tokens: Tensor, padding: Padding) -> Any:
        """Return what the blocks need beside their tokens, such as rotations and relative biases, computed once in a forward.

        `tokens` (B,L,C) is what `embed` gave. None: nothing.
        """
        return None

    def prepare(self, layer: Any, query: Tensor, key: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        """Change queries and keys (B,H,L,D) of tokens between projection and scores: rotary positions, norms."""
        return query, key

    def prepare_prompts(self, layer: Any, key: Tensor) -> Tensor:
        """Change keys (B,H,P,D) of prompts, which have no position, as `prepare` changes those of tokens: norms."""
        return key

    def attention_bias(self, layer: Any, context: Any) -> Tensor | None:
        """Return what is added to the scores of tokens, broadcastable to (B,H,L,L), None for nothing."""
        return None

    # The methods between projections and scores that a class has of its own. Looked up once, since every layer asks.
    own_between: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        between = ("prepare", "prepare_prompts", "attention_bias")
        cls.own_between = frozenset(name for name in between if getattr(cls, name) is not getattr(BackboneAdapter, name))

    def attend_to_prompts(self, layer: Any) -> FrozenAttention:
        """Return `attention` as it is for prompts, whatever the tokens are."""
        if "prepare_prompts" not in self.own_between:
            return self.attention(layer)
        return replace(self.attention(layer), prepare_prompts=partial(self.prepare_prompts, layer))

    def attend(self, layer: Any, context: Any = None) -> FrozenAttention:
        """Return `attention` with what stands between projections and scores."""
        if not self.own_between:
            return self.attention(layer)
        between: dict[str, Any] = {}
        if "prepare" in self.own_between:
            between["prepare"] = partial(self.prepare, layer, context=context)
        if "attention_bias" in self.own_between:
            between["bias"] = self.attention_bias(layer, context)
        return replace(self.attend_to_prompts(layer), **between)

    def is_row_wise(self, model: Any) -> bool:
        """Whether `finish` makes of each row what it makes of it alone, so that rows may be left out and put anywhere."""
        return False

    def normalize(self, model: Any, features: Tensor) -> Tensor:
        """Apply the norm after the last block to features: (..., C) -> (..., C)."""
        return features


class VisionAdapter(BackboneAdapter):
    """An encoder of images whose feature is that of its class token.

    `interpolates` says whether `embed` takes images of other sizes, with `interpolate_pos_encoding`.
    """

    modality = "vision"
    interpolates = False
    identity = (*BackboneAdapter.identity, "image_size", "patch_size", "num_channels")

    def takes(self, flag: str) -> bool:
        """Return whether `embed` interpolates, if it is that."""
        return flag == INTERPOLATE and self.interpolates


def interpolating(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in (INTERPOLATE,) if name in inputs}
