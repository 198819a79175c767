"""Checkpoints: a folder that holds what was trained, and the backbones by fingerprint or as copies.

    config.json          MoPEConfig, the version of this library, one record for each backbone
    model.safetensors    prompts, routers, mapper, head
    vision/  text/       copies of the backbones, if asked for or if they were fine-tuned
    tokenizer/  image_processor/     if the model has them

Nothing in it is code: no pickle, no remote code. Nothing needs a network unless a backbone's source is on the hub.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from abc import abstractmethod
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mope.backbones import architecture_for, base_model, find_architecture, original_state_dict, wrapped_by_peft
from mope.encoders.windowed import MoPESwinEncoder
from mope.fusion.base import FusionModel
from mope.fusion.config import MoPEConfig
from mope.fusion.sources import find_source, source_of, source_record, warn_of_missing

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Of a backbone in config.json.
RECORD = ("stored", "class", "model_type", "source", "dtype", "fingerprint")
DTYPES = ("float16", "bfloat16", "float32", "float64")
LOADABLE = tuple(getattr(torch, name) for name in DTYPES)


class SavedModel(FusionModel):
    """`save_pretrained` and `from_pretrained` of a MoPE model."""

    config: MoPEConfig
    # Where each encoder came from.
    _sources: dict[str, str]

    @abstractmethod
    def added_state_dict(self) -> dict[str, Tensor]:
        """All but the encoders, by name."""

    def fingerprints(self) -> dict[str, str]:
        """Of each encoder as it was given, "trained" for one that trains."""
        with self.weights_as_given():
            return {
                m: "trained" if m in self.config.finetuned else describe(*original(self.backbone(m)))["fingerprint"]
                for m in self.config.modalities
            }

    def save_pretrained(self, path: str | Path, backbones: str = "by_name", dtype: torch.dtype | None = None) -> None:
        """Write a checkpoint.

        Args:
            path: of the folder; made if need be.
            backbones: "by_name" keeps the backbones' names and fingerprints, "copy" the backbones themselves too. One that was
                fine-tuned is copied in any case.
            dtype: of the copies' files; they are cast back when they are loaded. None: as they are.

        Raises:
            ValueError: `backbones` is neither, `dtype` is given without copies, or a backbone cannot be copied.
        """
        if backbones not in ("by_name", "copy"):
            raise ValueError(f"save_pretrained: backbones must be 'by_name' or 'copy', got {backbones!r}")
        if dtype is not None and (backbones == "by_name" or not dtype.is_floating_point):
            raise ValueError(
                f"save_pretrained: dtype is the floating point type of copies, got {dtype} with backbones={backbones!r}"
            )
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        with self.weights_as_given():
            records = {modality: self._save_backbone(modality, folder, backbones, dtype) for modality in self.config.modalities}
        self.save_processors(folder)
        save_file({name: t.contiguous() for name, t in self.added_state_dict().items()}, folder / WEIGHTS, {"format": "pt"})
        # Last, so that a folder with a config is complete.
        (folder / CONFIG).write_text(json.dumps({**self.config.to_dict(), "backbones": records}, indent=2) + "\n")

    def _save_backbone(self, modality: str, folder: Path, backbones: str, dtype: torch.dtype | None) -> dict[str, Any]:
        """Its record, and a copy where one is kept."""
        backbone, state = original(self.backbone(modality))
        kept = "copy" if modality in self.config.finetuned else backbones
        if kept == "copy":
            if peft := wrapped_by_peft(backbone):
                raise ValueError(
                    f"the {modality} backbone is a {peft} of peft, which saves its adapter alone: merge it before "
                    f"({modality} = {modality}.merge_and_unload()), or save with backbones='by_name'"
                )
            stored = {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in state.items()}
            _save_copy(backbone, stored, folder / modality)
            # What will be loaded: rounded to the dtype of the file.
            state = {name: stored[name].to(t.dtype) for name, t in state.items()}
        # As it was when the model was made: the working directory may be another one now.
        source = self._sources[modality]
        if kept == "by_name":
            warn_of_missing(f"its {modality} encoder", source, modality)
        return {"stored": kept, **describe(backbone, state), **source_record(source, folder)}

    @classmethod
    def from_pretrained(cls, path: str | Path, **given: nn.Module | None) -> Self:
        """Read a checkpoint; the model comes back in evaluation mode.

        Args:
            path: a folder that `save_pretrained` wrote.
            given: `vision=`, `text=` and so on, the backbones it was trained with, fine-tuned ones with the weights that they have
                now. Those not given are loaded: from the copies in the folder, else by the name that they had.

        Raises:
            FileNotFoundError: there is no checkpoint, or a backbone without a copy was loaded from nowhere.
            ValueError: a backbone is another one than in training, a file is corrupt, tensors are missing or have other shapes.

        Unknown keys and tensors are warned about by name.
        """
        folder = Path(path)
        config, records = read_config(folder)
        backbones = dict(given)
        for modality in config.modalities:
            backbone = given.get(modality) or load_backbone(folder, modality, records[modality])
            check_backbone(modality, records[modality], describe(base_model(backbone)))
            backbones[modality] = backbone
        tensors = read_tensors(folder / WEIGHTS)

        build: Any = cls
        model: Self = build(config, **backbones)
        try:
            model.load_added(tensors, folder / WEIGHTS)
        except BaseException:
            model.detach()
            raise
        model.find_processors(folder)
        return model.eval()

    def load_added(self, tensors: dict[str, Tensor], file: Path) -> None:
        """Take all but the encoders from the tensors of a file. Where one is missing or does not fit, ValueError and no change."""
        expected = self.added_state_dict()
        if missing := sorted(set(expected) - set(tensors)):
            raise ValueError(f"{file} lacks {', '.join(missing)}")
        wrong = [
            f"{name} is {tuple(tensors[name].shape)}, the config says {tuple(t.shape)}"
            for name, t in expected.items()
            if tensors[name].shape != t.shape
        ]
        wrong += [
            f"{name} is {tensors[name].dtype}, expected {'floating point' if t.is_floating_point() else t.dtype}"
            for name, t in expected.items()
            if tensors[name].dtype not in (LOADABLE if t.is_floating_point() else (t.dtype,))
        ]
        if wrong:
            raise ValueError(f"{file}: {'; '.join(wrong)}")
        if unknown := sorted(set(tensors) - set(expected)):
            warnings.warn(f"{file}: ignoring unknown tensors {', '.join(unknown)}", stacklevel=3)
        # Copied out of the file's mapping, in which tensors are not aligned.
        device = next(self.backbone(self.config.main).parameters()).device
        on_device = {name: tensors[name].to(device, copy=True) for name in expected}
        self.load_state_dict(on_device, strict=False, assign=True)


def original(backbone: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """The backbone as it was given, and its weights."""
    return backbone.swin_model() if isinstance(backbone, MoPESwinEncoder) else (backbone, original_state_dict(backbone))


def describe(backbone: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Which model a backbone is: class, source, dtype, and a fingerprint of its weights and of what its config says about them."""
    config: Any = backbone.config
    state = original_state_dict(backbone) if state is None else state
    architecture = find_architecture(backbone)
    identity = {name: getattr(config, name, None) for name in ("model_type", *architecture.identity)}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode())
    for name, tensor in sorted(architecture.stable_state(state).items(), key=itemgetter(0)):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return {
        "class": type(backbone).__name__,
        "model_type": config.model_type,
        "source": source_of(backbone),
        "dtype": str(next(t.dtype for t in state.values() if t.is_floating_point())).removeprefix("torch."),
        "fingerprint": digest.hexdigest(),
    }


def _save_copy(backbone: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    save: Any = getattr(backbone, "save_pretrained", None)
    if save is None:
        raise ValueError(f"{type(backbone).__name__} has no save_pretrained: save the model with backbones='by_name'")
    # A dict of its own: transformers empties it.
    save(folder, state_dict=dict(state))


def load_backbone(folder: Path, modality: str, record: dict[str, Any]) -> nn.Module:
    class_name = record["class"]
    ask = f"give it as from_pretrained(..., {modality}=...)"
    source, is_local = str(folder / modality), True
    if record["stored"] != "copy":
        source, is_local = find_source(folder, record, f"its {modality} backbone, a {class_name}", ask)
    architecture = architecture_for(record["model_type"])
    backbone_class = architecture.model_class or getattr(transformers, class_name, None)
    if not (isinstance(backbone_class, type) and issubclass(backbone_class, transformers.PreTrainedModel)):
        raise ValueError(f"the {modality} backbone is a {class_name}, which transformers does not have: {ask}")
    try:
        return backbone_class.from_pretrained(
            source,
            dtype=getattr(torch, record["dtype"]),
            local_files_only=is_local,
            use_safetensors=True,
            **architecture.load_options,
        )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"cannot load the {modality} backbone, a {class_name}, from {source} ({error}): {ask}") from error


def check_backbone(modality: str, record: dict[str, Any], found: dict[str, Any]) -> None:
    """ValueError where a backbone, as `describe` found it, is another one than that of the record."""
    if found["fingerprint"] != record["fingerprint"]:
        wanted, got = (f"{r['class']} {r['source'] or '(no name)'}, {r['dtype']}, {r['fingerprint'][:12]}" for r in (record, found))
        raise ValueError(f"this model was trained with another {modality} backbone: {wanted}; got {got}")


def read_config(folder: Path) -> tuple[MoPEConfig, dict[str, dict[str, Any]]]:
    """The configuration in a checkpoint, and the record of each backbone that it needs."""
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} is no checkpoint: it has no {CONFIG}. from_pretrained takes a folder that save_pretrained wrote"
        )
    try:
        values = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("backbones"), dict):
        raise ValueError(f"{file} is no MoPEConfig with records of its backbones")
    for modality, record in values["backbones"].items():
        texts = [record.get(name) for name in RECORD] if isinstance(record, dict) else [None]
        if not all(isinstance(text, str) for text in texts) or record["dtype"] not in DTYPES:
            raise ValueError(
                f"{file}: the record of the {modality} backbone must hold {', '.join(RECORD)}, with a dtype of {DTYPES}"
            )
    # Else a damaged number of labels would make as many names.
    if values.get("id2label") is None:
        raise ValueError(f"{file} lacks id2label, the names of the labels")
    try:
        config = MoPEConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    for modality in config.modalities:
        if modality not in values["backbones"]:
            raise ValueError(f"{file} has no record of the {modality} backbone")
    return config, {modality: values["backbones"][modality] for modality in config.modalities}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """What a checkpoint holds beside the backbones, by name."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: the checkpoint is not complete")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is no readable safetensors file: {error}") from error
