"""Which architectures are known."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from .base import Architecture, BackboneAdapter

_ADAPTERS: dict[str, Architecture] = {}
# Models that hold an encoder of each modality: model_type -> modality -> the class of that encoder in transformers.
_TOWERS: dict[str, dict[str, str]] = {}


def register_backbone(model_type: str, adapter_class: type[Architecture]) -> None:
    """Teach the library the architecture whose config says `model_type`. A second registration replaces the first.

    Raises:
        TypeError: `adapter_class` leaves abstract methods of `BackboneAdapter` out; the message names them.
    """
    _ADAPTERS[model_type] = adapter_class()


def unregister_backbone(model_type: str) -> None:
    """Undo `register_backbone`. Do nothing if the architecture is unknown."""
    _ADAPTERS.pop(model_type, None)


def architecture_for(model_type: str | None) -> Architecture:
    """Return the adapter that is registered for an architecture; ValueError if there is none."""
    if model_type not in _ADAPTERS:
        raise ValueError(
            f"model_type {model_type!r} is not known; known are {', '.join(sorted(_ADAPTERS))}. Write a subclass of "
            "mope.backbones.BackboneAdapter (about 30 lines) and call mope.register_backbone(model_type, YourAdapter)."
        )
    return _ADAPTERS[model_type]


def find_architecture(backbone: nn.Module, modality: str | None = None, name: str | None = None) -> Architecture:
    """Return the adapter of a backbone.

    Args:
        backbone: the model.
        modality: that it has to be of, None for any.
        name: of the backbone in errors; default: the modality.

    Raises:
        ValueError: its architecture is unknown, it is of another modality, or its config cannot be honoured.
    """
    config = getattr(backbone, "config", None)
    kind = type(backbone).__name__
    try:
        architecture = architecture_for(getattr(config, "model_type", None))
    except ValueError as error:
        # A model of both, such as CLIP's.
        part = f"{modality}_model"
        if modality is not None and isinstance(getattr(backbone, part, None), nn.Module):
            raise ValueError(f"{kind} holds encoders of both modalities: give its {modality} encoder, model.{part}") from None
        raise ValueError(f"{kind}: {error}") from None
    if modality not in (None, architecture.modality):
        raise ValueError(f"{name or modality} was given {kind}, a {architecture.modality} model")
    if objections := architecture.objections(config):
        raise ValueError(f"{kind} cannot be prompted: {'; '.join(objections)}")
    return architecture


def find_adapter(backbone: nn.Module, modality: str | None = None, name: str | None = None) -> BackboneAdapter:
    """The adapter of a backbone that is prompted layer by layer; ValueError as in `find_architecture`, or if it is not."""
    adapter = find_architecture(backbone, modality, name)
    if not isinstance(adapter, BackboneAdapter):
        raise ValueError(
            f"{type(backbone).__name__} is not prompted layer by layer: give the model of transformers itself, without wrappers, "
            "to MoPEForClassification"
        )
    return adapter


def known() -> dict[str, Architecture]:
    """Return the registered architectures by the `model_type` of their configs."""
    return dict(_ADAPTERS)


def register_towers(model_type: str, **classes: str) -> None:
    """Teach the library a model that holds several encoders, each of which transformers can load alone from the model's files.

    Args:
        model_type: of the whole.
        classes: modality -> the name of the encoder's class in transformers, `vision="CLIPVisionModel"`.
    """
    _TOWERS[model_type] = classes


def tower_class(model_type: str, modality: str) -> Any:
    """Return the class of the encoder of a modality in a model that holds several, None where none is known."""
    name = _TOWERS.get(model_type, {}).get(modality)
    return None if name is None else getattr(transformers, name)
