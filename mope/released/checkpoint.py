"""Read checkpoints of the released code, which are Lightning's `.ckpt` files, without executing anything in them."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# Checkpoints hold every tensor under both names.
_ALIASES = {"classifier.vision_model.": "vision_classifier.", "classifier.text_model.": "text_classifier."}
# In some fusion methods, the last prefix holds the tensors that join the two classifiers.
_CLASSIFIERS = (*_ALIASES.values(), "classifier.")
# Buffers saved by older versions of transformers.
_OBSOLETE = re.compile(r"\.position_ids$")


@dataclass(frozen=True, eq=False)
class ReleasedCheckpoint:
    """Contents of a checkpoint of the released code.

    Attributes:
        options: Options of the training script that can be represented in JSON.
        tensors: Tensors by name, without duplicates, under `vision_classifier.`, `text_classifier.` or, if a fusion method has
            additional tensors, `classifier.`. The weights of attention, MLPs and patch merging are not included: the released code
            does not save them, and they have to be loaded from the backbones.
    """

    options: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors under a prefix, with the prefix removed from their names."""
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    def save(self, path: str | Path) -> None:
        """Write tensors and options as one `.safetensors` file, which `read_released_checkpoint` reads too."""
        # Copy, because safetensors rejects tensors that share memory.
        tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in self.tensors.items()}
        save_file(tensors, path, metadata={"options": json.dumps(self.options)})


def read_released_checkpoint(path: str | Path) -> ReleasedCheckpoint:
    """Read a Lightning `.ckpt` of the released code, or a file written by `ReleasedCheckpoint.save`.

    A `.ckpt` is a pickle. It is read with `weights_only=True` and an allow-list of one class, argparse.Namespace, so nothing in it
    is executed. Tensors that do not belong to the classifiers are omitted with a warning that names them. Another warning names
    tensors that hold NaN or infinity.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, holds anything other than tensors and options, or holds two copies of a tensor that
            differ.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    options, state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_lightning(path)
    tensors: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        own = name
        for alias, prefix in _ALIASES.items():
            if name.startswith(alias):
                own = prefix + name.removeprefix(alias)
        if not own.startswith(_CLASSIFIERS):
            unknown.append(name)
        elif _OBSOLETE.search(own):
            continue
        elif own in tensors and not same(tensors[own], tensor):
            raise ValueError(f"{path}: the two copies of {own} differ, so one of them is not what was trained")
        else:
            tensors[own] = tensor
    if not tensors:
        raise ValueError(
            f"{path}: no tensors of a vision_classifier or text_classifier: this is not a checkpoint of the released code; "
            f"it holds {', '.join(unknown[:5]) or 'nothing'}"
        )
    if unknown:
        warnings.warn(f"{path}: ignoring {len(unknown)} unknown tensors: {', '.join(unknown[:8])}", stacklevel=2)
    if diverged := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        warnings.warn(f"{path}: {len(diverged)} tensors hold NaN or infinity: {', '.join(diverged[:8])}", stacklevel=2)
    return ReleasedCheckpoint(options, tensors)


def _read_lightning(path: Path) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    checkpoint = read_pickle(path, "{'state_dict': ..., 'hyper_parameters': {'args': vars(args)}}", argparse.Namespace)
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{path}: a checkpoint of the released code is a dict with a 'state_dict', this is {type(checkpoint).__name__}"
        )
    refuse_strangers(state, f"{path}: in state_dict")
    # Lightning writes the options directly; scripts that save them explicitly put them under the name of the argument.
    options = checkpoint.get("hyper_parameters") or {}
    if isinstance(options, Mapping):
        options = options.get("args", options)
    if isinstance(options, argparse.Namespace):
        options = vars(options)
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise ValueError(f"{path}: hyper_parameters must hold options by name, got {type(options).__name__}")
    # Values that JSON cannot represent become their repr.
    return json.loads(json.dumps(dict(options), default=repr)), state


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            options = json.loads((file.metadata() or {}).get("options", "{}"))
            if not isinstance(options, dict):
                raise ValueError(f"{path}: its options must be options by name, got {type(options).__name__}")
            return options, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable checkpoint ({error})") from error


def read_pickle(path: Path, wanted: str, *classes: type) -> Any:
    """Read a file written by `torch.save` that holds tensors, plain values and objects of `classes`, without executing it.

    Args:
        path: File to read.
        wanted: Content to save instead, for the error.
        *classes: Classes whose objects the file may hold.

    Raises:
        ValueError: The file cannot be read, or holds anything else.
    """
    try:
        with torch.serialization.safe_globals([*classes]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        # torch's own message is not used, because it starts with advice to switch the check off.
        named = f"it requires {found[1]}" if found else "this is not a checkpoint that can be checked"
        *first, last = ("tensors", "plain values", *(f"{each.__module__}.{each.__qualname__}" for each in classes))
        raise ValueError(
            f"{path}: {named}, but only {', '.join(first)} and {last} are read. Nothing was executed. If you trust "
            f"the file, load it where it was made and save {wanted} again."
        ) from error
    # torch can raise almost any exception for a corrupt pickle.
    except Exception as error:
        raise ValueError(f"{path}: not a readable checkpoint, perhaps truncated ({type(error).__name__}: {error})") from error


def refuse_strangers(state: Mapping[Any, Any], where: str) -> None:
    """Raise ValueError if a state dict holds anything other than named tensors; `where` opens the message."""
    strangers = [name for name, value in state.items() if not (isinstance(name, str) and _is_plain(value))]
    if strangers:
        raise ValueError(f"{where} these are not tensors: {', '.join(map(str, strangers[:5]))}")


def _is_plain(value: Any) -> bool:
    """Return whether a value is a tensor whose data is fully in the file; an expanded tensor could claim any size."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
    )


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and values, where NaN equals NaN."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
