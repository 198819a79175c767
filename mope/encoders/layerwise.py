"""Layer-wise encoding with prompts, shared by the fusion model and the multi-task server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from mope.backbones import BackboneAdapter, PromptedLayer
from mope.encoders.pooling import Pool
from mope.encoders.recomputing import Recomputing
from mope.fused import InputPrompts, MoPEAttention, Packing, PromptBank, Router
from mope.fused.padding import Padding
from mope_kernels import Routing


class LayerPrompts:
    """Source of the prompts of a `LayerwiseEncoder`. This base class provides none.

    >>> feature, routing = encoder.encode(inputs, padding, LayerPrompts())
    """

    def of_input(self, tokens: Tensor, padding: Padding) -> tuple[Tensor, Tensor | None] | None:
        """Return the rows [prompts; tokens] for tokens (B,L,C), and their attention mask; None if the input has no prompts."""
        return None

    def of_layer(self, index: int) -> dict[str, Any] | None:
        """Return the arguments of a prompted layer besides its tokens, including `prompts`; None if the layer is not prompted."""
        return None


class TrainedPrompts(LayerPrompts):
    """Trainable prompts of one task.

    Args:
        blocks: Prompts of each prompted layer, by layer index.
        cross: psi (B,Cc), for all layers.
        mapped: Mapped prompts (B,M,C), for all layers.
        noise: Router noise (B,K) for each routed layer, in order. It is drawn by the caller, because gradient checkpointing runs
            layers twice.
        top_k: Number of experts per item; None for all.
        banks: Result of `MoPEAttention.build_bank` for each prompted layer.
        router: Router shared by the layers.
        input_prompts: Prompts in front of the first layer.

    Raises:
        ValueError: If the number of banks is not the number of prompted layers.
    """

    def __init__(
        self,
        blocks: Mapping[int, MoPEAttention],
        *,
        cross: Tensor | None = None,
        mapped: Tensor | None = None,
        noise: Sequence[Tensor | None] = (),
        top_k: int | None = None,
        banks: Sequence[PromptBank | None] | None = None,
        router: Router | None = None,
        input_prompts: InputPrompts | None = None,
    ) -> None:
        if banks is not None and len(banks) != len(blocks):
            raise ValueError(f"banks must hold one entry for each of the {len(blocks)} prompted layers, got {len(banks)}")
        self.blocks, self.cross, self.mapped, self.top_k, self.router = blocks, cross, mapped, top_k, router
        self.input_prompts = input_prompts
        self._noise: Iterator[Tensor | None] = iter(noise)
        self._banks = dict(zip(blocks, banks or [None] * len(blocks), strict=True))

    def of_input(self, tokens: Tensor, padding: Padding) -> tuple[Tensor, Tensor | None] | None:
        """Return the tokens with the shallow prompts in front, and their attention mask; None without shallow prompts."""
        if self.input_prompts is None:
            return None
        rows = self.input_prompts(tokens, self.mapped)
        return rows, self.input_prompts.visible(padding.as_mask(tokens.shape[1]), rows)

    def of_layer(self, index: int) -> dict[str, Any] | None:
        """Return the arguments of `MoPEAttention`."""
        block = self.blocks.get(index)
        if block is None:
            return None
        return {
            "prompts": block,
            "cross": self.cross,
            "mapped": self.mapped,
            "noise": None if block.experts is None else next(self._noise),
            "top_k": self.top_k,
            "bank": self._banks[index],
            "router": self.router,
        }


class LayerwiseEncoder:
    """Encoder whose layers are prompted one by one.

    Args:
        backbone: The model; its prompted layers are `PromptedLayer`s.
        adapter: Adapter of its architecture.
        recomputing: Layers to recompute in the backward pass; None for none.
    """

    def __init__(self, backbone: nn.Module, adapter: BackboneAdapter, *, recomputing: Recomputing | None = None) -> None:
        self.backbone, self.adapter, self._recomputing = backbone, adapter, recomputing

    def refusal(self, flag: str) -> str | None:
        """Return why the encoder does not accept a flag of its modality; None if it does."""
        if self.adapter.takes(flag):
            return None
        return f"{type(self.adapter).__name__} does not declare that its embed accepts it (interpolates = True)"

    def encode(
        self, inputs: Mapping[str, Any], padding: Padding, prompts: LayerPrompts, pool: Pool | None = None
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Encode inputs, given under the encoder's own names.

        Returns the feature (B,C) and the routing of each routed layer. `pool` makes the feature from the normalized tokens; by
        default it is the encoder's own summary.
        """
        backbone, adapter, recomputing = self.backbone, self.adapter, self._recomputing
        tokens = adapter.embed(backbone, dict(inputs), padding.token_mask)
        context = adapter.context(backbone, tokens, padding)
        packing, mask = padding.packing, None
        if (at_input := prompts.of_input(tokens, padding)) is not None:
            hidden_states, mask = at_input
            packing = None
        elif packing is not None and context is None and adapter.is_row_wise(backbone):
            hidden_states, padding = packing.pack(tokens), Padding(packing=packing)
        else:
            hidden_states, mask, packing = tokens, padding.as_mask(tokens.shape[1]), None
        if packing is None:
            padding = padding.without_packing()
        plain = {"adapter": adapter, "mask": mask, "packing": packing, "context": context}
        prompted = {"lengths": padding.lengths, "token_mask": padding.token_mask, "packing": packing, "context": context}
        routing: list[Routing] = []
        for i, layer in enumerate(adapter.layers(backbone)):
            given = prompts.of_layer(i)
            call, given = (partial(_plain_layer, layer), plain) if given is None else (layer, {**given, **prompted})
            if recomputing is None or not recomputing.takes(i):
                hidden_states, routed = call(hidden_states, **given)
            else:
                hidden_states, routed = recomputing(call, hidden_states, **given)
            if routed is not None:
                routing.append(routed)
        if at_input is not None:
            hidden_states = hidden_states[:, -tokens.shape[1] :]
        if pool is not None:
            return pool(adapter.normalize(backbone, hidden_states), padding), tuple(routing)
        feature = adapter.pool(backbone, hidden_states, padding)
        return adapter.normalize(backbone, feature), tuple(routing)

    def prompted(self) -> list[int]:
        """Return the indices of the prompted layers."""
        return [i for i, layer in enumerate(self.adapter.layers(self.backbone)) if isinstance(layer, PromptedLayer)]


def _plain_layer(
    layer: nn.Module, hidden_states: Tensor, *, adapter: BackboneAdapter, mask: Tensor | None, packing: Packing | None, context: Any
) -> tuple[Tensor, None]:
    """Run a layer that has no prompts of its own, (B,L,C) -> (B,L,C); its routing is None."""
    attended = adapter.attend(layer, context).plain(hidden_states, mask, packing)
    return adapter.finish(layer, hidden_states, attended), None


def as_prompts(mapped: Tensor) -> Tensor:
    """Reshape the output of a mapper, one prompt (B,C) or several (B,M,C), to (B,M,C)."""
    return mapped[:, None] if mapped.dim() == 2 else mapped
