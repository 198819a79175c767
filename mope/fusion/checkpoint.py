"""Checkpoints of any system: a folder that holds what was trained, and the encoders by fingerprint or as copies.

    config.json          the configuration, the version of this library, one record for each encoder
    model.safetensors    what was trained
    vision/  text/       copies of the encoders, if asked for or if they were fine-tuned; encoder/ of one that is fused
    tokenizer/  image_processor/     if the model has them

Nothing in it is code: no pickle, no remote code. Nothing needs a network unless an encoder's source is on the hub.
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
    """Say where a checkpoint keeps an encoder, and what messages call it.

    Args:
        folder: of a copy.
        argument: of `from_pretrained`, by which it can be given.
        what: the encoder, in errors.
        called: the encoder, in warnings.
    """

    folder: str
    argument: str
    what: str = "encoder"
    called: str = "encoder"


@dataclass(frozen=True)
class GivenEncoder:
    """An encoder as it was given to a model.

    Args:
        encoder, state: the model of transformers, and its weights.
        source: where it came from when the model was made: the working directory may be another one now.
        place: where a checkpoint keeps it.
        trains: whether its weights are others by now, so that it is copied in any case.
    """

    encoder: nn.Module
    state: Mapping[str, Tensor]
    source: str
    place: Place
    trains: bool = False


def original(backbone: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """The backbone as it was given, and its weights."""
    return backbone.swin_model() if isinstance(backbone, MoPESwinEncoder) else (backbone, original_state_dict(backbone))


def describe(encoder: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Which model an encoder is: class, source, dtype, and a fingerprint of its weights and of what its config says about them.

    Args:
        encoder: of a known architecture, or fused.
        state: its weights; default: those that it has now.
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
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items(), key=itemgetter(0)):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_same_encoder(what: str, record: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """ValueError where an encoder, as `describe` found it, is another one than that of the record. `what` names it."""
    if found["fingerprint"] != record["fingerprint"]:
        wanted, got = (f"{r['class']} {r['source'] or '(no name)'}, {r['dtype']}, {r['fingerprint'][:12]}" for r in (record, found))
        raise ValueError(f"this model was trained with another {what}: {wanted}; got {got}")


def check_options_of_saving(backbones: str, dtype: torch.dtype | None) -> None:
    """ValueError where `backbones` is no way of keeping encoders, or `dtype` none of copies."""
    if backbones not in ("by_name", "copy"):
        raise ValueError(f"save_pretrained: backbones must be 'by_name' or 'copy', got {backbones!r}")
    if dtype is not None and (backbones == "by_name" or not dtype.is_floating_point):
        raise ValueError(f"save_pretrained: dtype is the floating point type of copies, got {dtype} with backbones={backbones!r}")


def keep_encoder(given: GivenEncoder, folder: Path, backbones: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """Return the record of an encoder, and write a copy of it where one is kept."""
    encoder, state, place = given.encoder, given.state, given.place
    kept = "copy" if given.trains else backbones
    if kept == "copy":
        if peft := wrapped_by_peft(encoder):
            raise ValueError(
                f"the {place.what} is a {peft} of peft, which saves its adapter alone: merge it before "
                f"({place.argument} = {place.argument}.merge_and_unload()), or save with backbones='by_name'"
            )
        stored = {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in state.items()}
        _save_copy(encoder, stored, folder / place.folder)
        # The weights as they will be loaded, rounded to the dtype of the file.
        state = {name: stored[name].to(t.dtype) for name, t in state.items()}
    if kept == "by_name":
        warn_of_missing(f"its {place.called}", given.source, place.argument)
    return {"stored": kept, **describe(encoder, state), **source_record(given.source, folder)}


def _save_copy(encoder: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    save: Any = getattr(encoder, "save_pretrained", None)
    if save is None:
        raise ValueError(f"{type(encoder).__name__} has no save_pretrained: save the model with backbones='by_name'")
    # A dict of its own: transformers empties it.
    save(folder, state_dict=dict(state))


def load_encoder(folder: Path, place: Place, record: Mapping[str, Any]) -> nn.Module:
    """Load an encoder that was not given: the copy in the checkpoint's folder, else from where it came.

    Raises:
        FileNotFoundError: it has no copy and came from nowhere, or from a folder that is not here.
        ValueError: it is of an unknown class, or cannot be loaded.
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
    # A damaged folder makes transformers raise almost anything.
    except Exception as error:
        raise ValueError(f"cannot load the {what}, a {class_name}, from {source} ({error}): {ask}") from error


def _class_of(record: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class that a record names, looked up among models only, and options to load it with."""
    if "model_type" not in record:
        return fused_class(record["class"]), {}
    architecture = architecture_for(record["model_type"])
    found = architecture.model_class or getattr(transformers, record["class"], None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError("a class which transformers does not have")
    return found, architecture.load_options


def write_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Write what `read_values` reads. Last of all files, so that a folder with a config is complete."""
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")


def read_values(folder: Path) -> Any:
    """Read the configuration of a checkpoint.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is no JSON.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} is no checkpoint: it has no {CONFIG}. from_pretrained takes a folder that save_pretrained wrote"
        )
    try:
        return json.loads(file.read_text())
    # Also where a number has more digits than Python reads, or brackets are too deep.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not readable JSON: {error}") from error


def check_record(file: Path, what: str, record: Any, fields: Sequence[str]) -> None:
    """ValueError where what should be the record of an encoder lacks one of the `fields`, which are texts."""
    texts = [record.get(name) for name in fields] if isinstance(record, dict) else [None]
    if not all(isinstance(text, str) for text in texts) or record["dtype"] not in DTYPES:
        raise ValueError(f"{file}: the record of the {what} must hold {', '.join(fields)}, with a dtype of {DTYPES}")


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors by name."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


def read_tensors(file: Path, if_missing: str = "the checkpoint is not complete") -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, without the encoders, by name.

    Raises:
        FileNotFoundError: the file is not there, with what that means.
        ValueError: it is no such file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {if_missing}")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is no readable safetensors file: {error}") from error


class Differences(NamedTuple):
    """In what tensors differ from those that they shall replace, by name."""

    missing: list[str]
    unknown: list[str]
    of_shape: list[str]
    of_dtype: list[str]


def compare_tensors(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Differences:
    """Compare tensors with those that they shall replace, each in the order of its own. Any floating point fits any other."""
    both = [name for name in own if name in given]
    return Differences(
        [name for name in own if name not in given],
        [name for name in given if name not in own],
        [name for name in both if given[name].shape != own[name].shape],
        [name for name in both if given[name].dtype not in (LOADABLE if own[name].is_floating_point() else (own[name].dtype,))],
    )
