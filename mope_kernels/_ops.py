"""Definition, registration and lookup of raw ops in two namespaces. Imports only torch.

Each compiled implementation has a namespace, `mope_triton` or `mope_cpu`. Both have the same schemas and fakes, which come
from the op specs (`spec.RawOp`). Each op's folder registers its Triton launchers; the extension registers the C++ kernels when
it is loaded. Raw ops have no autograd kernels: the public functions go through autograd Functions where gradients are needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.library import Library

from . import _triton, plans, settings
from .configs.tuning import tunable
from .tape import Tape

NAMESPACES = ("mope_triton", "mope_cpu")
LIBRARIES = {namespace: Library(namespace, "DEF") for namespace in NAMESPACES}

# Triton launchers by raw op name, for calls that bypass torch's dispatcher.
_LAUNCHERS: dict[str, Callable[..., Any]] = {}
# Tapes of the raw backwards. Plans cannot record these, because the arguments of a backward are not known in advance.
_tapes: dict[str, Callable[..., Any]] = {}

Launcher = TypeVar("Launcher", bound=Callable[..., object])
# The arguments of a raw op by name, plus its `namespace`.
Named = SimpleNamespace
Fake = Callable[[Any], tuple[Tensor, ...]]
Kernel = Callable[..., Any]


def empty_heads_last(query: Tensor, batch: int, heads: int, length: int, width: int) -> Tensor:
    """Allocate (B,H,L,D) with memory laid out as (B,L,H,D), so that the projections around the attention need no copy."""
    return query.new_empty(batch, length, heads, width).transpose(1, 2)


def not_needed(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the empty tensor that stands for a gradient that was not requested."""
    return like.new_empty(0, dtype=dtype)


def define(name: str, schema: str, fake: Fake) -> None:
    """Define a raw op in both namespaces.

    Args:
        name: the name of the raw op.
        schema: "(Tensor x, ...) -> (Tensor out, ...)", in torch.library's schema syntax.
        fake: receives the arguments by name and the `namespace`; returns uninitialized results.
    """
    parsed = torch._C.parse_schema(f"{name}{schema}")
    names = [argument.name for argument in parsed.arguments]
    defaults = {argument.name: argument.default_value for argument in parsed.arguments if argument.has_default_value()}
    single = len(parsed.returns) == 1

    def fake_op(namespace: str, *args: Any, **kwargs: Any) -> Any:
        given = defaults | dict(zip(names, args, strict=False)) | kwargs
        results = fake(Named(namespace=namespace, **given))
        return results[0] if single else results

    for namespace, library in LIBRARIES.items():
        library.define(name + schema)
        torch.library.register_fake(f"{namespace}::{name}", functools.partial(fake_op, namespace), lib=library)


def triton_kernel(name: str) -> Callable[[Launcher], Launcher]:
    """Return a decorator that registers the launcher of `mope_triton::name`. CPU tensors run in Triton's interpreter."""

    def register(launcher: Launcher) -> Launcher:
        tuned = tunable(launcher)
        _LAUNCHERS[name] = _as_the_op(name, tuned)
        _tapes[name] = _Tapes(name)
        for key in ("CUDA", "CPU"):
            LIBRARIES["mope_triton"].impl(name, tuned, key)
        return launcher

    return register


class _Schema(NamedTuple):
    """Number of leading tensor arguments of a raw op, and the Python type of each number by position."""

    tensors: int
    numbers: dict[int, type]


_KINDS = {"float": float, "int": int, "bool": bool}


@functools.cache
def _schema(name: str) -> _Schema:
    op: Any = _overload("triton", name)
    types = [str(argument.real_type) for argument in op._schema.arguments]
    tensors = next((i for i, kind in enumerate(types) if "Tensor" not in kind), len(types))
    return _Schema(tensors, {i: _KINDS[kind] for i, kind in enumerate(types) if kind in _KINDS})


def _as_the_op(name: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the launcher so that it behaves as if torch's dispatcher called it.

    Convert numbers to the types in the schema, because kernels are compiled for those, and turn autocast off. Also keep autograd
    from treating results as views, which it would refuse to change in place.
    """

    @functools.wraps(launcher)
    def run(*args: Any) -> Any:
        given = list(args)
        for place, kind in _schema(name).numbers.items():
            if place < len(given) and type(given[place]) is not kind:
                if kind is bool or type(given[place]) not in (bool, int):
                    # The op itself reports the wrong type.
                    return _overload("triton", name)(*args)
                given[place] = kind(given[place])
        with torch._C._DisableAutocast(), torch._C._AutoDispatchBelowADInplaceOrView():
            return launcher(*given)

    return run


@functools.cache
def _overload(implementation: str, name: str) -> Callable[..., Any]:
    return getattr(getattr(torch.ops, f"mope_{implementation}"), name).default


def forward_kernel(implementation: str, name: str, direct: bool) -> Callable[..., Any]:
    """Return the callable for a raw op. With `direct` (nothing has to see the op) it is the Triton launcher, else the op."""
    if torch.compiler.is_compiling():
        return getattr(getattr(torch.ops, f"mope_{implementation}"), name).default
    if not direct or implementation != "triton":
        return _overload(implementation, name)
    return _LAUNCHERS[name] if _triton.recording() or settings.current().autotune else Tape(_LAUNCHERS[name])


def backward_kernel(implementation: str, name: str) -> Callable[..., Any]:
    """Return the callable for a raw backward. Modes are checked again, because they may have changed since forward."""
    if torch.compiler.is_compiling():
        return getattr(getattr(torch.ops, f"mope_{implementation}"), name).default
    if implementation != "triton":
        return _overload(implementation, name)
    if _triton.recording():
        # Recording needs the launchers themselves to run, even on fake tensors.
        return _LAUNCHERS[name]
    if not plans.nothing_watches():
        return _overload(implementation, name)
    return _tapes[name]


class _Tapes(plans.Plans):
    """Tapes of one raw op, keyed by the signature of all its arguments. Calls without a signature go to the op."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.tensors = _schema(name).tensors

    def __call__(self, *args: Any) -> Any:
        key = plans.signature_of_arguments(args[: self.tensors], args[self.tensors :])
        if key is None or settings.current().autotune:
            return _overload("triton", self.name)(*args)
        tape = self.get(key)
        if tape is None:
            tape = self.put(key, Tape(_LAUNCHERS[self.name], share_empty=True), plans.generation())
        return tape(*args)
