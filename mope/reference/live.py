"""How a live module of the released code gets other methods: its class becomes one that inherits the released class."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from operator import attrgetter
from typing import Any, cast

from torch import nn


class Accelerated(nn.Module):
    """In front of a released class it replaces methods and adds no state: parameters, keys and the optimizer stay as they are.

    Attributes that start with `_cached` are no part of copies and pickles.
    """

    ours: Any
    released: Any
    mode: str

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class was made here and cannot be found by name: copies and pickles make it again.
        state = {name: value for name, value in vars(self).items() if not name.startswith("_cached")}
        return _remake, (self.ours, self.released, self.mode), state

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), f"accelerated, mode={self.mode}")))

    def restore(self) -> None:
        """Be the released module again."""
        for name in [name for name in vars(self) if name.startswith("_cached")]:
            del self.__dict__[name]
        cast(Any, self).__class__ = self.released


@functools.cache
def _class_for(ours: Any, released: Any, mode: str) -> Any:
    """Instances stay instances of the released class, under its name."""
    members = {"ours": ours, "released": released, "mode": mode, "__module__": released.__module__}
    return type(released.__name__, (ours, released), members)


def _remake(ours: Any, released: Any, mode: str) -> nn.Module:
    made = _class_for(ours, released, mode)
    return made.__new__(made)


def replace(module: nn.Module, ours: Any, mode: str) -> None:
    """Put the methods of `ours` in front of those of a module, in place of what an earlier call put there."""
    released: Any = module.released if isinstance(module, Accelerated) else type(module)
    cast(Any, module).__class__ = _class_for(ours, released, mode)


def missing(module: nn.Module, parts: Iterable[str]) -> list[str]:
    """Those of `parts`, dots in them, that `module` lacks."""
    found = []
    for part in parts:
        try:
            attrgetter(part)(module)
        except AttributeError:
            found.append(part)
    return found
