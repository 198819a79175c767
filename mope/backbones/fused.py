"""Models whose text attends to the image: where their parts are, and how they are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor, nn

# Fields of a part's config that do not show in the shape of any tensor.
UNTOLD = ("num_attention_heads", "hidden_act", "layer_norm_eps")


@dataclass(frozen=True)
class FusedEncoder:
    """Describe a class of fused models.

    Args:
        parts: modality -> attribute of its part; the config of a part stands in the model's config, as `vision_config`.
        fuse: (model, modality -> inputs, mask and flags under the names that its part knows) -> the fused text (B,L,C).
        refused: names in a batch of inputs that its parts do not take, though their modalities have them.
        unread: how the names of parameters begin that no input reaches, so that nothing in them trains.
        model_class: the class, where it is not one of transformers' own: a checkpoint names it, and cannot import it.
    """

    parts: Mapping[str, str]
    fuse: Callable[[Any, Mapping[str, Mapping[str, Any]]], Tensor]
    refused: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    model_class: Any = None

    def identity(self, model: Any) -> list[Any]:
        """Return what says, beside its weights, which function a model computes."""
        configs = [getattr(model.config, f"{modality}_config").to_dict() for modality in self.parts]
        return [type(model).__name__, *([config.get(name) for name in UNTOLD] for config in configs)]


_FUSED: dict[str, FusedEncoder] = {}


def register_fused(class_name: str, fused: FusedEncoder) -> None:
    """Teach the library a class of fused models. A second registration replaces the first."""
    _FUSED[class_name] = fused


def known_fused() -> dict[str, FusedEncoder]:
    """Return the classes of fused models that are known, by name."""
    return dict(_FUSED)


def find_fused(model: nn.Module) -> FusedEncoder | None:
    """Return what is known of a fused model, None of other models."""
    return _FUSED.get(type(model).__name__)


def fused_class(name: str) -> Any:
    """Return the class of a model that can be fused. ValueError where it cannot."""
    if name not in _FUSED:
        raise ValueError(f"a {name} is no fused encoder that is known here: {', '.join(sorted(_FUSED))}")
    return _FUSED[name].model_class or getattr(transformers, name)
