"""What can be said of a module before its parameters are read in place of calling it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 of an inference tensor, of which nobody counts it."""
    return 0 if tensor.is_inference() else tensor._version


def is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether a module does what its class says and nothing else, so that reading its parameters is as good as calling it."""
    # This runs for every module in every call, so it calls as few functions as possible.
    if type(module) is not kind or "forward" in module.__dict__:
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    # A loop, because `all` would create a generator. The class of most parameters settles it.
    for p in module._parameters.values():  # noqa: SIM110
        if type(p) is not nn.Parameter and is_traceable_wrapper_subclass(p):
            return False
    return True
