"""Plan where adapters go: into the layers of known classes, and after modules selected by patterns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from mope.backbones.layouts import known_layouts, layout_of

from .configuration import ModeXConfig

# Adding a module to one of these would change what it computes or contains.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Attributes that hold the output width of a module.
_WIDTHS = ("out_features", "normalized_shape", "embedding_dim")


@dataclass(frozen=True)
class Site:
    """Description of an adapter to create.

    Args:
        holder: Qualified name of the module that will hold the adapter.
        attribute: Attribute of the holder for the adapter.
        adapter: "plain" or "expert".
        width: Width d of the adapted output.
        like: Parameter whose device and dtype the adapter adopts.
    """

    holder: str
    attribute: str
    adapter: str
    width: int
    like: Tensor | None

    @property
    def name(self) -> str:
        """Qualified name of the adapter in the model."""
        return f"{self.holder}.{self.attribute}" if self.holder else self.attribute


@dataclass(frozen=True)
class Plan:
    """Planned adapters of a model.

    Attributes:
        layers: Name of a layer -> kind of site -> site.
        modules: Name of a module -> site.
    """

    layers: dict[str, dict[str, Site]]
    modules: dict[str, Site]

    def sites(self) -> Iterator[Site]:
        """Iterate over all sites."""
        for sites in self.layers.values():
            yield from sites.values()
        yield from self.modules.values()


def find_sites(model: nn.Module, config: ModeXConfig) -> Plan:
    """Plan the adapters that a configuration requests in a model.

    Raises:
        ValueError: If a kind of site, a layer or a pattern does not exist in the model, prompts are attached to it, a name is
            already used, or the width of a module is unknown.
    """
    modules = dict(model.named_modules())
    layers = {name: layout for name, module in modules.items() if (layout := layout_of(module)) is not None}
    plan = Plan({}, {})
    kinds = set()
    for name, layout in layers.items():
        layer = modules[name]
        if type(modules.get(name.rpartition(".")[0])).__name__ == "PromptedLayer":
            raise ValueError(
                f"{type(model).__name__} has prompts attached, which would run {name} without its adapters: detach() them first"
            )
        offered = {
            f"{layout.modality}_msa",
            f"{layout.modality}_ffn",
            *(("cross_msa", "cross_ffn") if layout.has_cross(layer) else ()),
        }
        kinds |= offered
        norm: Any = layer.get_submodule(layout.norm)
        sites = {
            kind: Site(name, kind, adapter, norm.normalized_shape[-1], _like(norm, layer))
            for kind, adapter in config.sites.items()
            if kind in offered and _index(name) in config.layers.get(kind, (_index(name),))
        }
        if sites:
            plan.layers[name] = sites
    if lacking := [kind for kind in config.sites if kind not in kinds]:
        found = f"the kinds it has are {', '.join(sorted(kinds))}" if kinds else f"it has no {', '.join(known_layouts())}"
        raise ValueError(
            f"{type(model).__name__} has no {', '.join(lacking)}: {found}. Other modules can be named in `modules` of ModeXConfig"
        )
    for kind, indices in config.layers.items():
        there = {_index(name) for name, sites in plan.layers.items() if kind in sites}
        if absent := sorted(set(indices) - there):
            raise ValueError(f"{type(model).__name__} has no {kind} in layers {absent}, which ModeXConfig names")
    for pattern, adapter in config.modules.items():
        matched = [name for name in modules if name and fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(f"{type(model).__name__} has no module {pattern!r}; its first ones are {', '.join([*modules][1:6])}")
        for name in matched:
            if name in plan.modules:
                raise ValueError(f"{name} matches {pattern!r} and an earlier pattern, but a module can have only one adapter")
            holder, attribute = _place(modules, name)
            plan.modules[name] = Site(holder, attribute, adapter, _width(modules[name], name), _like(modules[name], model))
    taken = set()
    for site in plan.sites():
        if site.name in taken:
            raise ValueError(f"two adapters would be called {site.name}: name only one of the two modules")
        taken.add(site.name)
        if hasattr(modules[site.holder], site.attribute):
            raise ValueError(
                f"{site.holder or type(model).__name__} already has an attribute {site.attribute}, which an adapter needs"
            )
    return plan


def trained_modules(model: nn.Module, config: ModeXConfig) -> list[str]:
    """Return the names of the modules whose own parameters train: LayerNorms, and modules matched by `trained` with submodules.

    Raises:
        ValueError: If a pattern in `trained` matches no module.
    """
    modules = dict(model.named_modules())
    for pattern in config.trained:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise ValueError(f"{type(model).__name__} has no module {pattern!r}, which `trained` of ModeXConfig names")
    roots = [name for name in modules if any(fnmatchcase(name, pattern) for pattern in config.trained)]
    below = tuple(f"{name}." for name in roots)
    return [
        name
        for name, module in modules.items()
        if name in roots or (below and name.startswith(below)) or (config.train_layer_norms and isinstance(module, nn.LayerNorm))
    ]


def own_parameters(model: nn.Module, modules: list[str]) -> dict[str, nn.Parameter]:
    """Return the parameters held directly by some modules of a model, each once, by its name in the model."""
    own = {parameter for module in modules for parameter in model.get_submodule(module).parameters(recurse=False)}
    return {name: parameter for name, parameter in model.named_parameters() if parameter in own}


def _index(name: str) -> int:
    """Return the index of a layer in its encoder, which is the last number in its name; 0 without a number."""
    return next((int(part) for part in reversed(name.split(".")) if part.isdecimal()), 0)


def _place(modules: dict[str, nn.Module], name: str) -> tuple[str, str]:
    """Return holder and attribute of the adapter of a module.

    The holder is the closest ancestor that is not a container, or the module itself if all its ancestors are containers.
    """
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        holder = ".".join(parts[:end])
        if not isinstance(modules[holder], _CONTAINERS):
            return holder, "_".join([*parts[end:], "adapter"])
    if isinstance(modules[name], _CONTAINERS):
        raise ValueError(f"there is no place for an adapter of {name}, because it is a container inside a container")
    return name, "adapter"


def _like(*modules: nn.Module) -> Tensor | None:
    """Return the first floating-point parameter, skipping quantised weights; None if there is none."""
    return next((p for module in modules for p in module.parameters() if p.is_floating_point()), None)


def _width(module: nn.Module, name: str) -> int:
    """Return the output width of a module, from its own attributes or those of the last submodule that has one."""
    for candidate in (module, *reversed([*module.modules()])):
        for attribute in _WIDTHS:
            width = getattr(candidate, attribute, None)
            if width is not None:
                return width if isinstance(width, int) else width[-1]
    raise ValueError(
        f"the output width of {name}, a {type(module).__name__}, is unknown: neither it nor a module in it has any of "
        f"{', '.join(_WIDTHS)}. Name a module in it that does, such as its last nn.Linear"
    )
