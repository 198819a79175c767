"""Plans: the results of checking a call, cached for later calls with the same signature.

Calling an op checks the arguments, chooses an implementation and inspects layouts. All of that depends only on the signature of
the call: the shapes, strides, dtypes, devices and alignment of the tensors, which of them require a gradient, the options, and a
few torch settings. The first call with a signature makes a plan, a function of the tensors that does the remaining work; later
calls run it directly. Each op keeps up to MAX_PLANS plans.

A call has no signature, and is checked every time, while something has to see the ops themselves: dispatch and function modes,
torch.func transforms, forward mode, tracing, or Tensor subclasses.
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
# Version of the state that plans depend on. `forget` increments it, so that plans begun earlier are not kept.
_generation = 0
_lock = threading.Lock()

Plan = Callable[..., Any]


def nothing_watches() -> bool:
    """Return whether kernels may be called without torch's dispatcher: no mode, transform or trace has to see the op."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or _triton.recording()
    )


def signature(tensors: Iterable[Any], options: tuple[Any, ...]) -> Hashable | None:
    """Return everything about a call that checks and choices depend on, or None if every such call must be checked.

    Two properties of an address count: the address modulo 16 bytes, because Triton compiles separately for aligned pointers, and
    the tensor's offset into its storage modulo 16 elements.
    """
    return signature_of_arguments(tensors, options) if nothing_watches() else None


def signature_of_arguments(tensors: Iterable[Any], options: tuple[Any, ...]) -> Hashable | None:
    """Return the signature of arguments, or None unless all are plain tensors, numbers, strings, dtypes or None."""
    kinds = tuple(map(type, options))
    # This also excludes tensors passed as numbers, because a signature would not contain their values.
    if not _OPTIONS.issuperset(kinds):
        return None
    # The types matter: 2 == 2.0 and 1 == True, but an op may not accept both.
    key: list[Any] = [torch.is_grad_enabled(), _triton.target(), options, kinds]
    try:
        for t in tensors:
            # Inlined, to avoid a function call per tensor in every call of an op.
            if t is None:
                key.append(None)
                continue
            if type(t) not in _TENSORS or t.is_neg():
                return None
            address = t.data_ptr()
            if not address and t.numel():
                # A tensor without memory, such as a fake tensor.
                return None
            key.append((t.shape, t.stride(), t.dtype, t.device, t.requires_grad, address & 15, t.storage_offset() & 15))
            if _ON_AMD:
                # Kernels are compiled with 32-bit offsets if storages are small.
                key.append(t.untyped_storage().nbytes() < 2**31)
    except RuntimeError:
        # The tensor has no strides or no memory, for example because it is sparse.
        return None
    return tuple(key)


class Plans:
    """Plans of one op, keyed by signature. Beyond MAX_PLANS the oldest is dropped."""

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
        """Keep a plan that was begun in this generation, unless the state it depends on has changed since."""
        with _lock:
            if generation == _generation:
                if len(self._plans) >= MAX_PLANS and key not in self._plans:
                    del self._plans[next(iter(self._plans))]
                self._plans[key] = plan
        return plan

    def run(self, make: Callable[..., Plan], tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> Any:
        """Run the plan for a call. If there is none yet, create it with `make(direct, *tensors, *options)`.

        `make` validates the arguments and raises if they are wrong. If `direct` is true, the plan may call kernels without torch's
        dispatcher. The plan is called with the tensors.
        """
        if torch.compiler.is_compiling():
            return make(False, *tensors, *options)(*tensors)
        key = signature(tensors, options)
        if key is None:
            # Recording needs the launchers themselves to run, even on fake tensors.
            return make(_triton.recording(), *tensors, *options)(*tensors)
        plan = self._plans.get(key)
        if plan is None:
            begun = _generation
            plan = self.put(key, make(True, *tensors, *options), begun)
        return plan(*tensors)


def forget() -> None:
    """Drop the plans of all ops. Call this after a change to something that they depend on, such as the settings."""
    global _generation
    with _lock:
        _generation += 1
        for plans in _every_op:
            plans.clear()


def generation() -> int:
    """Return the generation to pass to `Plans.put`. Read it before making the plan."""
    return _generation
