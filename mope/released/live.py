"""Replace methods of a live module of the released code by changing its class to a subclass of the released class."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn

from mope.fused.prepack import PrepackedLayers, as_before


class Accelerated(nn.Module):
    """Mixin that replaces methods of a released class without adding state, so parameters, keys and optimizers stay valid.

    Attributes that start with `_cached` are excluded from copies and pickles, except prepacked layers, which copies keep.
    """

    ours: Any
    released: Any
    mode: str
    prepack: bool

    def frozen_parts(self) -> Iterable[nn.Module]:
        """Return the backbone modules whose layers may be prepacked, because they are only used by calling them."""
        return ()

    def put_in_order(self, x: Tensor) -> None:
        """Prepack frozen layers on the first call on a CPU, and undo it on a call elsewhere; see `mope.fused.prepack`."""
        order: PrepackedLayers | None = self.__dict__.get("_cached_order")
        wanted = self.prepack and x.device.type == "cpu"
        if wanted is (order is not None) or torch.compiler.is_compiling():
            return
        if order is None:
            self.__dict__["_cached_order"] = PrepackedLayers(self.frozen_parts())
        else:
            del self.__dict__["_cached_order"]
            # If two threads made the first call at the same time, each may have prepacked some of the layers.
            as_before(self.frozen_parts())

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class was created dynamically and cannot be imported by name, so copies and pickles create it again.
        state = {name: value for name, value in vars(self).items() if not name.startswith("_cached") or name == "_cached_order"}
        return _remake, (self.ours, self.released, self.mode, self.prepack), state

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), f"accelerated, mode={self.mode}")))

    def restore(self) -> None:
        """Turn the module back into the released one."""
        as_before(self.frozen_parts())
        for name in [name for name in vars(self) if name.startswith("_cached")]:
            del self.__dict__[name]
        cast(Any, self).__class__ = self.released


@functools.cache
def _class_for(ours: Any, released: Any, mode: str, prepack: bool) -> Any:
    """Create a subclass of the released class with the same name."""
    members = {"ours": ours, "released": released, "mode": mode, "prepack": prepack, "__module__": released.__module__}
    return type(released.__name__, (ours, released), members)


def _remake(ours: Any, released: Any, mode: str, prepack: bool) -> nn.Module:
    made = _class_for(ours, released, mode, prepack)
    return made.__new__(made)


def replace(module: nn.Module, ours: Any, mode: str, prepack: bool) -> None:
    """Override methods of a module with those of `ours`, replacing overrides of an earlier call."""
    released: Any = type(module)
    if isinstance(module, Accelerated):
        released = module.released
        module.restore()
    cast(Any, module).__class__ = _class_for(ours, released, mode, prepack)


def missing(module: nn.Module, parts: Iterable[str]) -> list[str]:
    """Return the dotted attribute names in `parts` that `module` lacks."""
    found = []
    for part in parts:
        try:
            attrgetter(part)(module)
        except AttributeError:
            found.append(part)
    return found
