"""Registry of the supported architectures."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from .base import Architecture, BackboneAdapter

_ADAPTERS: dict[str, Architecture] = {}
# Models with an encoder for each modality: model_type -> modality -> class of that encoder in transformers.
_TOWERS: dict[str, dict[str, str]] = {}


def register_backbone(model_type: str, adapter_class: type[Architecture]) -> None:
    """Register the adapter of the architecture with this `model_type` in its config.

    A second registration replaces the first.

    Raises:
        TypeError: If `adapter_class` does not implement all abstract methods of `BackboneAdapter`; the message names them.
    """
    _ADAPTERS[model_type] = adapter_class()


def unregister_backbone(model_type: str) -> None:
    """Undo `register_backbone`. Do nothing if the architecture is unknown."""
    _ADAPTERS.pop(model_type, None)


def architecture_for(model_type: str | None) -> Architecture:
    """Return the adapter registered for an architecture.

    Raises:
        ValueError: If there is none.
    """
    if model_type not in _ADAPTERS:
        raise ValueError(
            f"model_type {model_type!r} is not supported; supported are {', '.join(sorted(_ADAPTERS))}. Write a subclass of "
            "mope.backbones.BackboneAdapter (about 30 lines) and call mope.register_backbone(model_type, YourAdapter)."
        )
    return _ADAPTERS[model_type]


def find_architecture(backbone: nn.Module, modality: str | None = None, name: str | None = None) -> Architecture:
    """Return the adapter of a backbone.

    Args:
        backbone: The model.
        modality: Modality that it must have, None for any.
        name: Name of the backbone in error messages. Default: the modality.

    Raises:
        ValueError: If its architecture or config is not supported, or it has another modality.
    """
    config = getattr(backbone, "config", None)
    kind = type(backbone).__name__
    try:
        architecture = architecture_for(getattr(config, "model_type", None))
    except ValueError as error:
        # A model with encoders of both modalities, such as CLIP.
        part = f"{modality}_model"
        if modality is not None and isinstance(getattr(backbone, part, None), nn.Module):
            raise ValueError(f"{kind} has encoders of both modalities: pass its {modality} encoder, model.{part}") from None
        raise ValueError(f"{kind}: {error}") from None
    if modality not in (None, architecture.modality):
        raise ValueError(f"{name or modality} was given {kind}, a {architecture.modality} model")
    if objections := architecture.objections(config):
        raise ValueError(f"{kind} cannot be prompted: {'; '.join(objections)}")
    return architecture


def find_adapter(backbone: nn.Module, modality: str | None = None, name: str | None = None) -> BackboneAdapter:
    """Return the adapter of a backbone that is prompted layer by layer.

    Raises:
        ValueError: As in `find_architecture`, or if the backbone is not prompted layer by layer.
    """
    adapter = find_architecture(backbone, modality, name)
    if not isinstance(adapter, BackboneAdapter):
        raise ValueError(
            f"{type(backbone).__name__} is not prompted layer by layer: pass the transformers model itself, without wrappers, "
            "to MoPEForClassification"
        )
    return adapter


def known() -> dict[str, Architecture]:
    """Return the registered architectures by `model_type`."""
    return dict(_ADAPTERS)


def register_towers(model_type: str, **classes: str) -> None:
    """Register a model with several encoders, each of which transformers can load separately from the model's files.

    Args:
        model_type: `model_type` of the whole model.
        classes: Name of the encoder's class in transformers for each modality, such as `vision="CLIPVisionModel"`.
    """
    _TOWERS[model_type] = classes


def tower_class(model_type: str, modality: str) -> Any:
    """Return the class of a modality's encoder in a model with several encoders, None if none is registered."""
    name = _TOWERS.get(model_type, {}).get(modality)
    return None if name is None else getattr(transformers, name)
