"""What can be said of a module before its parameters are read in place of calling it."""

from __future__ import annotations

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in _HOOKS)


def is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether a module does what its class says and nothing else, so that reading its parameters is as good as calling it."""
    return (
        type(module) is kind
        and not has_hooks(module)
        and "forward" not in module.__dict__
        and not any(is_traceable_wrapper_subclass(parameter) for parameter in module.parameters(recurse=False))
    )
