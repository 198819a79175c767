"""Frozen linear layers on the CPU whose weights are prepacked into oneDNN's fastest layout.

`F.linear` repacks the weight in every call, or multiplies it in its original layout. A frozen weight can be packed once, as
torch's compiler does with frozen models. The packed copy takes as much memory as the weight.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .modules import has_hooks, is_plain, version

DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def available(dtype: torch.dtype) -> bool:
    """Return whether torch's private oneDNN operators exist and give correct results on this machine."""
    if dtype not in DTYPES or not torch.backends.mkldnn.is_available():
        return False
    try:
        # The result is cached, so it must not depend on the caller's autocast or default device.
        with torch.device("cpu"), torch.autocast("cpu", enabled=False):
            x, weight = torch.ones(2, 1, 3, dtype=dtype), torch.arange(12, dtype=dtype).view(4, 3) / 8
            found = _product(x, in_order(weight), weight[:, 0].contiguous(), gelu=True)
            return torch.allclose(found, F.gelu(F.linear(x, weight, weight[:, 0])), atol=1e-2)
    # No such operator, another signature, or not built for this processor: the layers are then called without prepacking.
    except (RuntimeError, AttributeError, TypeError):
        return False


def in_order(weight: Tensor) -> Tensor:
    """Return a copy of a weight (N,C) in oneDNN's layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


def differentiates_otherwise() -> bool:
    """Return whether torch.func transforms or forward-mode AD may be active.

    `requires_grad` does not show them, and oneDNN's operators do not support them.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _product(x: Tensor, ordered: Tensor, bias: Tensor | None, *, gelu: bool) -> Tensor:
    """Multiply x (..., C), with two or more axes, by a weight in oneDNN's layout, giving (..., N)."""
    product = torch.ops.mkldnn._linear_pointwise.default
    return product(x, ordered, bias, "gelu" if gelu else "none", [], "none" if gelu else "")


class PrepackedFunction(torch.autograd.Function):
    """Differentiable layer(x); as in `F.linear`, the weight must not change between forward and backward."""

    @staticmethod
    def forward(ctx: Any, layer: Prepacked, x: Tensor) -> Tensor:
        ctx.layer = layer
        if not layer.layer.weight.is_inference():
            ctx.save_for_backward(layer.layer.weight)
        return layer.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        # Reading the saved tensors makes torch raise an error if the weight has changed.
        _ = ctx.saved_tensors
        return None, ctx.layer.transposed_product(grads[0])


class _Order:
    """A weight in oneDNN's layout, together with its source."""

    def __init__(self, weight: Tensor) -> None:
        # A view of the weight: while it is held, no other weight can have the same address.
        self.source, self.version = weight.detach(), version(weight)
        self.weight = in_order(weight)
        self.transposed: Tensor | None = None

    def is_of(self, weight: Tensor) -> bool:
        return self.source.data_ptr() == weight.data_ptr() and self.version == version(weight)


class Prepacked:
    """The `forward` of a frozen `nn.Linear` with a prepacked weight: x (..., C) -> (..., N).

    The weight is repacked when it has changed, except for in-place changes through `.data`, which torch does not count. The
    original `forward` runs where oneDNN's operators cannot be used: for other dtypes or devices, weights not in autocast's dtype,
    weights that train, and inside torch.compile, torch.func or forward-mode AD.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self._order: _Order | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if not self.fits(x):
            return nn.Linear.forward(self.layer, x)
        if torch.is_grad_enabled() and x.requires_grad:
            out: Tensor = PrepackedFunction.apply(self, x)
            return out
        return self.product(x)

    def gelu(self, x: Tensor) -> Tensor:
        """Return the exact GELU of layer(x), in one pass if no gradient is needed."""
        if self.fits(x) and not (torch.is_grad_enabled() and x.requires_grad):
            return self.product(x, gelu=True)
        return F.gelu(self(x))

    def fits(self, x: Tensor) -> bool:
        """Return whether the prepacked weight can be used for the input x."""
        weight, bias = self.layer.weight, self.layer.bias
        return (
            not torch.compiler.is_compiling()
            and not differentiates_otherwise()
            and type(x) is Tensor
            and weight.device.type == x.device.type == "cpu"
            and available(weight.dtype)
            # `functional_call` replaces the weight temporarily; the replacement is gone by the backward pass.
            and isinstance(weight, nn.Parameter)
            # `product` casts x, as autocast does before F.linear.
            and weight.dtype == (torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype)
            and not weight.requires_grad
            # oneDNN ignores the strides of the bias, so it must be contiguous.
            and (bias is None or (bias.is_contiguous() and bias.dtype == weight.dtype and not bias.requires_grad))
            and x.numel() > 0
            and x.dim() > 1
            and x.shape[-1] == weight.shape[1]
        )

    def product(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        """Return layer(x), or its GELU, computed with the prepacked weight."""
        return _product(x.to(self.layer.weight.dtype), self._current().weight, self.layer.bias, gelu=gelu)

    def transposed_product(self, grad: Tensor) -> Tensor:
        """Return the gradient of x, given the gradient of layer(x)."""
        order = self._current()
        if (transposed := order.transposed) is None:
            order.transposed = transposed = in_order(order.source.mT)
        return _product(grad, transposed, None, gelu=False)

    def _current(self) -> _Order:
        """Return the prepacked weight, which is complete before other threads can see it."""
        order = self._order
        if order is None or not order.is_of(self.layer.weight):
            # Tensors created in inference mode could not be used outside of it later.
            with torch.inference_mode(False), torch.no_grad():
                self._order = order = _Order(self.layer.weight)
        return order

    def __deepcopy__(self, memo: dict[int, Any]) -> Prepacked:
        # The copy of the module contains the copied layer; its weight is packed again.
        return Prepacked(copy.deepcopy(self.layer, memo))

    def __reduce__(self) -> tuple[type[Prepacked], tuple[nn.Linear]]:
        return Prepacked, (self.layer,)


def prepacked(module: nn.Module | None) -> Prepacked | None:
    """Return the `Prepacked` forward of a plain `nn.Linear` without hooks; None for other modules."""
    forward = None if module is None else module.__dict__.get("forward")
    return forward if isinstance(forward, Prepacked) and type(module) is nn.Linear and not has_hooks(module) else None


class PrepackedLayers:
    """Prepack the frozen linear layers of some modules when they are first called; `undo` frees the memory."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.layers = [
            layer
            for module in modules
            for layer in module.modules()
            if isinstance(layer, nn.Linear) and is_plain(layer, nn.Linear) and not any(p.requires_grad for p in layer.parameters())
        ]
        try:
            for layer in self.layers:
                layer.forward = Prepacked(layer)  # type: ignore[method-assign, assignment]
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Restore the original `forward` of the layers and free the packed weights."""
        as_before(self.layers)


def as_before(modules: Iterable[nn.Module]) -> None:
    """Remove all prepacked weights from some modules, whichever `PrepackedLayers` added them."""
    for module in modules:
        for layer in module.modules():
            if isinstance(layer.__dict__.get("forward"), Prepacked):
                del layer.forward
