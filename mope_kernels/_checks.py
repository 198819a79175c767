"""Argument checks. Each error names the op, the offending argument, the shapes and the fix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _triton, settings


class Arguments:
    """Arguments of one call to an op: bind the sizes of named axes and check every later tensor against them.

    >>> arguments = Arguments("mix_prompts")
    >>> arguments.tensor("experts", experts, "K P D")
    >>> arguments.tensor("weights", weights, "B k")
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, int] = {}
        self.device: torch.device | None = None

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.op}: {message}")

    def tensor(
        self, name: str, value: Tensor | None, axes: str, *, integer: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        """Check `value` against the axes; each letter stands for one size. `None` (an omitted optional argument) passes."""
        if value is None:
            return
        self._is_tensor(name, value)
        names = axes.split()
        if value.dim() != len(names):
            raise self.error(f"{name} must have the axes ({', '.join(names)}), got shape {tuple(value.shape)}")
        self._hold(name, value, names, tuple(value.shape), integer, dtype)

    def rows(self, name: str, value: Tensor | None, axes: str, *, dtype: torch.dtype | None = None) -> None:
        """Check `value` (..., C) against two axes, "R C", where R is the product of all leading axes."""
        if value is None:
            return
        self._is_tensor(name, value)
        names = axes.split()
        if value.dim() < 1:
            raise self.error(f"{name} must have a last axis {names[1]}, got a scalar")
        self._hold(name, value, names, (math.prod(value.shape[:-1]), value.shape[-1]), False, dtype)

    def _is_tensor(self, name: str, value: Tensor) -> None:
        if not isinstance(value, Tensor):
            # For example a numpy array or a list.
            raise TypeError(f"{self.op}: {name} must be a tensor, got {type(value).__name__}: use torch.as_tensor({name})")

    def _hold(
        self, name: str, value: Tensor, names: list[str], shape: tuple[int, ...], integer: bool, dtype: torch.dtype | None
    ) -> None:
        for axis, size in zip(names, shape, strict=True):
            expected = int(axis) if axis.isdigit() else self.sizes.setdefault(axis, size)
            if size != expected:
                wanted = ", ".join(f"{a}={self.sizes[a]}" if a in self.sizes else a for a in names)
                raise self.error(
                    f"{name} must be ({wanted}), got shape {tuple(value.shape)}: axis {axis} is {size}, not {expected}"
                    + self._layout_hint(axis, value)
                )
        if integer and (value.is_floating_point() or value.dtype == torch.bool):
            raise self.error(f"{name} must be an integer tensor, got {value.dtype}: use {name}.long()")
        if not integer and not value.is_floating_point():
            raise self.error(f"{name} must be a floating point tensor, got {value.dtype}: use {name}.float()")
        if dtype is not None and value.dtype != dtype:
            raise self.error(f"{name} must be {dtype}, got {value.dtype}: use {name}.to({dtype})")
        if self.device is None:
            self.device = value.device
        elif value.device != self.device:
            raise self.error(f"{name} is on {value.device}, the other tensors on {self.device}: use {name}.to('{self.device}')")

    def _layout_hint(self, axis: str, value: Tensor) -> str:
        """Suggest a transpose if query, key and value have rows before heads, the layout that a projection returns."""
        if axis != "H" or self.sizes.get("Lq") not in value.shape[1:3]:
            return ""
        return ": if query, key and value are (B,L,H,D), transpose(1, 2) makes them (B,H,L,D), heads first"

    def both_or_neither(self, first: str, a: object, second: str, b: object) -> None:
        if (a is None) != (b is None):
            raise self.error(f"{first} and {second} go together: give both or neither")

    def top_k(self, top_k: int | None, num_experts: int) -> None:
        if num_experts < 1:
            raise self.error("there must be at least one expert (K >= 1)")
        if top_k is not None and not 1 <= top_k <= num_experts:
            raise self.error(f"top_k must be between 1 and the {num_experts} experts, or None for dense routing, got {top_k}")

    def number(self, name: str, value: object) -> None:
        """Reject a tensor that requires a gradient: the kernels read it as a number and would silently drop its gradient."""
        if isinstance(value, Tensor) and value.requires_grad:
            raise self.error(f"{name} is a number and gets no gradient: pass {name}.item(), or learn what it acts on")

    def positive(self, name: str, value: float) -> None:
        self.number(name, value)
        if not value > 0:
            raise self.error(f"{name} must be positive, got {value}")

    def norm_dtype(self, dtype: torch.dtype | None) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise self.error(f"norm_dtype must be a floating point dtype, got {dtype}")

    def probability(self, name: str, value: float) -> None:
        self.number(name, value)
        if not 0 <= value < 1:
            raise self.error(f"{name} must be in [0, 1), got {value}")

    def may_read(self, value: Tensor) -> bool:
        """Return whether values may be read: always on the CPU, elsewhere only with MOPE_DEBUG=1, because reading syncs."""
        if torch.compiler.is_compiling() or _triton.recording():
            return False
        return _triton.device_of(value).type == "cpu" or debugging()

    def indices(self, name: str, value: Tensor, bound: int) -> None:
        """Check that all values are in 0..bound-1, if they may be read."""
        if value.numel() == 0 or not self.may_read(value):
            return
        lowest, highest = map(int, value.aminmax())
        if lowest < 0 or highest >= bound:
            raise self.error(f"{name} must lie in 0..{bound - 1}, got values from {lowest} to {highest}")


def first_derivative_only(op: str) -> None:
    """Raise if a backward is being differentiated: it has no derivative, and torch would only warn and treat it as constant."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op}: its kernels have no gradients of gradients, which create_graph=True requests: use impl='reference' "
            "(everywhere: MOPE_IMPL=reference)"
        )


def any_needs_gradient(*tensors: Tensor | None) -> bool:
    """Return whether autograd has to see operations on these tensors. If not, the raw op is called directly, which is faster.

    Always true in forward mode, which `requires_grad` does not reveal: raw ops would silently drop tangents, a Function raises.
    """
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def debugging() -> bool:
    """Return whether checks that make the host wait for the device are enabled."""
    return settings.current().debug


def last_dim_contiguous(tensor: Tensor) -> Tensor:
    """Return the tensor, copied if its last dimension is strided: the kernels accept any other strides."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def to_copy(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Return the positions of the tensors that `last_dim_contiguous` would copy. They are the same for equal signatures."""
    return tuple(i for i, t in enumerate(tensors) if t is not None and last_dim_contiguous(t) is not t)


def copied(tensors: Sequence[Any], which: tuple[int, ...]) -> list[Any]:
    """Return the tensors, with contiguous copies at the positions `which`."""
    return [t.contiguous() if i in which else t for i, t in enumerate(tensors)]


def kernel_lengths(lengths: Tensor | None) -> Tensor | None:
    """Convert lengths of any integer dtype to one that the kernels read."""
    if lengths is None:
        return None
    return last_dim_contiguous(lengths if lengths.dtype in (torch.int32, torch.int64) else lengths.long())
