"""Classifiers built on fused image-text models with adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from mope.backbones import FusedEncoder, find_fused, known_fused
from mope.checks import check_are_tensors, check_encoder, names_of
from mope.encoders.recomputing import Recomputing
from mope.fusion.base import FusionModel, in_frozen_dtype
from mope.fusion.checkpoint import (
    CONFIG,
    WEIGHTS,
    GivenEncoder,
    Place,
    check_record,
    check_same_encoder,
    describe,
    load_encoder,
    read_tensors,
    read_values,
)
from mope.fusion.heads import task_loss
from mope.fusion.hub import config_to_build, folder_of
from mope.fusion.inputs import InputChecks, as_encoder_knows
from mope.fusion.sources import source_of
from mope.modalities import slots_of
from mope.printing import describe_output
from mope.registering import register_model

# Imported because it registers a class of fused models.
from . import albef as albef
from .attaching import attach, expected_tensors
from .configuration import SYSTEM, ClassifierConfig, ModeXConfig
from .saving import check_tensors

# Key in config.json, and name of the folder with a copy of the encoder.
ENCODER = "encoder"
_PLACE = Place(ENCODER, "model")


@dataclass
class ModeXOutput(ModelOutput):
    """Output of a `ModeXForClassification`.

    Attributes:
        loss: Scalar loss, None without labels.
        logits: Logits (B,num_labels).
        features: Features (B,C) of the fused text's first token.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    features: Tensor | None = None

    def __repr__(self) -> str:
        return describe_output(self)


class ModeXForClassification(FusionModel):
    """Classifier of image-text pairs with a frozen fused encoder; adapters, LayerNorms and head are trained.

    The head reads the fused text's first token: Linear(C,C), ReLU, Linear(C,num_labels), as published.

    The encoder is frozen and has its adapters from construction until `detach`. It is available as `encoder`, its adapters as
    `adapters`. A new model is in the mode of its encoder, which is evaluation mode after `from_pretrained`.

    Args:
        model: An `AlbefModel`, or a transformers BLIP model whose text encoder attends to the image: `BlipForImageTextRetrieval` or
            `BlipForQuestionAnswering`.
        config: Configuration of the adapters. With None there are no adapters, and only the head trains.
        num_labels: Number of classes. It may be omitted if `id2label` is given.
        id2label: Names of the classes, a sequence or {index: name}. Default: LABEL_0, LABEL_1, ...
        problem_type, padding_side: See `ClassifierConfig`.

    Raises:
        ValueError: If the model is of another class or does not have the sites in the config, or the classes are not given.
    """

    config: ClassifierConfig

    configuration = ClassifierConfig

    def __init__(
        self,
        model: nn.Module,
        config: ModeXConfig | None,
        num_labels: int | None = None,
        *,
        id2label: Mapping[int, str] | Sequence[str] | None = None,
        problem_type: str = "single_label",
        padding_side: str = "right",
    ) -> None:
        super().__init__()
        if id2label is None:
            if not num_labels:
                raise ValueError("ModeXForClassification: give num_labels or id2label")
            id2label = [f"LABEL_{i}" for i in range(num_labels)]
        names = names_of(id2label, "ModeXForClassification")
        if num_labels not in (None, len(names)):
            raise ValueError(f"ModeXForClassification: num_labels is {num_labels}, but id2label names {len(names)}")
        self.config = ClassifierConfig(config, names, problem_type, padding_side)
        check_encoder(model, "model")
        self._fused = _fused(model)
        self.encoder: Any = model
        self._source = source_of(model)
        self._requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self.slots = slots_of(self.config)
        self.input_checks = InputChecks(self.slots, self._fused.refused)
        self.adapters = None if config is None else attach(model, config)
        try:
            for name, parameter in model.named_parameters():
                if self.adapters is None or name.startswith(self._fused.unread):
                    parameter.requires_grad_(False)
            width = self.backbone("text").config.hidden_size
            self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, len(names))).to(self.device)
            # All parts share one mode, so that the mode of the model also tells whether the encoder's dropout is active.
            self.train(model.training)
        # The caller could not detach the adapters, because there is no model yet.
        except BaseException:
            self.detach()
            raise
        self.input_checks.sign(self)

    def backbone(self, modality: str) -> Any:
        """Return the "vision" or "text" part of the encoder."""
        return getattr(self.encoder, self._fused.parts[modality])

    def modality_of(self, parameter: str) -> str:
        """Return the part a parameter belongs to; the head and the fusion layers count as text."""
        return "vision" if parameter.startswith(f"{ENCODER}.{self._fused.parts['vision']}.") else "text"

    def frozen_modules(self) -> list[nn.Module]:
        """Return the encoder."""
        return [self.encoder]

    def recompute(self, recomputing: Recomputing | None) -> None:
        """Enable or disable recomputation of the encoder's layers in the backward pass."""
        # transformers 6 will have only the first name, older versions have the second.
        what = "disable" if recomputing is None else "enable"
        change = getattr(self.encoder, f"activation_checkpointing_{what}", None)
        change = change or getattr(self.encoder, f"gradient_checkpointing_{what}")
        if recomputing is None:
            change()
        else:
            # transformers offloads to pinned host memory, which needs an accelerator.
            offload = recomputing.offload and self.device.type != "cpu"
            change({"use_reentrant": False}, every_n_layers=recomputing.every, offload=offload)
        # transformers makes the input embeddings require gradients. Only reentrant checkpointing needs that, and it is an error in
        # BLIP, which adds to them in place.
        self.encoder.disable_input_require_grads()

    def frozen_weights_moved(self) -> None:
        """Set up recomputation again, because its options depend on the encoder's device."""
        if self._checkpointing is not None:
            self.recompute(self._checkpointing)

    def detach(self) -> None:
        """Restore the encoder: remove adapters, and restore LayerNorms and `requires_grad`. The model can no longer run."""
        self.cast_frozen(None)
        if self.adapters is not None:
            self.adapters.detach()
        for name, parameter in self.encoder.named_parameters():
            parameter.requires_grad_(self._requires_grad[name])

    def routes(self) -> AbstractContextManager[dict[str, list[Tensor]]]:
        """Collect the weights of the experts; see `Adapters.routes`.

        Raises:
            ValueError: If the model has no adapters.
        """
        if self.adapters is None:
            raise ValueError("this model has no adapters and therefore no routes")
        return self.adapters.routes()

    @contextmanager
    def answering(self, *, experts: bool = False) -> Iterator[Callable[..., tuple[Tensor, dict[str, Tensor]]]]:
        """See `FusionModel.answering`; the weights are means over the tokens of an item, by adapter and its run in a call."""
        with ExitStack() as stack:
            if not experts:
                yield stack.enter_context(super().answering())
                return
            if self.adapters is None:
                raise ValueError("experts: this model has no adapters, so there are none to name")
            answer = stack.enter_context(super().answering())

            def with_experts(**batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
                with self.routes() as found:
                    logits, _ = answer(**batch)
                return logits, self._mean_weights(found, batch)

            yield with_experts

    def _mean_weights(self, found: Mapping[str, list[Tensor]], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights (B,T,E) of each run of an adapter -> their means (B,E) over tokens that are no padding."""
        means = {}
        for name, runs in found.items():
            part = next(p for p in self.config.modalities if name.startswith(f"{self._fused.parts[p]}."))
            mask = batch.get(self.slots[part].mask or "")
            for run, weights in enumerate(runs, 1):
                if weights.shape[-1] == 1:
                    continue
                shown = torch.ones(weights.shape[:2]) if mask is None else mask
                shown = shown.to(weights.device, weights.dtype)[..., None]
                means[name if len(runs) == 1 else f"{name}, run {run}"] = (weights * shown).sum(1) / shown.sum(1)
        return means

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or an unpickled model."""
        super().__setstate__(state)
        self.input_checks.sign(self)

    @in_frozen_dtype
    def forward(self, /, *, labels: Tensor | None = None, **inputs: Any) -> ModeXOutput:
        """Classify a batch.

        Args:
            inputs: Inputs of the encoder's parts under the modalities' batch names, as in `MoPEForClassification`;
                `inspect.signature(model.forward)` lists them. BLIP has no token types and ignores them.
            labels: Integer labels (B,), or labels (B,num_labels) of 0 and 1 with problem_type "multi_label".

        Raises:
            TypeError: If an input is not a tensor, or no modality has an input of its name.
            ValueError: If an input is missing, numbers of items differ, a shape is wrong, or token ids or labels on the CPU are out
                of range.
            RuntimeError: If the adapters were detached.
        """
        if self.adapters is not None and not self.adapters.attached:
            raise RuntimeError("the adapters of this model were detached: make a new model")
        check_are_tensors({"labels": labels})
        own, flags = self.input_checks.own(self, inputs, self.config.modalities)
        masks = {name: own[name].get(slot.modality.mask or "") for name, slot in self.slots.items()}
        read: dict[str, dict[str, Any]] = {name: {**as_encoder_knows(self.slots[name], own[name]), **flags[name]} for name in own}
        for name, mask in masks.items():
            if mask is not None:
                read[name][str(self.slots[name].modality.mask)] = mask
        states = self._fused.fuse(self.encoder, read)
        mask = masks[self.config.main]
        first = 0 if mask is None else mask.int().argmax(-1)
        features = states[torch.arange(len(states), device=states.device), first]
        logits = self.head(features.to(next(self.head.parameters()).dtype))
        loss = None if labels is None else task_loss(logits, labels, self.config.problem_type)
        return ModeXOutput(loss, logits, features)

    def given_encoders(self) -> dict[str, GivenEncoder]:
        """Return the encoder with its original weights."""
        state = self.encoder.state_dict() if self.adapters is None else self.adapters.original_state_dict()
        return {ENCODER: GivenEncoder(self.encoder, state, self._source, _PLACE)}

    def saved_state_dict(self) -> dict[str, Tensor]:
        """Return `trained_state_dict`."""
        return self.trained_state_dict()

    def check_savable(self) -> None:
        """Check that all trained parameters of the encoder are covered by the adapters' configuration.

        Raises:
            ValueError: If they are not.
        """
        named = {f"{ENCODER}.{name}" for name in ({} if self.adapters is None else self.adapters.state_dict())}
        if beside := [n for n in self.trained_state_dict() if n.startswith(f"{ENCODER}.") and n not in named]:
            raise ValueError(
                f"{len(beside)} trained parameters are not covered by the configuration, among them {beside[0]}, and a copy of the "
                "original encoder would not contain their values: name their modules in `trained` of ModeXConfig"
            )

    @classmethod
    def from_pretrained(cls, path: str | Path, *, model: nn.Module | None = None, **options: Any) -> Self:  # type: ignore[override]
        """Load a model saved by `save_pretrained`, in evaluation mode.

        Args:
            path: Folder, or name on the hub.
            model: Encoder that the model was trained on. Default: the copy in the folder, or the encoder loaded by its recorded
                name.
            options: transformers' options for the hub (revision, token, cache_dir, local_files_only, force_download), and config
                to replace the saved configuration.

        Raises:
            FileNotFoundError: If there is no checkpoint, or the checkpoint has neither a copy nor a source of the encoder.
            TypeError: If an option is unknown.
            ValueError: If the encoder differs from the one in training, or a file is damaged or does not fit.
        """
        folder = folder_of(path, options)
        changed = options.pop("config", None)
        if options:
            raise TypeError(f"ModeXForClassification.from_pretrained got unknown arguments {', '.join(options)}")
        config, record = read_config(folder)
        config = config_to_build(changed, config)
        weights = folder / WEIGHTS
        tensors = read_tensors(weights)
        encoder: Any = load_encoder(folder, _PLACE, record) if model is None else model
        # Check as much as possible before allocating memory: a damaged configuration could request any amount.
        fused = _fused(encoder)
        expected = {} if config.adapters is None else expected_tensors(encoder, config.adapters)
        check_same_encoder(_PLACE.what, record, describe(encoder))
        of_encoder = {name.removeprefix(f"{ENCODER}."): t for name, t in tensors.items() if name.startswith(f"{ENCODER}.")}
        _check(of_encoder, {name: t for name, t in expected.items() if not name.startswith(fused.unread)}, weights)
        built = cls(
            encoder,
            config.adapters,
            id2label=config.id2label,
            problem_type=config.problem_type,
            padding_side=config.padding_side,
        )
        built.config = config
        return built.restored(tensors, folder)

    @torch.no_grad()
    def load_saved(self, tensors: dict[str, Tensor], file: Path) -> None:
        """Load the trained parameters from the tensors of a file."""
        own = self.trained_state_dict()
        _check(tensors, own, file)
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def _check(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], file: Path) -> None:
    try:
        check_tensors(tensors, own)
    except ValueError as error:
        raise ValueError(f"{file} does not fit the encoder: {error}") from error


def read_config(folder: Path) -> tuple[ClassifierConfig, dict[str, str]]:
    """Read the configuration of a checkpoint and the record of its encoder.

    Raises:
        ValueError: If the configuration is not that of a `ModeXForClassification`, or is invalid.
    """
    file, values = folder / CONFIG, read_values(folder)
    if not isinstance(values, dict) or values.get("system") != SYSTEM:
        raise ValueError(f"{file} is not the configuration of a ModeXForClassification")
    record: Any = values.get(ENCODER)
    check_record(file, _PLACE.what, record, ("stored", "class", "source", "dtype", "fingerprint"))
    try:
        return ClassifierConfig.from_dict(values), record
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _fused(model: nn.Module) -> FusedEncoder:
    """Return the description of a fused model; ValueError for other models."""
    if (found := find_fused(model)) is None:
        names = ", ".join(sorted(known_fused()))
        raise ValueError(f"ModeXForClassification: the model must be {names}, got {type(model).__name__}")
    return found


register_model(ModeXForClassification)
