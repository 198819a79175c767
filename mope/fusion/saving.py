"""Checkpoint files of a MoPE model: `save_pretrained` and `from_pretrained`."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from mope.backbones import base_model
from mope.fusion.base import FusionModel
from mope.fusion.checkpoint import (
    CONFIG,
    WEIGHTS,
    GivenEncoder,
    Place,
    check_record,
    check_same_encoder,
    compare_tensors,
    describe,
    load_encoder,
    original,
    read_tensors,
    read_values,
)
from mope.fusion.config import MoPEConfig
from mope.fusion.hub import config_to_build, folder_of

# Keys of a backbone's record in config.json.
RECORD = ("stored", "class", "model_type", "source", "dtype", "fingerprint")


class SavedModel(FusionModel):
    """Base class with `save_pretrained` and `from_pretrained` of a MoPE model."""

    config: MoPEConfig
    configuration = MoPEConfig
    # Where each encoder came from.
    _sources: dict[str, str]

    @abstractmethod
    def added_state_dict(self) -> dict[str, Tensor]:
        """Return all tensors except those of the encoders, by name."""

    def saved_state_dict(self) -> dict[str, Tensor]:
        """Return `added_state_dict`; encoders that train are saved as copies."""
        return self.added_state_dict()

    def given_encoders(self) -> dict[str, GivenEncoder]:
        """Return the original encoders, by modality."""
        return {
            m: GivenEncoder(*original(self.backbone(m)), self._sources[m], _place(m), trains=m in self.config.finetuned)
            for m in self.config.modalities
        }

    def records_in_config(self, records: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Return the records under a single key."""
        return {"backbones": records}

    @classmethod
    def from_pretrained(cls, path: str | Path, **given: Any) -> Self:  # type: ignore[override]
        """Load a checkpoint, and return the model in evaluation mode.

        A warning names unknown keys and tensors.

        Args:
            path: A folder written by `save_pretrained`, or a name on the hub.
            **given: The backbones that the model was trained with, `vision=`, `text=` and so on; fine-tuned ones with their current
                weights. Backbones that are not given are loaded from the copies in the folder, or else from their recorded source.
                `config=` replaces the saved configuration; revision=, token=, cache_dir=, local_files_only= and force_download=
                have the same meaning as in transformers.

        Raises:
            FileNotFoundError: There is no checkpoint, or a backbone has neither a copy nor a source.
            ValueError: A backbone differs from the one used in training, a file is corrupt, or tensors are missing or have other
                shapes.
        """
        folder = folder_of(path, given)
        changed = given.pop("config", None)
        config, records = read_config(folder)
        config = config_to_build(changed, config)
        backbones = dict(given)
        for modality in config.modalities:
            backbone = given.get(modality) or load_backbone(folder, modality, records[modality])
            check_same_encoder(f"{modality} backbone", records[modality], describe(base_model(backbone)))
            backbones[modality] = backbone
        tensors = read_tensors(folder / WEIGHTS)

        build: Any = cls
        model: Self = build(config, **backbones)
        return model.restored(tensors, folder)

    def load_saved(self, tensors: dict[str, Tensor], file: Path) -> None:
        """Load everything except the encoders from the tensors of a file.

        Raises:
            ValueError: A tensor is missing or does not fit; the model is left unchanged.
        """
        expected = self.added_state_dict()
        found = compare_tensors(tensors, expected)
        if found.missing:
            raise ValueError(f"{file} lacks {', '.join(sorted(found.missing))}")
        wrong = [f"{name} is {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}" for name in found.of_shape]
        wrong += [
            f"{name} is {tensors[name].dtype}, expected {'floating point' if t.is_floating_point() else t.dtype}"
            for name, t in ((name, expected[name]) for name in found.of_dtype)
        ]
        if wrong:
            raise ValueError(f"{file}: {'; '.join(wrong)}")
        # Checkpoints of transformers' Trainer also hold the fine-tuned encoders, which are not unknown.
        if strangers := set(found.unknown) - self.trained_state_dict().keys():
            warnings.warn(f"{file}: ignoring unknown tensors {', '.join(sorted(strangers))}", stacklevel=4)
        # Copy the tensors out of the memory-mapped file, in which they are not aligned.
        device = next(self.backbone(self.config.main).parameters()).device
        on_device = {name: tensors[name].to(device, copy=True) for name in expected}
        self.load_state_dict(on_device, strict=False, assign=True)


def _place(modality: str) -> Place:
    return Place(modality, modality, f"{modality} backbone", f"{modality} encoder")


def load_backbone(folder: Path, modality: str, record: dict[str, Any]) -> nn.Module:
    """Load the encoder of a modality from its record in the checkpoint in `folder`, see `load_encoder`."""
    return load_encoder(folder, _place(modality), record)


def read_config(folder: Path) -> tuple[MoPEConfig, dict[str, dict[str, Any]]]:
    """Read the configuration of a checkpoint, and the record of each backbone that it needs.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The configuration is corrupt or incomplete.
    """
    file, values = folder / CONFIG, read_values(folder)
    if not isinstance(values, dict) or not isinstance(values.get("backbones"), dict):
        raise ValueError(f"{file} is not a MoPEConfig with records of its backbones")
    for modality, record in values["backbones"].items():
        check_record(file, f"{modality} backbone", record, RECORD)
    # Without this check, a corrupt num_labels would generate that many names.
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
