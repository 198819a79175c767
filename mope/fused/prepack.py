"""Frozen linear layers of the CPU with weights in the order in which oneDNN multiplies fastest.

`F.linear` puts the weight in order in every call, or multiplies it as it lies. A frozen weight can be put in order once, which is
what torch's compiler does with frozen models. It takes as much memory again as the weight.
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
    """Whether torch has oneDNN's operators, which are not public, and they do here what they are used for."""
    if dtype not in DTYPES or not torch.backends.mkldnn.is_available():
        return False
    try:
        # Asked once, wherever that happens to be: under autocast, or where new tensors go to a GPU.
        with torch.device("cpu"), torch.autocast("cpu", enabled=False):
            x, weight = torch.ones(2, 1, 3, dtype=dtype), torch.arange(12, dtype=dtype).view(4, 3) / 8
            found = _product(x, in_order(weight), weight[:, 0].contiguous(), gelu=True)
            return torch.allclose(found, F.gelu(F.linear(x, weight, weight[:, 0])), atol=1e-2)
    # No such operator, another signature, not built for this processor: the layers then are called as they are.
    except (RuntimeError, AttributeError, TypeError):
        return False


def in_order(weight: Tensor) -> Tensor:
    """Return a copy of a weight (N,C) in the order of oneDNN."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


def differentiates_otherwise() -> bool:
    """Whether torch.func or forward mode may be at work, which `requires_grad` does not tell and oneDNN's operators do not know."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _product(x: Tensor, ordered: Tensor, bias: Tensor | None, *, gelu: bool) -> Tensor:
    """(..., C) -> (..., N), of two axes or more."""
    product = torch.ops.mkldnn._linear_pointwise.default
    return product(x, ordered, bias, "gelu" if gelu else "none", [], "none" if gelu else "")


class PrepackedFunction(torch.autograd.Function):
    """(layer, x) -> layer(x). Of the layer's weight backward keeps what torch would: it must not change in between."""

    @staticmethod
    def forward(ctx: Any, layer: Prepacked, x: Tensor) -> Tensor:
        ctx.layer = layer
        if not layer.layer.weight.is_inference():
            ctx.save_for_backward(layer.layer.weight)
        return layer.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        # Looked at, torch says whether the weight has changed.
        _ = ctx.saved_tensors
        return None, ctx.layer.transposed_product(grads[0])


class _Order:
    """A weight put in order, and what it was made from."""

    def __init__(self, weight: Tensor) -> None:
        # A view of the weight: while it is held, no other weight can lie at its address.
        self.source, self.version = weight.detach(), version(weight)
        self.weight = in_order(weight)
        self.transposed: Tensor | None = None

    def is_of(self, weight: Tensor) -> bool:
        return self.source.data_ptr() == weight.data_ptr() and self.version == version(weight)


class Prepacked:
    """The `forward` of a frozen nn.Linear: x (..., C) -> (..., N). It is put in order anew when the weight has changed, but
    for changes in place through `.data`, which torch does not count.

    Where oneDNN cannot do it - another dtype or device, autocast of other weights, weights that train, inside torch.compile,
    torch.func or forward-mode derivatives - the layer is called as before.
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
        """gelu(layer(x)), with the exact GELU, in one pass where no gradient is needed."""
        if self.fits(x) and not (torch.is_grad_enabled() and x.requires_grad):
            return self.product(x, gelu=True)
        return F.gelu(self(x))

    def fits(self, x: Tensor) -> bool:
        weight, bias = self.layer.weight, self.layer.bias
        return (
            not torch.compiler.is_compiling()
            and not differentiates_otherwise()
            and type(x) is Tensor
            and weight.device.type == x.device.type == "cpu"
            and available(weight.dtype)
            # `functional_call` lends the layer another weight, which is gone when the backward pass comes.
            and isinstance(weight, nn.Parameter)
            # Autocast casts the rows of x, as it would in front of F.linear.
            and weight.dtype == (torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype)
            and not weight.requires_grad
            # Of a bias oneDNN takes the memory as it lies.
            and (bias is None or (bias.is_contiguous() and bias.dtype == weight.dtype and not bias.requires_grad))
            and x.numel() > 0
            and x.dim() > 1
            and x.shape[-1] == weight.shape[1]
        )

    def product(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        return _product(x.to(self.layer.weight.dtype), self._current().weight, self.layer.bias, gelu=gelu)

    def transposed_product(self, grad: Tensor) -> Tensor:
        """The gradient of x from that of layer(x)."""
        order = self._current()
        if (transposed := order.transposed) is None:
            order.transposed = transposed = in_order(order.source.mT)
        return _product(grad, transposed, None, gelu=False)

    def _current(self) -> _Order:
        """Whole before another thread may see it."""
        order = self._order
        if order is None or not order.is_of(self.layer.weight):
            # Also when a model is first used in inference mode: what is made there could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                self._order = order = _Order(self.layer.weight)
        return order

    def __deepcopy__(self, memo: dict[int, Any]) -> Prepacked:
        # The copied layer comes with the copy of its module; what is in order is made anew.
        return Prepacked(copy.deepcopy(self.layer, memo))

    def __reduce__(self) -> tuple[type[Prepacked], tuple[nn.Linear]]:
        return Prepacked, (self.layer,)


def prepacked(module: nn.Module | None) -> Prepacked | None:
    """The `forward` of a layer that was put in order and does nothing else."""
    forward = None if module is None else module.__dict__.get("forward")
    return forward if isinstance(forward, Prepacked) and type(module) is nn.Linear and not has_hooks(module) else None


class PrepackedLayers:
    """The frozen linear layers of some modules, put in order as they are called; `undo` gives the memory back."""

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
        as_before(self.layers)


def as_before(modules: Iterable[nn.Module]) -> None:
    """Let go of all weights in order in some modules, whoever put them there."""
    for module in modules:
        for layer in module.modules():
            if isinstance(layer.__dict__.get("forward"), Prepacked):
                del layer.forward
