"""Register this library's models with transformers' Auto classes once those are imported; `import mope` imports neither.

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
    # Both modules work without transformers, which is still being imported at this point.
    for path, name, *_ in _CLASSES:
        kind = getattr(importlib.import_module(path), name)
        module.AutoConfig.register(kind.model_type, kind, exist_ok=True)


class _Later(type):
    """Placeholder class that imports the real one on attribute access; models cannot be imported while Auto classes are."""

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
            # The class itself may have been registered already.
            if config not in auto._model_mapping._extra_content:
                auto.register(config, later)


def register_model(kind: Any) -> None:
    """Register a model class with the Auto classes if they are imported; otherwise it is registered when they are."""
    auto: Any = sys.modules.get(MODELS)
    for name in ("AutoModel", "AutoModelForSequenceClassification"):
        if hasattr(auto, name):
            getattr(auto, name).register(kind.config_class, kind, exist_ok=True)


_AFTER: dict[str, Callable[[Any], None]] = {CONFIGURATIONS: _register_configurations, MODELS: _register_models}


class _Watch:
    """Import hook that finds no modules itself, but runs a function once after a given module is imported.

    It does not derive from `importlib.abc.MetaPathFinder`, which has no methods to inherit and whose module takes longer to import
    than this whole package.
    """

    def __init__(self, name: str) -> None:
        self.name, self.asks = name, False

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name or self.asks:
            return None
        from importlib.util import find_spec

        # The other finders find the module. `find_spec` calls this finder again, so it has to step aside.
        self.asks = True
        try:
            spec = find_spec(fullname)
        finally:
            self.asks = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self)  # type: ignore[assignment]
        return spec


class _Then:
    """Loader that wraps a module's own loader, and calls the module's function in `_AFTER` after the import."""

    def __init__(self, loader: Any, watch: _Watch) -> None:
        self.loader, self.watch = loader, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        # Restore the original loader in both places, because tools that find the source or reload use one of them.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        with suppress(ValueError):
            sys.meta_path.remove(self.watch)  # type: ignore[arg-type]
        _AFTER[self.watch.name](module)


def register_with_transformers() -> None:
    """Register with the Auto classes that transformers has already imported, and with the others once it imports them."""
    for name, register in _AFTER.items():
        if name in sys.modules:
            register(sys.modules[name])
        elif not any(isinstance(finder, _Watch) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _Watch(name))  # type: ignore[arg-type]
