"""Tell transformers' Auto classes of this library's models, when they are imported: `import mope` itself imports neither.

>>> import mope
>>> from transformers import AutoModel
>>> model = AutoModel.from_pretrained("runs/food/model")
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

CONFIGURATIONS = "transformers.models.auto.configuration_auto"
MODELS = "transformers.models.auto.modeling_auto"


def _register_configurations(module: Any) -> None:
    # Both modules need no transformers, which is being imported.
    for path, name, *_ in _CLASSES:
        kind = getattr(importlib.import_module(path), name)
        module.AutoConfig.register(kind.model_type, kind, exist_ok=True)


class _Later(type):
    """A class that is imported when something is asked of it: while transformers imports its Auto classes, models cannot be."""

    path: str
    name: str

    def __getattr__(cls, attribute: str) -> Any:
        return getattr(getattr(importlib.import_module(cls.path), cls.name), attribute)


_CLASSES = (
    ("mope.fusion.config", "MoPEConfig", "mope.fusion.model", "MoPEForClassification"),
    ("mope.modex.configuration", "ClassifierConfig", "mope.modex.modeling", "ModeXForClassification"),
)


def _register_models(module: Any) -> None:
    for config_path, config_name, path, name in _CLASSES:
        config = getattr(importlib.import_module(config_path), config_name)
        later = _Later(name, (), {"path": path, "name": name, "config_class": config, "__module__": path})
        for auto in (module.AutoModel, module.AutoModelForSequenceClassification):
            # The class itself may have come first.
            if config not in auto._model_mapping._extra_content:
                auto.register(config, later)


def register_model(kind: Any) -> None:
    """Tell the Auto classes of a class of models, if they are imported; if not, they are told when they are."""
    auto: Any = sys.modules.get(MODELS)
    for name in ("AutoModel", "AutoModelForSequenceClassification"):
        if hasattr(auto, name):
            getattr(auto, name).register(kind.config_class, kind, exist_ok=True)


_AFTER: dict[str, Callable[[Any], None]] = {CONFIGURATIONS: _register_configurations, MODELS: _register_models}


class _Watch:
    """Finds nothing itself: lets something be done once after one module was imported.

    No subclass of `importlib.abc.MetaPathFinder`, which has no methods to inherit, and whose module takes longer to import than all
    of this package.
    """

    def __init__(self, name: str) -> None:
        self.name, self.asks = name, False

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name or self.asks:
            return None
        from importlib.util import find_spec

        # The others find it; this one is asked again on the way.
        self.asks = True
        try:
            spec = find_spec(fullname)
        finally:
            self.asks = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self)  # type: ignore[assignment]
        return spec


class _Then:
    """A module's own loader, and after the import what `_AFTER` says."""

    def __init__(self, loader: Any, watch: _Watch) -> None:
        self.loader, self.watch = loader, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        # Tools that look for the source, or reload, ask one of the two.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        with suppress(ValueError):
            sys.meta_path.remove(self.watch)  # type: ignore[arg-type]
        _AFTER[self.watch.name](module)


def register_with_transformers() -> None:
    """Register now what transformers has imported, and the rest as soon as it is."""
    for name, register in _AFTER.items():
        if name in sys.modules:
            register(sys.modules[name])
        elif not any(isinstance(finder, _Watch) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _Watch(name))  # type: ignore[arg-type]
