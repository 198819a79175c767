"""Checkpoints of all fusion systems: folders with the trained tensors, and the encoders as fingerprints or copies.

    config.json          configuration, version of this library, one record per encoder
    model.safetensors    trained tensors
    vision/  text/       copies of the encoders, if requested or fine-tuned (encoder/ for a fused encoder)
    tokenizer/  image_processor/     if the model has them

A checkpoint contains no code: no pickle, no remote code. Loading it needs no network unless an encoder's source is on the hub.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mope.backbones import architecture_for, find_architecture, find_fused, fused_class, original_state_dict, wrapped_by_peft
from mope.encoders.windowed import MoPESwinEncoder
from mope.fusion.sources import find_source, source_of, source_record, warn_of_missing

CONFIG, WEIGHTS = "config.json", "model.safetensors"
DTYPES = ("float16", "bfloat16", "float32", "float64")
LOADABLE = tuple(getattr(torch, name) for name in DTYPES)


@dataclass(frozen=True)
class Place:
    """Location of an encoder in a checkpoint, and its name in messages.

    Args:
        folder: Subfolder of the copy.
        argument: Argument of `from_pretrained` by which the encoder can be passed.
        what: Name of the encoder in errors.
        called: Name of the encoder in warnings.
    """

    folder: str
    argument: str
    what: str = "encoder"
    called: str = "encoder"


@dataclass(frozen=True)
class GivenEncoder:
    """Original encoder of a fusion model.

    Args:
        encoder: Model of transformers.
        state: Its weights.
        source: Where it came from, resolved when the fusion model was built, because the working directory may change later.
        place: Where a checkpoint keeps it.
        trains: Whether training changes its weights, so that it is always copied.
    """

    encoder: nn.Module
    state: Mapping[str, Tensor]
    source: str
    place: Place
    trains: bool = False


def original(backbone: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the original form of a backbone, and its weights."""
    return backbone.swin_model() if isinstance(backbone, MoPESwinEncoder) else (backbone, original_state_dict(backbone))


def describe(encoder: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Describe an encoder: class, source, dtype, and a fingerprint of its weights and of the config values that affect them.

    Args:
        encoder: Encoder of a known architecture, or a fused encoder.
        state: Its weights; the current ones by default.
    """
    config: Any = encoder.config
    kind: dict[str, str] = {"class": type(encoder).__name__}
    identity: Any
    if (fused := find_fused(encoder)) is not None:
        state = tensors = encoder.state_dict() if state is None else state
        identity = fused.identity(encoder)
    else:
        state = original_state_dict(encoder) if state is None else state
        architecture = find_architecture(encoder)
        identity = {name: getattr(config, name, None) for name in ("model_type", *architecture.identity)}
        tensors = architecture.stable_state(dict(state))
        kind["model_type"] = config.model_type
    return {
        **kind,
        "source": source_of(encoder),
        "dtype": str(next(t.dtype for t in state.values() if t.is_floating_point())).removeprefix("torch."),
        "fingerprint": fingerprint_of(identity, tensors),
    }


def fingerprint_of(identity: Any, tensors: Mapping[str, Tensor]) -> str:
    """Hash an encoder: its identity, and the names, shapes, dtypes and values of its tensors."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items(), key=itemgetter(0)):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_same_encoder(what: str, record: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise ValueError if the description of an encoder (`found`) does not match its record; `what` names it in the error."""
    if found["fingerprint"] != record["fingerprint"]:
        wanted, got = (f"{r['class']} {r['source'] or '(no name)'}, {r['dtype']}, {r['fingerprint'][:12]}" for r in (record, found))
        raise ValueError(f"this model was trained with another {what}: {wanted}; got {got}")


def check_options_of_saving(backbones: str, dtype: torch.dtype | None) -> None:
    """Raise ValueError if `backbones` is not a known option, or `dtype` cannot apply to copies."""
    if backbones not in ("by_name", "copy"):
        raise ValueError(f"save_pretrained: backbones must be 'by_name' or 'copy', got {backbones!r}")
    if dtype is not None and (backbones == "by_name" or not dtype.is_floating_point):
        raise ValueError(f"save_pretrained: dtype is the floating point type of copies, got {dtype} with backbones={backbones!r}")


def keep_encoder(given: GivenEncoder, folder: Path, backbones: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """Write a copy of an encoder if one is to be kept, and return its record.

    Args:
        given: The encoder.
        folder: Folder of the checkpoint.
        backbones: "by_name" or "copy"; an encoder that trains is always copied.
        dtype: Dtype of the copy, or None to keep the dtype of the weights.

    Raises:
        ValueError: The encoder cannot be copied.
    """
    encoder, state, place = given.encoder, given.state, given.place
    kept = "copy" if given.trains else backbones
    if kept == "copy":
        if peft := wrapped_by_peft(encoder):
            raise ValueError(
                f"the {place.what} is a {peft} of peft, which saves only its adapter: merge it before saving "
                f"({place.argument} = {place.argument}.merge_and_unload()), or save with backbones='by_name'"
            )
        stored = {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in state.items()}
        _save_copy(encoder, stored, folder / place.folder)
        # Fingerprint the weights that will be loaded, which are rounded to the dtype of the file.
        state = {name: stored[name].to(t.dtype) for name, t in state.items()}
    if kept == "by_name":
        warn_of_missing(f"its {place.called}", given.source, place.argument)
    return {"stored": kept, **describe(encoder, state), **source_record(given.source, folder)}


def _save_copy(encoder: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    save: Any = getattr(encoder, "save_pretrained", None)
    if save is None:
        raise ValueError(f"{type(encoder).__name__} has no save_pretrained: save the model with backbones='by_name'")
    # Pass a copy of the dict, because transformers empties it.
    save(folder, state_dict=dict(state))


def load_encoder(folder: Path, place: Place, record: Mapping[str, Any]) -> nn.Module:
    """Load an encoder that was not passed by the caller, from the copy in the checkpoint or else from its recorded source.

    Args:
        folder: Folder of the checkpoint.
        place: Where the checkpoint keeps the encoder.
        record: Record of the encoder in config.json.

    Raises:
        FileNotFoundError: There is no copy, and the record has no source or names a folder that does not exist.
        ValueError: The class of the encoder is unknown, or the encoder cannot be loaded.
    """
    class_name, what = record["class"], place.what
    ask = f"give it as from_pretrained(..., {place.argument}=...)"
    source, is_local = str(folder / place.folder), True
    if record["stored"] != "copy":
        source, is_local = find_source(folder, record, f"its {what}, a {class_name}", ask)
    try:
        model_class, options = _class_of(record)
        model: nn.Module = model_class.from_pretrained(
            source, dtype=getattr(torch, record["dtype"]), local_files_only=is_local, use_safetensors=True, **options
        )
        return model
    # transformers can raise almost any exception for a corrupt folder.
    except Exception as error:
        raise ValueError(f"cannot load the {what}, a {class_name}, from {source} ({error}): {ask}") from error


def _class_of(record: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the class that a record names, looked up among model classes only, and the options for loading it."""
    if "model_type" not in record:
        return fused_class(record["class"]), {}
    architecture = architecture_for(record["model_type"])
    found = architecture.model_class or getattr(transformers, record["class"], None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError("transformers has no such class")
    return found, architecture.load_options


def write_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Write the configuration that `read_values` reads. Call it last, so that a folder with a config is complete."""
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")


def read_values(folder: Path) -> Any:
    """Read the configuration of a checkpoint.

    Raises:
        FileNotFoundError: The folder has no config.json.
        ValueError: The file is not valid JSON.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} is not a checkpoint: it has no {CONFIG}. from_pretrained expects a folder written by save_pretrained"
        )
    try:
        return json.loads(file.read_text())
    # Python also raises these if a number has too many digits or brackets are nested too deeply.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not readable JSON: {error}") from error


def check_record(file: Path, what: str, record: Any, fields: Sequence[str]) -> None:
    """Raise ValueError if the record of an encoder lacks one of the `fields`, which must be strings, or its dtype is unknown."""
    texts = [record.get(name) for name in fields] if isinstance(record, dict) else [None]
    if not all(isinstance(text, str) for text in texts) or record["dtype"] not in DTYPES:
        raise ValueError(f"{file}: the record of the {what} must hold {', '.join(fields)}, with a dtype of {DTYPES}")


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write named tensors to a safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


def read_tensors(file: Path, if_missing: str = "the checkpoint is not complete") -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, excluding the encoders, by name.

    Args:
        file: A safetensors file.
        if_missing: Explanation to add to the error if the file is missing.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not a readable safetensors file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {if_missing}")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error


class Differences(NamedTuple):
    """Names of the tensors that differ from those that they are to replace, by kind of difference."""

    missing: list[str]
    unknown: list[str]
    of_shape: list[str]
    of_dtype: list[str]


def compare_tensors(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Differences:
    """Compare tensors with those that they are to replace; all floating-point dtypes are interchangeable.

    Names are listed in the order of `own`, unknown ones in the order of `given`.
    """
    both = [name for name in own if name in given]
    return Differences(
        [name for name in own if name not in given],
        [name for name in given if name not in own],
        [name for name in both if given[name].shape != own[name].shape],
        [name for name in both if given[name].dtype not in (LOADABLE if own[name].is_floating_point() else (own[name].dtype,))],
    )
