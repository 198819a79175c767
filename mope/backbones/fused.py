"""Registry of fused models, whose text attends to the image: their parts and how to call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor, nn

# Fields of a part's config that no tensor shape reveals.
UNTOLD = ("num_attention_heads", "hidden_act", "layer_norm_eps")


@dataclass(frozen=True)
class FusedEncoder:
    """Description of a class of fused models.

    Args:
        parts: Attribute of each modality's part. The model's config must have the part's config, for example as `vision_config`.
        fuse: Function of the model and of each modality's inputs, mask and flags, under the part's own names. It returns the fused
            text (B,L,C).
        refused: Batch names of inputs that the parts do not accept, although their modalities have them.
        unread: Name prefixes of parameters that affect no output, so that they never train.
        model_class: The model class if it is not from transformers: a checkpoint names the class but cannot import it.
    """

    parts: Mapping[str, str]
    fuse: Callable[[Any, Mapping[str, Mapping[str, Any]]], Tensor]
    refused: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    model_class: Any = None

    def identity(self, model: Any) -> list[Any]:
        """Return the class name and config values that, besides the weights, determine what a model computes."""
        configs = [getattr(model.config, f"{modality}_config").to_dict() for modality in self.parts]
        return [type(model).__name__, *([config.get(name) for name in UNTOLD] for config in configs)]


_FUSED: dict[str, FusedEncoder] = {}


def register_fused(class_name: str, fused: FusedEncoder) -> None:
    """Register a class of fused models. A second registration replaces the first."""
    _FUSED[class_name] = fused


def known_fused() -> dict[str, FusedEncoder]:
    """Return the registered fused models by class name."""
    return dict(_FUSED)


def find_fused(model: nn.Module) -> FusedEncoder | None:
    """Return the description of a fused model, None for other models."""
    return _FUSED.get(type(model).__name__)


def fused_class(name: str) -> Any:
    """Return the class of a registered fused model.

    Raises:
        ValueError: If no fused model of this name is registered.
    """
    if name not in _FUSED:
        raise ValueError(f"a {name} is not a known fused encoder; known are {', '.join(sorted(_FUSED))}")
    return _FUSED[name].model_class or getattr(transformers, name)
