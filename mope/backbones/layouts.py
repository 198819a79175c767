"""Where adapters go: the parts of a layer, by the name of its class, registered in the file of its family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Layout:
    """Where the parts of a layer are, as paths below it.

    Args:
        modality: "visual" or "textual".
        msa, ffn: the modules whose outputs are adapted.
        norm: a LayerNorm as wide as the layer.
        cross: as `msa`, of the cross-attention. None: such a layer never has any.
        adapts_input: whether the input of the layer is adapted as well, as in published text layers.
        attention, cross_attention: the modules that are called with text alone and with an image.
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


# A forward pre-hook with keyword arguments.
PreHook = Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[Any, Any]]

_LAYOUTS: dict[str, Layout | Callable[[nn.Module], Layout]] = {}
_PRE_HOOKS: dict[str, PreHook] = {}


def register_layout(class_name: str, layout: Layout | Callable[[nn.Module], Layout]) -> None:
    """Teach the library where adapters go in a class of layers. A second registration replaces the first.

    Args:
        class_name: of the layer.
        layout: of it, or a function of the layer, where the class stands in encoders of several modalities.
    """
    _LAYOUTS[class_name] = layout


def unregister_layout(class_name: str) -> None:
    """Forget a class of layers. Do nothing if the class is unknown."""
    _LAYOUTS.pop(class_name, None)


def register_pre_hook(class_name: str, hook: PreHook) -> None:
    """Teach the library what a class of modules needs before its forward in a model that has adapters."""
    _PRE_HOOKS[class_name] = hook


def known_layouts() -> tuple[str, ...]:
    """Return the names of the classes of layers that are known."""
    return tuple(_LAYOUTS)


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a layer that is known, None of other modules. Subclasses count, such as those that FSDP makes."""
    known = next((_LAYOUTS[base.__name__] for base in type(module).__mro__ if base.__name__ in _LAYOUTS), None)
    if known is None:
        return None
    found = known if isinstance(known, Layout) else known(module)
    # Others use these names as well, for layers that are made differently.
    below = {name for name, _ in module.named_modules(remove_duplicate=False)}
    return found if {found.msa, found.ffn, found.norm} <= below else None


def pre_hook_of(module: nn.Module) -> PreHook | None:
    """Return the hook that a module needs before its forward if its model has adapters; None for most modules."""
    return _PRE_HOOKS.get(type(module).__name__)
