"""A forward whose signature names the inputs that a model has."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import FunctionType
from typing import Any

from torch import nn

_MADE: dict[tuple[type, tuple[str, ...], tuple[str, ...]], type] = {}
_BASE = "_class_without_signature"


def sign_forward(model: nn.Module, tensors: Sequence[str], flags: Sequence[str] = ()) -> None:
    """Give a model a `forward` whose signature lists its inputs in place of `**inputs`.

    Whoever asks `inspect.signature(model.forward)`, as transformers' Trainer and torch.export do, finds them by name. The model
    gets a subclass of its class with the same name, one for all models of the same inputs. Copies and pickles are of the class
    itself, whose `__setstate__` calls this again. A class that has no `**` in its forward is left alone.

    Args:
        model: whose forward has keyword arguments, and one that takes the rest.
        tensors: names of the inputs, None by default.
        flags: names of switches, False by default.
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
        # A copy: another name for the same function would give every model this signature. No call is added.
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
    """The parameters of a forward, and those of the classes above it that it passes `**` on to."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if "forward" not in vars(base):
            continue
        own = list(inspect.signature(base.forward).parameters.values())
        first = not found
        found |= {p.name: p for p in own if p.name not in found and (first or p.kind is p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    # A signature lists parameters by kind, and those of a base class were added last.
    return sorted(found.values(), key=lambda parameter: parameter.kind)


def _parameter(name: str, default: object, annotation: str) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _reduce(model: Any, protocol: Any) -> Any:
    """Pickle and copy a model as one of the class that can be imported."""
    base = getattr(type(model), _BASE)
    return _new, (base,), *base.__reduce_ex__(model, protocol)[2:]


def _new(kind: Any) -> Any:
    return kind.__new__(kind)
