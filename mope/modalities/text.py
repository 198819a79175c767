"""Texts, as ids of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mope.checks import is_readable

from .registry import Modality, register_modality


class Text(Modality):
    """Texts, (B,L) integer ids of tokens with what stands beside them."""

    name = "text"
    inputs = {name: name for name in ("input_ids", "token_type_ids", "position_ids")}  # noqa: RUF012
    mask = "attention_mask"
    input_per_token = True

    def check(self, encoder: Any, given: Mapping[str, Tensor]) -> None:
        """Raise ValueError where ids, and what stands beside them, are not what a text encoder can read."""
        others = {name: given.get(name) for name in ("attention_mask", "token_type_ids", "position_ids")}
        input_ids, given_positions = given.get("input_ids"), others["position_ids"] is not None
        if input_ids is None or torch.compiler.is_compiling():
            return
        if input_ids.dim() != 2:
            hint = ": give one text as a batch, input_ids[None]" if input_ids.dim() == 1 else ""
            raise ValueError(f"input_ids must be (B,L), got {tuple(input_ids.shape)}{hint}")
        shape = tuple(input_ids.shape)
        if shape[1] == 0:
            raise ValueError(f"input_ids hold no tokens, got {shape}: a text has at least its special tokens")
        for name, tensor in {"input_ids": input_ids, **others}.items():
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape and not (name == "position_ids" and tuple(tensor.shape) == (1, shape[1])):
                raise ValueError(f"{name} must be {shape}, as input_ids is, got {tuple(tensor.shape)}")
            if name != "attention_mask" and (tensor.is_floating_point() or tensor.dtype == torch.bool):
                raise ValueError(f"{name} must be integers, got {tensor.dtype}: use {name}.long()")
        config = encoder.config
        embedding = encoder.get_input_embeddings() if hasattr(encoder, "get_input_embeddings") else None
        _check_range("input_ids", input_ids, getattr(embedding, "num_embeddings", None), "ids of the encoder's vocabulary")
        _check_range(
            "token_type_ids", others.get("token_type_ids"), getattr(config, "type_vocab_size", None), "types of the encoder"
        )
        positions = getattr(config, "max_position_embeddings", None)
        _check_range("position_ids", others.get("position_ids"), positions, "positions of the encoder")
        if positions is None or given_positions:
            return
        # RoBERTa counts positions from the number after the padding token's, and only of what is no padding.
        padding = getattr(getattr(encoder, "embeddings", None), "padding_idx", None)
        length = shape[1]
        if padding is not None:
            positions -= padding + 1
            length = int((input_ids != padding).sum(-1).max()) if is_readable(input_ids) and shape[0] else 0
        if length > positions:
            raise ValueError(
                f"a text has {length} tokens, and the encoder {positions} positions: cut it, "
                f"model.tokenizer(..., truncation=True, max_length={positions})"
            )

    def doubts(self, encoder: Any, given: Mapping[str, Tensor]) -> Iterator[str]:
        """Yield what to say of texts with padding and without an attention mask."""
        ids, padding_token = given.get("input_ids"), getattr(encoder.config, "pad_token_id", None)
        # As transformers, which looks at both ends.
        if "attention_mask" in given or ids is None or padding_token is None or not (is_readable(ids) and ids.numel()):
            return
        if bool(ids[:, [0, -1]].eq(padding_token).any()):
            yield (
                "input_ids hold the padding token, and no attention_mask was given: padding is read like words: give the "
                "attention_mask that the tokenizer makes"
            )

    def not_a_tensor(self, name: str, value: object) -> str | None:
        """Return what to do about text that is not tokenized."""
        if not _is_text(value):
            return None
        return (
            "must be a tensor of numbers (B,L), got text: tokenize it first, "
            "model.tokenizer(texts, padding=True, return_tensors='pt')"
        )


def _is_text(value: Any) -> bool:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, str)


def _check_range(name: str, ids: Tensor | None, size: int | None, what: str) -> None:
    if ids is None or size is None or not is_readable(ids) or not ids.numel():
        return
    lowest, highest = map(int, ids.aminmax())
    if lowest < 0 or highest >= size:
        raise ValueError(f"{name} must lie in 0..{size - 1}, the {what}, got values from {lowest} to {highest}")


register_modality(Text())
