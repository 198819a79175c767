"""Stand-ins for modules that the released code imports but that are not installed."""

from __future__ import annotations

import collections.abc
import importlib.util
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

# Modules that the classification scripts import but never use -> name of the package to install.
IMPORTED_ONLY = {
    "cv2": "opencv-python-headless",
    "librosa": "librosa",
    "lmdb": "lmdb",
    "matplotlib": "matplotlib",
    "mmcv": "mmcv",
    "pyarrow": "pyarrow",
}
# Module of torch before 1.13, which timm 0.3 imports.
_SIX = "torch._six"


class DropPath(nn.Module):
    """Stochastic depth: in training, zero whole items with probability `drop_prob`, and scale up the others."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return x
        keep = 1 - self.drop_prob
        # The same order of operations as timm, so that the same random numbers give the same result.
        mask = (keep + torch.rand(len(x), *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device)).floor()
        return x / keep * mask


def to_2tuple(value: Any) -> Any:
    """Return an iterable unchanged, and any other value twice in a tuple."""
    return value if isinstance(value, Iterable) else (value, value)


@torch.no_grad()
def trunc_normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0) -> Tensor:
    """Fill with N(mean, std^2) truncated to [a, b] by inverse transform sampling; torch's version draws other numbers."""
    low, high = (math.erf((bound - mean) / std / math.sqrt(2)) for bound in (a, b))
    return tensor.uniform_(low, high).erfinv_().mul_(std * math.sqrt(2)).add_(mean).clamp_(a, b)


def provided() -> dict[str, dict[str, Any]]:
    """Return the stand-ins of modules that are used: contents by module name."""
    from . import transforms

    kinds = ("CenterCrop", "Compose", "Normalize", "RandAugment", "Resize", "ToTensor")
    layers = {"DropPath": DropPath, "to_2tuple": to_2tuple, "trunc_normal_": trunc_normal_}
    return {
        "timm": {},
        "timm.models": {},
        "timm.models.layers": layers,
        "torchvision": {},
        "torchvision.transforms": {name: getattr(transforms, name) for name in kinds},
        _SIX: {"container_abcs": collections.abc, "inf": math.inf, "string_classes": (str, bytes)},
    }


class _Unusable(type):
    """Metaclass of classes that allow attribute access and comparison, but raise when called."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Unusable(f"{cls.__name__}.{name}", (), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        module = next(name for name in IMPORTED_ONLY if cls.__name__.startswith(f"{name}."))
        raise ModuleNotFoundError(
            f"{cls.__name__} is called, but {module} is not installed; mope run only lets it be imported: "
            f"pip install {IMPORTED_ONLY[module]}",
            name=module,
        )


class _ImportedOnly(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Unusable(f"{self.__name__}.{name}", (), {})


class StandIns(MetaPathFinder, Loader):
    """Import finder and loader that provides absent modules to files under `folder`.

    Other code, such as libraries that check for optional packages, still does not find these modules.

    Attributes:
        absent: Names of the modules for which there are stand-ins.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contents = provided()
        self.absent = [name for name in [*self.contents, *IMPORTED_ONLY] if not _installed(name)]

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        known = fullname in self.absent or any(fullname.startswith(f"{name}.") for name in self.absent if name in IMPORTED_ONLY)
        if not known or (fullname != _SIX and not self._asked_from_folder()):
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def _asked_from_folder(self) -> bool:
        frame = sys._getframe(2)
        # Skip the frames of the import machinery.
        while frame.f_back and frame.f_globals.get("__name__", "").startswith("importlib"):
            frame = frame.f_back
        return is_of_checkout(frame.f_code.co_filename, self.folder)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return ModuleType(spec.name) if spec.name in self.contents else _ImportedOnly(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self.contents.get(module.__name__, {}))

    def __str__(self) -> str:
        lines = [f"  {name}: {', '.join(self.contents[name])}" for name in self.absent if self.contents.get(name)]
        unusable = [name for name in self.absent if name in IMPORTED_ONLY]
        return "\n".join([*lines, *([f"  to be imported only: {', '.join(unusable)}"] if unusable else [])])


def is_of_checkout(file: str | None, folder: Path) -> bool:
    """Return whether a file belongs to a checkout, and not to a package installed inside it."""
    if file is None:
        return False
    path = Path(file).resolve()
    return path.is_relative_to(folder) and "site-packages" not in path.parts


def _installed(name: str) -> bool:
    """Return whether a module is installed, without importing its parent package, which could fail."""
    top, *parts = name.split(".")
    spec = importlib.util.find_spec(top)
    for part in parts:
        top = f"{top}.{part}"
        spec = PathFinder.find_spec(top, spec.submodule_search_locations) if spec else None
    return spec is not None


@contextmanager
def stand_ins(folder: Path) -> Iterator[StandIns]:
    """Provide stand-ins for absent modules that files under `folder` import, within the context."""
    finder = StandIns(folder)
    _settle_what_libraries_look_for(finder.absent)
    # Append the finder, so that installed modules take precedence.
    sys.meta_path.append(finder)
    try:
        yield finder
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if getattr(module, "__loader__", None) is finder]:
            del sys.modules[name]


def _settle_what_libraries_look_for(absent: Iterable[str]) -> None:
    """Let transformers check for packages before their stand-ins are imported, because it caches the result."""
    from transformers.utils import import_utils

    for name in absent:
        if is_available := getattr(import_utils, f"is_{name}_available", None):
            is_available()
