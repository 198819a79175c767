"""Checks of whether a module's parameters may be read instead of calling the module."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has forward or backward hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def version(tensor: Tensor) -> int:
    """Return the in-place version counter of a tensor; 0 for inference tensors, which have none."""
    return 0 if tensor.is_inference() else tensor._version


def is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Return whether a module is exactly of class `kind`, without hooks, overrides or wrapped parameters.

    Reading the parameters of such a module is equivalent to calling it.
    """
    # This runs for every module in every call, so it makes as few function calls as possible.
    if type(module) is not kind or "forward" in module.__dict__:
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    # A loop, because `all` would create a generator. For most parameters the type check is enough.
    for p in module._parameters.values():  # noqa: SIM110
        if type(p) is not nn.Parameter and is_traceable_wrapper_subclass(p):
            return False
    return True
