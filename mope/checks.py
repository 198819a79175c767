"""Check the inputs of a fusion model, which would otherwise fail deep inside torch, or run and mean nothing.

Values are looked at where a tensor is on the CPU, which nobody waits for, and never while code is compiled.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mope.fused.prepack import differentiates_otherwise

# Of torch's cross_entropy.
IGNORED = -100


def check_labels_of(config: Any, where: str) -> None:
    """ValueError where there is one class and every item has one: its cross-entropy is 0 whatever the model says."""
    if config.num_labels == 1 and config.problem_type == "single_label":
        raise ValueError(
            f"{where}: num_labels=1 with problem_type='single_label' is nothing to learn, the loss is always 0: "
            "for yes or no set num_labels=2, or problem_type='multi_label', a sigmoid for the one label; numbers (regression) are "
            "not supported"
        )


class Warnings:
    """Inputs that run and are seldom meant. Each is said once for a model."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def of_inputs(self, inputs: dict[str, Tensor], attention_mask: Tensor | None, padding_token: int | None) -> None:
        """Pixels that are not floating point, and texts with padding and without an attention mask."""
        if torch.compiler.is_compiling():
            return
        pixels, ids = inputs.get("pixel_values"), inputs.get("input_ids")
        if pixels is not None and not pixels.is_floating_point():
            self._say(
                f"pixel_values are {pixels.dtype}, as if no image processor had made them: encoders were trained on normalised "
                "floating point pixels, and see something else: model.image_processor(images, return_tensors='pt')"
            )
        # As transformers, which looks at both ends.
        if attention_mask is not None or ids is None or padding_token is None or not (is_readable(ids) and ids.numel()):
            return
        if bool(ids[:, [0, -1]].eq(padding_token).any()):
            self._say(
                "input_ids hold the padding token, and no attention_mask was given: padding is read like words: give the "
                "attention_mask that the tokenizer makes"
            )

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, stacklevel=6)


def is_readable(tensor: Tensor) -> bool:
    """Whether the host may look at values without waiting. No subclass: many have none."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and not differentiates_otherwise()
    )


def check_are_tensors(**given: Any) -> None:
    """TypeError where something is no tensor."""
    for name, value in given.items():
        if value is None or isinstance(value, Tensor):
            continue
        kind = type(value).__name__
        if name in ("input_ids", "attention_mask") and _is_text(value):
            raise TypeError(
                f"{name} must be a tensor of numbers (B,L), got text: tokenize it first, "
                "model.tokenizer(texts, padding=True, return_tensors='pt')"
            )
        fix = f"torch.from_numpy({name})" if kind == "ndarray" else f"torch.tensor({name})"
        if name == "pixel_values":
            fix = f"{fix}, or model.image_processor(images, return_tensors='pt') for images"
        raise TypeError(f"{name} must be a tensor, got {kind}: {fix}")


def check_images(pixel_values: Tensor | None) -> None:
    """ValueError where pixels are no batch of images."""
    if pixel_values is not None and pixel_values.dim() != 4:
        raise ValueError(
            f"pixel_values must be (B,channels,height,width), got {tuple(pixel_values.shape)}"
            + (": give one image as a batch, pixel_values[None]" if pixel_values.dim() == 3 else "")
        )


def check_texts(encoder: Any, input_ids: Tensor | None, *, given_positions: bool = False, **others: Tensor | None) -> None:
    """ValueError where ids, and what stands beside them, are not what a text encoder can read.

    Args:
        encoder: the transformers model.
        input_ids: (B,L).
        given_positions: whether the encoder is told where its tokens stand.
        others: attention_mask, token_type_ids, position_ids: in the shape of `input_ids`, positions also (1,L).
    """
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
    _check_range("token_type_ids", others.get("token_type_ids"), getattr(config, "type_vocab_size", None), "types of the encoder")
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


def check_labels(labels: Tensor, num_labels: int, problem_type: str) -> None:
    """ValueError where labels are none of the classes. -100 means, as in torch's cross_entropy, that an item does not count."""
    if labels.numel() == 0:
        raise ValueError(f"labels are {tuple(labels.shape)}: a batch without items has no loss: leave labels out")
    if problem_type == "single_label" and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise ValueError(f"labels must be integers with problem_type='single_label', got {labels.dtype}: use labels.long()")
    if not is_readable(labels):
        return
    if problem_type == "multi_label":
        lowest, highest = labels.aminmax()
        if not (lowest >= 0 and highest <= 1):
            raise ValueError(
                f"labels must lie in 0..1 with problem_type='multi_label', one number for each class, got values from "
                f"{float(lowest):g} to {float(highest):g}"
            )
    elif ((labels < 0) | (labels >= num_labels)).logical_and(labels != IGNORED).any():
        wrong = labels[((labels < 0) | (labels >= num_labels)) & (labels != IGNORED)]
        raise ValueError(
            f"labels must lie in 0..{num_labels - 1} (or be {IGNORED}, not to count), since num_labels={num_labels}, "
            f"got {int(wrong[0])}"
        )


def check_encoder(encoder: Any, name: str = "encoder") -> None:
    """What is no model, or none whose layers could be prompted where they are.

    Raises:
        TypeError: it is no module.
        ValueError: it is compiled, or its weights are elsewhere.
    """
    if isinstance(encoder, str | Path):
        raise TypeError(
            f"{name} must be a model, got the name {str(encoder)!r}: load it first, "
            f"transformers.AutoModel.from_pretrained({str(encoder)!r})"
        )
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"{name} must be a model of transformers, got {type(encoder).__name__}")
    if isinstance(getattr(encoder, "_orig_mod", None), nn.Module):
        raise ValueError(
            f"{name} was compiled by torch.compile: give the model that it was made from, and compile the whole instead"
        )
    hooks = [hook for module in encoder.modules() for hook in _accelerate_hooks(module)]
    parameters = dict(encoder.named_parameters())
    on_meta = [n for n, parameter in parameters.items() if parameter.is_meta]
    # A whole model there is one that somebody takes the shapes of.
    if any(getattr(hook, "offload", False) for hook in hooks) or 0 < len(on_meta) < len(parameters):
        where = f", {on_meta[0]} among them" if on_meta else ""
        raise ValueError(
            f"{len(on_meta)} weights of {name} are on no device{where}, offloaded by accelerate or not loaded: load it without "
            "device_map and offload folders, and move the whole model"
        )


def _accelerate_hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else [hook, *getattr(hook, "hooks", ())]


@contextmanager
def naming_memory(what: str) -> Iterator[None]:
    """MemoryError that says what asked for memory which is not there: torch says how many bytes."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"no memory for {what}: {first_line(error)}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """torch has an exception of its own for accelerators alone, and on the CPU says in several ways how much was asked for."""
    said = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed", "numel: integer multiplication")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in said)


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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
