"""Adapters and layouts for BERT and RoBERTa."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import apply_chunking_to_forward

from mope.fused import FrozenAttention
from mope.fused.padding import Padding

from .base import BackboneAdapter
from .feed_forward import add_then_norm, is_untouched, linear_gelu_linear
from .layouts import Layout, register_layout
from .registry import register_backbone

# Adapters go after dropout and before the residual sum is normalised.
POST_NORM = Layout(
    "textual", "attention.output.dropout", "output.dropout", "output.LayerNorm", "crossattention.output.dropout", adapts_input=True
)


class BertAdapter(BackboneAdapter):
    """Adapter for BERT, whose blocks are post-LN: the projections read the block input itself."""

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

    def pool(self, model: Any, hidden_states: Tensor, padding: Padding) -> Tensor:
        """Return the features of the class tokens."""
        return padding.first_tokens(hidden_states)

    def is_row_wise(self, model: Any) -> bool:
        # With chunking, the number of rows must be divisible by the chunk size.
        return not model.config.chunk_size_feed_forward


class RobertaAdapter(BertAdapter):
    """Adapter for RoBERTa, whose embeddings compute positions from the token ids, skipping padding tokens."""

    def embed(self, model: Any, inputs: dict[str, Any], token_mask: Tensor | None) -> Tensor:
        if token_mask is not None:
            # Masked positions get the padding token, so that they are not counted.
            padding = model.embeddings.padding_idx
            inputs = {**inputs, "input_ids": inputs["input_ids"].masked_fill(~token_mask, padding)}
        return model.embeddings(**inputs)


register_backbone("bert", BertAdapter)
register_backbone("roberta", RobertaAdapter)
register_layout("BertLayer", POST_NORM)
register_layout("RobertaLayer", POST_NORM)
