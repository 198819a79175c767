"""How a live module of the released code gets other methods: its class becomes one that inherits the released class."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn

from mope.fused.prepack import PrepackedLayers, as_before


class Accelerated(nn.Module):
    """In front of a released class it replaces methods and adds no state: parameters, keys and the optimizer stay as they are.

    Attributes that start with `_cached` are no part of copies and pickles, but for layers in order: copies have theirs.
    """

    ours: Any
    released: Any
    mode: str
    prepack: bool

    def frozen_parts(self) -> Iterable[nn.Module]:
        """Whose layers are those of a backbone, and read in no other way than by calling them."""
        return ()

    def put_in_order(self, x: Tensor) -> None:
        """See `mope.fused.prepack`: what is frozen when a module is first called on a CPU, until it is called elsewhere."""
        order: PrepackedLayers | None = self.__dict__.get("_cached_order")
        wanted = self.prepack and x.device.type == "cpu"
        if wanted is (order is not None) or torch.compiler.is_compiling():
            return
        if order is None:
            self.__dict__["_cached_order"] = PrepackedLayers(self.frozen_parts())
        else:
            del self.__dict__["_cached_order"]
            # Of two threads that called first, each may have put some layers in order.
            as_before(self.frozen_parts())

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class was made here and cannot be found by name: copies and pickles make it again.
        state = {name: value for name, value in vars(self).items() if not name.startswith("_cached") or name == "_cached_order"}
        return _remake, (self.ours, self.released, self.mode, self.prepack), state

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), f"accelerated, mode={self.mode}")))

    def restore(self) -> None:
        """Be the released module again."""
        as_before(self.frozen_parts())
        for name in [name for name in vars(self) if name.startswith("_cached")]:
            del self.__dict__[name]
        cast(Any, self).__class__ = self.released


@functools.cache
def _class_for(ours: Any, released: Any, mode: str, prepack: bool) -> Any:
    """Instances stay instances of the released class, under its name."""
    members = {"ours": ours, "released": released, "mode": mode, "prepack": prepack, "__module__": released.__module__}
    return type(released.__name__, (ours, released), members)


def _remake(ours: Any, released: Any, mode: str, prepack: bool) -> nn.Module:
    made = _class_for(ours, released, mode, prepack)
    return made.__new__(made)


def replace(module: nn.Module, ours: Any, mode: str, prepack: bool) -> None:
    """Put the methods of `ours` in front of those of a module, in place of what an earlier call put there."""
    released: Any = type(module)
    if isinstance(module, Accelerated):
        released = module.released
        module.restore()
    cast(Any, module).__class__ = _class_for(ours, released, mode, prepack)


def missing(module: nn.Module, parts: Iterable[str]) -> list[str]:
    """Those of `parts`, dots in them, that `module` lacks."""
    found = []
    for part in parts:
        try:
            attrgetter(part)(module)
        except AttributeError:
            found.append(part)
    return found
