"""Checkpoints of the released code: Lightning's `.ckpt` files, read without running anything in them."""

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

# Every tensor is there under both names.
_ALIASES = {"classifier.vision_model.": "vision_classifier.", "classifier.text_model.": "text_classifier."}
# Under the last one remains what joins the two, in some fusion methods.
_CLASSIFIERS = (*_ALIASES.values(), "classifier.")
# Buffers that older versions of transformers saved.
_OBSOLETE = re.compile(r"\.position_ids$")


@dataclass(frozen=True, eq=False)
class ReleasedCheckpoint:
    """What a checkpoint of the released code holds.

    options: of the training script, what of it JSON can hold.
    tensors: each once, under `vision_classifier.`, `text_classifier.` or, where a fusion method has tensors beside these two,
        `classifier.`. The weights of attention, MLPs and patch merging are not among them: the released code leaves them out, and
        they come from the backbones again.
    """

    options: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, without it."""
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    def save(self, path: str | Path) -> None:
        """Write tensors and options as one `.safetensors` file, which `read_released_checkpoint` reads too."""
        # Copies: safetensors refuses tensors that share memory.
        tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in self.tensors.items()}
        save_file(tensors, path, metadata={"options": json.dumps(self.options)})


def read_released_checkpoint(path: str | Path) -> ReleasedCheckpoint:
    """Read a Lightning `.ckpt` of the released code, or what `ReleasedCheckpoint.save` made of one.

    A `.ckpt` is a pickle. It is read with `weights_only=True` and an allow-list of one class, argparse.Namespace: nothing in it is
    executed. Tensors that are no part of the classifiers are left out with a warning that names them, and so are named those that
    hold NaN or infinity.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, holds something else than tensors and options, or two copies of a tensor differ.
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
            f"{path}: no tensors of a vision_classifier or text_classifier: this is no checkpoint of the released code; "
            f"it holds {', '.join(unknown[:5]) or 'nothing'}"
        )
    if unknown:
        warnings.warn(f"{path}: {len(unknown)} unknown tensors are left out: {', '.join(unknown[:8])}", stacklevel=2)
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
    # Lightning writes the options themselves; scripts that save them on their own put them under the name of the argument.
    options = checkpoint.get("hyper_parameters") or {}
    if isinstance(options, Mapping):
        options = options.get("args", options)
    if isinstance(options, argparse.Namespace):
        options = vars(options)
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise ValueError(f"{path}: hyper_parameters hold no options by name, but {type(options).__name__}")
    # What JSON can hold; the rest as its description.
    return json.loads(json.dumps(dict(options), default=repr)), state


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            options = json.loads((file.metadata() or {}).get("options", "{}"))
            if not isinstance(options, dict):
                raise ValueError(f"{path}: its options are no options by name, but {type(options).__name__}")
            return options, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable checkpoint ({error})") from error


def read_pickle(path: Path, wanted: str, *classes: type) -> Any:
    """What `torch.save` wrote: tensors, plain values and objects of these classes. Nothing in the file is executed.

    ValueError for everything else, advising to save `wanted` instead.
    """
    try:
        with torch.serialization.safe_globals([*classes]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        # Else torch's first line is advice to switch the check off.
        named = f"it asks for {found[1]}" if found else "this is no checkpoint that can be checked"
        *first, last = ("tensors", "plain values", *(f"{each.__module__}.{each.__qualname__}" for each in classes))
        raise ValueError(
            f"{path}: {named}, and only {', '.join(first)} and {last} are read. Nothing was executed. If you trust "
            f"the file, load it where it was made and save {wanted} again."
        ) from error
    # A damaged pickle makes torch raise almost anything.
    except Exception as error:
        raise ValueError(f"{path}: not a readable checkpoint, perhaps cut off ({type(error).__name__}: {error})") from error


def refuse_strangers(state: Mapping[Any, Any], where: str) -> None:
    """ValueError where a state dict holds something else than tensors by name."""
    strangers = [name for name, value in state.items() if not (isinstance(name, str) and _is_plain(value))]
    if strangers:
        raise ValueError(f"{where} these are no tensors: {', '.join(map(str, strangers[:5]))}")


def _is_plain(value: Any) -> bool:
    """Whether this is a tensor whose values all are in the file: one that is expanded could claim any size."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
    )


def same(one: Tensor, other: Tensor) -> bool:
    """Bit by bit but for NaN, which is NaN."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
