"""What the public functions found out about a call, kept for the next call that looks the same.

A call of an op is checked, an implementation is chosen, and layouts are looked at. All of that depends on the shapes, strides,
dtypes, devices and alignment of the tensors, on which of them require a gradient, on the options, and on a few switches of
torch: together the signature of the call. The first call with a signature makes a plan, a function of the tensors that does
what is left to do; later calls run it at once. An op keeps MAX_PLANS of them.

There is no signature, and every call is checked anew, while something has to see the ops themselves: dispatch and function modes,
transforms of torch.func, forward mode, tracing, subclasses of Tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import _triton

MAX_PLANS = 1024

_TENSORS = frozenset((Tensor, nn.Parameter))
_OPTIONS = frozenset((bool, int, float, str, type(None), torch.dtype))
_every_op: list[Plans] = []

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
        or _triton.target() is not None
    )


def all_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether all are dense tensors of torch's own class, whose memory holds their values."""
    return all(
        t is None or (type(t) in _TENSORS and t.layout == torch.strided and not t.is_neg() and not t._is_zerotensor())
        for t in tensors
    )


def signature(tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> Hashable | None:
    """Return all that checks and choices read of a call, or None where a call has to be looked at each time.

    Of an address two things count: whether it is a multiple of 16 bytes, which Triton compiles for, and where in its storage
    a tensor begins, modulo 16 elements.
    """
    if not nothing_watches():
        return None
    key: list[Any] = [options, torch.is_grad_enabled()]
    for option in options:
        if type(option) not in _OPTIONS:
            return None
    try:
        for t in tensors:
            if t is None:
                key.append(None)
            elif type(t) in _TENSORS and not t.is_neg():
                key += (t.shape, t.stride(), t.dtype, t.device, t.requires_grad, t.data_ptr() & 15, t.storage_offset() & 15)
            else:
                return None
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
            plan = make(True, *tensors, *options)
            if len(self._plans) >= MAX_PLANS:
                self._plans.pop(next(iter(self._plans)), None)
            self._plans[key] = plan
        return plan(*tensors)


def forget() -> None:
    """Forget the plans of all ops: after a change of what they depend on, as settings do."""
    for plans in _every_op:
        plans.clear()
