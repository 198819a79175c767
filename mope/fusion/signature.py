"""Give a model's `forward` a signature that lists its inputs by name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import FunctionType
from typing import Any

from torch import nn

_MADE: dict[tuple[type, tuple[str, ...], tuple[str, ...]], type] = {}
_BASE = "_class_without_signature"


def sign_forward(model: nn.Module, tensors: Sequence[str], flags: Sequence[str] = ()) -> None:
    """Replace the signature of a model's `forward` with one that lists its inputs instead of `**inputs`.

    `inspect.signature(model.forward)`, which transformers' Trainer and torch.export call, then finds the inputs by name. The class
    of the model becomes a subclass with the same name, shared by all models with the same inputs. Copies and pickles are of the
    original class, whose `__setstate__` calls this function again. A model without `**` in its forward is left alone.

    Args:
        model: Model whose forward has keyword arguments and `**inputs`.
        tensors: Names of the inputs, whose default is None.
        flags: Names of the flags, whose default is False.
    """
    base = getattr(type(model), _BASE, type(model))
    key = (base, tuple(tensors), tuple(flags))
    if key not in _MADE:
        function: Any = base.forward
        parameters = _parameters(base)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return
        own = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
        named = {parameter.name for parameter in own}
        inputs = [_parameter(name, None, "Tensor | None") for name in tensors if name not in named]
        switches = [_parameter(name, False, "bool") for name in flags if name not in named]
        last = [parameter for parameter in own if parameter.kind is parameter.KEYWORD_ONLY]
        # A copy, because setting the signature of the shared function would change it for every model. A wrapper would add a call.
        forward = FunctionType(function.__code__, function.__globals__, "forward", function.__defaults__, function.__closure__)
        forward.__dict__.update(function.__dict__)
        forward.__kwdefaults__, forward.__doc__, forward.__qualname__ = (
            function.__kwdefaults__,
            function.__doc__,
            function.__qualname__,
        )
        forward.__signature__ = inspect.Signature([*own[: len(own) - len(last)], *inputs, *last, *switches])  # type: ignore[attr-defined]
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        _MADE[key] = type(base.__name__, (base,), {**names, "forward": forward, "__reduce_ex__": _reduce, _BASE: base})
    model.__class__ = _MADE[key]


def _parameters(kind: Any) -> list[inspect.Parameter]:
    """Return the parameters of a forward, and those of the base classes' forwards to which it passes `**` on."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if "forward" not in vars(base):
            continue
        own = list(inspect.signature(base.forward).parameters.values())
        first = not found
        found |= {p.name: p for p in own if p.name not in found and (first or p.kind is p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    # A signature requires parameters ordered by kind, but those of base classes were added last.
    return sorted(found.values(), key=lambda parameter: parameter.kind)


def _parameter(name: str, default: object, annotation: str) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _reduce(model: Any, protocol: Any) -> Any:
    """Pickle and copy a model as an instance of its original class, which can be imported."""
    base = getattr(type(model), _BASE)
    return _new, (base,), *base.__reduce_ex__(model, protocol)[2:]


def _new(kind: Any) -> Any:
    return kind.__new__(kind)
