"""Text modality: texts as token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .reading import Padding, Reader, Source, shown
from .registry import Modality, register_modality

if TYPE_CHECKING:
    from torch import Tensor

# Longer than any text. Tokenizers without a limit report 1e30.
NO_LIMIT = 2**31


class Text(Modality):
    """Texts: integer token ids (B,L), optionally with token types, positions and an attention mask.

    The mask may be on the CPU even if the model is not; padding is then skipped, see `FusionModel.on_device`.
    """

    name = "text"
    inputs = {name: name for name in ("input_ids", "token_type_ids", "position_ids")}  # noqa: RUF012
    mask = "attention_mask"
    input_per_token = True
    column = "text"
    processor = "tokenizer"
    plural = "texts"

    def check(self, encoder: Any, given: Mapping[str, Tensor]) -> None:
        """Check that a text encoder can read the token ids and the other inputs.

        Raises:
            ValueError: If it cannot.
        """
        import torch

        from mope.checks import is_readable

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
                raise ValueError(f"{name} must be {shape}, the shape of input_ids, got {tuple(tensor.shape)}")
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
        # RoBERTa counts positions from the padding token's id plus one, and skips padding.
        padding = getattr(getattr(encoder, "embeddings", None), "padding_idx", None)
        length = shape[1]
        if padding is not None:
            positions -= padding + 1
            length = int((input_ids != padding).sum(-1).max()) if is_readable(input_ids) and shape[0] else 0
        if length > positions:
            raise ValueError(
                f"a text has {length} tokens, but the encoder has {positions} positions: truncate it, "
                f"model.tokenizer(..., truncation=True, max_length={positions})"
            )

    def doubts(self, encoder: Any, given: Mapping[str, Tensor]) -> Iterator[str]:
        """Yield a warning about texts that have padding but no attention mask."""
        from mope.checks import is_readable

        ids, padding_token = given.get("input_ids"), getattr(encoder.config, "pad_token_id", None)
        # Like transformers, check both ends.
        if "attention_mask" in given or ids is None or padding_token is None or not (is_readable(ids) and ids.numel()):
            return
        if bool(ids[:, [0, -1]].eq(padding_token).any()):
            yield (
                "input_ids contain the padding token, but no attention_mask was given, so padding is read like words: pass the "
                "attention_mask returned by the tokenizer"
            )

    def not_a_tensor(self, name: str, value: object) -> str | None:
        """Return the advice for text that is not tokenized."""
        if not _is_text(value):
            return None
        return (
            "must be a tensor of numbers (B,L), got text: tokenize it first, "
            "model.tokenizer(texts, padding=True, return_tensors='pt')"
        )

    def parse(self, value: Any, source: Source) -> str:
        """Return a text.

        Raises:
            ValueError: If the value is not a string.
        """
        if not isinstance(value, str):
            raise ValueError(f'"{source.key}" must be a text, got {shown(value)}')
        return value

    def of_cell(self, cell: str) -> str:
        """Return the cell: a text may look like JSON."""
        return cell

    def reader(self, encoder: Any, processor: Any, config: Any) -> Texts:
        """Return a reader that tokenizes texts.

        Raises:
            ValueError: If the tokenizer has no padding token.
        """
        if processor.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token: set model.tokenizer.pad_token")
        return Texts(self, processor, self.padding(encoder, processor, config))

    def padding(self, encoder: Any, processor: Any, config: Any) -> Padding:
        """Return the padding of the tokenizer, or zeros without a tokenizer."""
        token, kind = (getattr(processor, name, None) or 0 for name in ("pad_token_id", "pad_token_type_id"))
        values = {"input_ids": token, "attention_mask": 0, "token_type_ids": kind}
        longest = None if processor is None else max_tokens(processor, encoder)
        return Padding(values, longest, left=config.padding_side == "left")

    def load_processor(self, source: str | Path, encoder: Any = None, config: Any = None, format: str = "", **options: Any) -> Any:
        """Load a tokenizer from a folder or the hub; it pads on the side given by the configuration."""
        from transformers import AutoTokenizer

        side = {} if config is None else {"padding_side": config.padding_side}
        return AutoTokenizer.from_pretrained(source, **side, **options)

    def check_processor(self, processor: Any, config: Any) -> None:
        """Check that a tokenizer pads on the side given by the configuration.

        Raises:
            ValueError: If it does not.
        """
        expected = config.padding_side
        side = getattr(processor, "padding_side", expected)
        if side != expected:
            raise ValueError(
                f"this tokenizer pads on the {side}, but the config has padding_side={expected!r}: "
                f"set tokenizer.padding_side = {expected!r}, or padding_side={side!r} in {type(config).__name__}"
            )

    def key(self, raw: str) -> str:
        """Return the text."""
        return raw

    def size(self, raw: str) -> int:
        """Return the length of the text in characters."""
        return len(raw)

    def text_of(self, raw: str) -> str:
        """Return the text."""
        return raw

    def describe(self, given: Mapping[str, Tensor]) -> None:
        """Return None: the error message already names the example."""


class Texts(Reader):
    """Reader that tokenizes texts, truncating them to the encoder's maximum length."""

    def __init__(self, modality: Modality, processor: Any, padding: Padding) -> None:
        super().__init__(modality, processor)
        self._padding = padding

    def __call__(self, raw: str, *, augment: Callable[[Any], Any] | None = None) -> dict[str, Any]:
        """Return `input_ids` and, if the tokenizer has them, `token_type_ids`, as lists."""
        longest = self._padding.longest
        encoded = self.processor(raw, truncation=longest is not None, max_length=longest)
        return {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and, if present, `token_type_ids`, each int64 (B,L)."""
        rows = {name: [item[name] for item in items] for name in items[0]}
        rows["attention_mask"] = [[1] * len(ids) for ids in rows["input_ids"]]
        return {name: self._pad(rows[name], value) for name, value in self._padding.values.items() if name in rows}

    def digest(self) -> Any:
        """Return the state of the tokenizer, and how texts are truncated and padded."""
        return [_tokenizer_state(self.processor), self._padding.longest, self._padding.left]

    def _pad(self, rows: Sequence[Sequence[int]], value: int) -> Tensor:
        import torch

        length = max(map(len, rows))
        padding = [[value] * (length - len(row)) for row in rows]
        return torch.tensor([[*p, *row] if self._padding.left else [*row, *p] for row, p in zip(rows, padding, strict=True)])


def max_tokens(tokenizer: Any, text: Any) -> int | None:
    """Return the maximum number of tokens of a text, including special tokens; None if there is no limit."""
    limits = [tokenizer.model_max_length]
    config: Any = text.config
    if (positions := getattr(config, "max_position_embeddings", None)) is not None:
        # RoBERTa counts positions from the padding token's id plus one.
        first = getattr(getattr(text, "embeddings", None), "padding_idx", None)
        limits.append(positions if first is None else positions - first - 1)
    limit = min(limits)
    return limit if limit < NO_LIMIT else None


def _tokenizer_state(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [type(tokenizer).__name__, tokenizer.get_vocab(), repr(tokenizer.init_kwargs)]
    state = json.loads(backend.to_str())
    # These two depend on the last call.
    return {name: value for name, value in state.items() if name not in ("truncation", "padding")}


def _is_text(value: Any) -> bool:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, str)


def _check_range(name: str, ids: Tensor | None, size: int | None, what: str) -> None:
    from mope.checks import is_readable

    if ids is None or size is None or not is_readable(ids) or not ids.numel():
        return
    lowest, highest = map(int, ids.aminmax())
    if lowest < 0 or highest >= size:
        raise ValueError(f"{name} must lie in 0..{size - 1}, the {what}, got values from {lowest} to {highest}")


register_modality(Text())
