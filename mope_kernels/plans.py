"""What the public functions found out about a call, kept for the next call that looks the same.

A call of an op is checked, an implementation is chosen, and layouts are looked at. All of that depends on the shapes, strides,
dtypes, devices and alignment of the tensors, on which of them require a gradient, on the options, and on a few switches of
torch: together the signature of the call. The first call with a signature makes a plan, a function of the tensors that does
what is left to do; later calls run it at once. An op keeps MAX_PLANS of them.

There is no signature, and every call is checked anew, while something has to see the ops themselves: dispatch and function modes,
transforms of torch.func, forward mode, tracing, subclasses of Tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import _triton

MAX_PLANS = 1024

_TENSORS = frozenset((Tensor, nn.Parameter))
_OPTIONS = frozenset((bool, int, float, str, type(None), torch.dtype))
_ON_AMD = bool(torch.version.hip)
_every_op: list[Plans] = []
# Of what plans depend on, counted up by each `forget`, so that a plan made meanwhile is not kept.
_generation = 0
_lock = threading.Lock()

Plan = Callable[..., Any]


def nothing_watches() -> bool:
    """Return whether kernels may be called past torch's dispatcher: no mode, transform or trace has to see the op."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or _triton.recording()
    )


def signature(tensors: Iterable[Any], options: tuple[Any, ...]) -> Hashable | None:
    """Return all that checks and choices read of a call, or None where a call has to be looked at each time.

    Of an address two things count: whether it is a multiple of 16 bytes, which Triton compiles for, and where in its storage
    a tensor begins, modulo 16 elements.
    """
    return signature_of_arguments(tensors, options) if nothing_watches() else None


def signature_of_arguments(tensors: Iterable[Any], options: tuple[Any, ...]) -> Hashable | None:
    """Return the signature of arguments, None if a tensor is not a plain one, or an option no plain number, text or dtype."""
    kinds = tuple(map(type, options))
    # A tensor in place of a number too: a signature says nothing of its value.
    if not _OPTIONS.issuperset(kinds):
        return None
    # With the kinds: 2 == 2.0 and 1 == True, and not all of them are as good.
    key: list[Any] = [torch.is_grad_enabled(), _triton.target(), options, kinds]
    try:
        for t in tensors:
            # No function for a tensor: half of what a small op costs is in here.
            if t is None:
                key.append(None)
                continue
            if type(t) not in _TENSORS or t.is_neg():
                return None
            address = t.data_ptr()
            if not address and t.numel():
                # A tensor without memory.
                return None
            key.append((t.shape, t.stride(), t.dtype, t.device, t.requires_grad, address & 15, t.storage_offset() & 15))
            if _ON_AMD:
                # Kernels are compiled for addresses of 32 bits where storages are small.
                key.append(t.untyped_storage().nbytes() < 2**31)
    except RuntimeError:
        # No strides, or no memory: a sparse tensor, say.
        return None
    return tuple(key)


class Plans:
    """The plans of one op by signature; the oldest goes when there are more than MAX_PLANS."""

    def __init__(self) -> None:
        self._plans: dict[Hashable, Plan] = {}
        _every_op.append(self)

    def __len__(self) -> int:
        return len(self._plans)

    def clear(self) -> None:
        self._plans.clear()

    def get(self, key: Hashable) -> Plan | None:
        return self._plans.get(key)

    def put(self, key: Hashable, plan: Plan, generation: int) -> Plan:
        """Keep a plan that was begun in this generation, unless what it depends on has changed since."""
        with _lock:
            if generation == _generation:
                if len(self._plans) >= MAX_PLANS and key not in self._plans:
                    del self._plans[next(iter(self._plans))]
                self._plans[key] = plan
        return plan

    def run(self, make: Callable[..., Plan], tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> Any:
        """Run the plan of a call, made by `make(direct, *tensors, *options)` if there is none yet.

        `make` raises what is wrong with the call. `direct` tells it that kernels may be called past torch's dispatcher. The plan
        gets the tensors.
        """
        if torch.compiler.is_compiling():
            return make(False, *tensors, *options)(*tensors)
        key = signature(tensors, options)
        if key is None:
            # Launches that are written down are made by the launchers, on fake tensors too.
            return make(_triton.recording(), *tensors, *options)(*tensors)
        plan = self._plans.get(key)
        if plan is None:
            begun = _generation
            plan = self.put(key, make(True, *tensors, *options), begun)
        return plan(*tensors)


def forget() -> None:
    """Forget the plans of all ops: after a change of what they depend on, as settings do."""
    global _generation
    with _lock:
        _generation += 1
        for plans in _every_op:
            plans.clear()


def generation() -> int:
    """Return what `Plans.put` asks for, to be looked at before a plan is made."""
    return _generation
