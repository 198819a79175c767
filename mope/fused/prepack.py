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
            found = _product(x, _in_order(weight), weight[:, 0].contiguous(), gelu=True)
            return torch.allclose(found, F.gelu(F.linear(x, weight, weight[:, 0])), atol=1e-2)
    # No such operator, another signature, not built for this processor: the layers then are called as they are.
    except (RuntimeError, AttributeError, TypeError):
        return False


def _in_order(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


def _product(x: Tensor, ordered: Tensor, bias: Tensor | None, *, gelu: bool) -> Tensor:
    """(..., C) -> (..., N), of two axes or more."""
    product = torch.ops.mkldnn._linear_pointwise.default
    return product(x, ordered, bias, "gelu" if gelu else "none", [], "none" if gelu else "")


class PrepackedFunction(torch.autograd.Function):
    """(layer, x) -> layer(x). Nothing is kept for backward: the weights do not train."""

    @staticmethod
    def forward(ctx: Any, layer: Prepacked, x: Tensor) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, ctx.layer.transposed_product(grads[0])


class Prepacked:
    """The `forward` of a frozen nn.Linear: x (..., C) -> (..., N). It is put in order anew when the weight has changed, but
    for changes in place through `.data`, which torch does not count.

    Where oneDNN cannot do it - another dtype or device, autocast of other weights, weights that train, inside torch.compile -
    the layer is called as before.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        # A view of what is in order now: while it is held, no other weight can lie at its address.
        self._source: Tensor | None = None
        self._version = 0
        self._ordered: Tensor | None = None
        self._transposed: Tensor | None = None

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
            and type(x) is Tensor
            and weight.device.type == x.device.type == "cpu"
            and available(weight.dtype)
            # Autocast casts the rows of x, as it would in front of F.linear.
            and weight.dtype == (torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype)
            and not (weight.requires_grad or (bias is not None and bias.requires_grad))
            and x.numel() > 0
            and x.dim() > 1
        )

    def product(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        self._update()
        assert self._ordered is not None
        return _product(x.to(self.layer.weight.dtype), self._ordered, self.layer.bias, gelu=gelu)

    def transposed_product(self, grad: Tensor) -> Tensor:
        """The gradient of x from that of layer(x)."""
        self._update()
        if self._transposed is None:
            self._transposed = _in_order(self.layer.weight.mT)
        return _product(grad, self._transposed, None, gelu=False)

    def _update(self) -> None:
        weight = self.layer.weight
        if self._source is None or self._source.data_ptr() != weight.data_ptr() or self._version != version(weight):
            # Also when a model is first used in inference mode: what is made there could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                self._source, self._version = weight.detach(), version(weight)
                self._ordered, self._transposed = _in_order(weight), None

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
        for layer in self.layers:
            layer.forward = Prepacked(layer)  # type: ignore[method-assign, assignment]

    def undo(self) -> None:
        as_before(self.layers)


def as_before(modules: Iterable[nn.Module]) -> None:
    """Let go of all weights in order in some modules, whoever put them there."""
    for module in modules:
        for layer in module.modules():
            if isinstance(layer.__dict__.get("forward"), Prepacked):
                del layer.forward
