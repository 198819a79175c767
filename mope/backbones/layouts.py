"""Registry of the places for adapters in a layer, by the name of its class; each model family registers its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Layout:
    """Paths of the parts of a layer, relative to it.

    Args:
        modality: "visual" or "textual".
        msa: Module of the attention part whose output is adapted.
        ffn: Module of the feed-forward part whose output is adapted.
        norm: A LayerNorm as wide as the layer.
        cross: Module of the cross-attention whose output is adapted; None if such layers never have cross-attention.
        adapts_input: Whether the input of the layer is adapted too, as in the published text layers.
        attention: The self-attention, which is called with text alone.
        cross_attention: The cross-attention, which is called with an image.
    """

    modality: str
    msa: str
    ffn: str
    norm: str
    cross: str | None = None
    adapts_input: bool = False
    attention: str = "attention"
    cross_attention: str = "crossattention"

    def has_cross(self, layer: nn.Module) -> bool:
        """Return whether a layer has cross-attention."""
        return self.cross is not None and hasattr(layer, self.cross_attention)


# A forward pre-hook that also receives keyword arguments.
PreHook = Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[Any, Any]]

_LAYOUTS: dict[str, Layout | Callable[[nn.Module], Layout]] = {}
_PRE_HOOKS: dict[str, PreHook] = {}


def register_layout(class_name: str, layout: Layout | Callable[[nn.Module], Layout]) -> None:
    """Register where adapters go in a class of layers. A second registration replaces the first.

    Args:
        class_name: Name of the layer's class.
        layout: Its layout, or a function that returns the layout of a layer, for classes used in encoders of several modalities.
    """
    _LAYOUTS[class_name] = layout


def unregister_layout(class_name: str) -> None:
    """Forget a class of layers. Do nothing if the class is unknown."""
    _LAYOUTS.pop(class_name, None)


def register_pre_hook(class_name: str, hook: PreHook) -> None:
    """Register a forward pre-hook for a class of modules, used if the model has adapters."""
    _PRE_HOOKS[class_name] = hook


def known_layouts() -> tuple[str, ...]:
    """Return the class names of the registered layers."""
    return tuple(_LAYOUTS)


def layout_of(module: nn.Module) -> Layout | None:
    """Return the layout of a registered layer, None for other modules.

    Subclasses of registered classes, such as those that FSDP creates, are recognised too.
    """
    known = next((_LAYOUTS[base.__name__] for base in type(module).__mro__ if base.__name__ in _LAYOUTS), None)
    if known is None:
        return None
    found = known if isinstance(known, Layout) else known(module)
    # Other libraries use the same class names for layers with other parts.
    below = {name for name, _ in module.named_modules(remove_duplicate=False)}
    return found if {found.msa, found.ffn, found.norm} <= below else None


def pre_hook_of(module: nn.Module) -> PreHook | None:
    """Return the registered forward pre-hook of a module, None for most modules."""
    return _PRE_HOOKS.get(type(module).__name__)
