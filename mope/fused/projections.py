"""Frozen linear layers whose weights lie side by side in memory, so that one product computes them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeGuard, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from .modules import is_plain
from .plain import autocast_dtype
from .prepack import prepacked


class _Rows(NamedTuple):
    """Which rows of the tensors of all layers that were joined, (N,C) and (N,), are the parameters of one."""

    weight: Tensor
    bias: Tensor | None
    first: int
    end: int


class _Joined(NamedTuple):
    """Layers that were found side by side: their joined parameters, their widths, and address and shape of each parameter."""

    weight: Tensor
    bias: Tensor | None
    widths: list[int]
    places: tuple[tuple[tuple[int, torch.Size] | None, ...], ...]


# Not attributes of the layers, since neither a copy nor a file may hold the weights twice.
_ROWS: WeakKeyDictionary[nn.Module, _Rows] = WeakKeyDictionary()
# By the first of the layers and by their number.
_FOUND: WeakKeyDictionary[nn.Module, dict[int, _Joined]] = WeakKeyDictionary()


def join_linear(modules: Sequence[nn.Module]) -> None:
    """Move the weights of frozen linear layers that read the same input into one tensor, and their biases into another.

    The parameters become rows of it, each with a storage of its own that begins there: modules, names and values stay, no memory
    is added, a change in place is a change of both, and whoever looks for tensors that share a storage (safetensors, accelerate)
    finds none. What moves parameters (`to`, a copy) takes them apart, and `call_linear` then calls each layer: join them again.
    Layers that `call_linear` would call one by one are left alone, and so are weights that are a part of somebody else's tensor
    or lie in memory that processes share.
    """
    if not _are_plain(modules) or _joined(modules) is not None:
        return
    weights: list[Tensor] = [m.weight for m in modules]
    biases: list[Tensor] = [m.bias for m in modules if m.bias is not None]
    if len(biases) not in (0, len(modules)) or not (_can_move(weights) and _can_move(biases)):
        return
    # A parameter cannot become a part of an inference tensor.
    with torch.inference_mode(False), torch.no_grad():
        whole = [torch.cat(parts) for parts in (weights, biases) if parts]
        for parts, tensor in zip((weights, biases), whole, strict=False):
            for part, rows in zip(parts, tensor.split([len(part) for part in parts]), strict=True):
                # The storage ends where the part ends, and keeps the whole alive.
                part.data = from_dlpack(rows)
    end = 0
    for module, weight in zip(modules, weights, strict=True):
        first, end = end, end + len(weight)
        _ROWS[module] = _Rows(whole[0], whole[1] if biases else None, first, end)


def separate_linear(modules: Sequence[nn.Module]) -> None:
    """Undo `join_linear`: give each parameter memory of its own."""
    with torch.inference_mode(False), torch.no_grad():
        for module in modules:
            _FOUND.pop(module, None)
            if _ROWS.pop(module, None) is not None:
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.clone()


def whole_of(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Return weights (N,C) and biases (N,) of all the layers that a layer was joined with, None where it lies by itself now."""
    if module not in _ROWS or _joined([module]) is None:
        return None
    rows = _ROWS[module]
    return rows.weight, rows.bias


def call_linear(modules: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """What each of the modules makes of x (..., C): of layers that were joined, views into one product.

    Modules are called where somebody may want to see or to change what they do: where they are of another class, have hooks or a
    `forward` of their own, or parameters that train or are no plain tensors; and while torch.compile or torch.export traces
    them, which know no addresses.
    """
    if not torch.compiler.is_compiling():
        found = _FOUND.get(modules[0], {}).get(len(modules))
        if found is not None and _are_where_they_were(modules, found):
            return F.linear(x, found.weight, found.bias).split_with_sizes(found.widths, -1)
        if modules[0] in _ROWS and (joined := _joined(modules)) is not None:
            widths = [layer.out_features for layer in cast(Sequence[nn.Linear], modules)]
            return F.linear(x, *joined).split_with_sizes(widths, -1)
    if all(prepacked(module) for module in modules):
        # Each of them would cast it.
        x = x.to(autocast_dtype(x.device, x.dtype) or x.dtype)
    return [module(x) for module in modules]


def _are_plain(modules: Sequence[nn.Module]) -> TypeGuard[Sequence[nn.Linear]]:
    """Whether each `module(x)` is sure to be F.linear(x, weight, bias) of frozen parameters, and nothing else."""
    return all(
        is_plain(module, nn.Linear)
        # Subclasses of tensors are no exact parameters, nor is what torch.func puts in their place.
        and all(type(p) is nn.Parameter and not p.requires_grad for p in module._parameters.values() if p is not None)
        for module in modules
    )


def _can_move(parameters: Sequence[Tensor]) -> bool:
    layouts = {(p.dtype, p.device, p.shape[1:]) for p in parameters}
    if len(layouts) > 1 or any(p.is_meta or p.is_inference() for p in parameters):
        return False
    is_shared = any(p.device.type == "cpu" and p.is_shared() for p in parameters)
    return not is_shared and all(p.untyped_storage().nbytes() == p.nbytes for p in parameters)


def _joined(modules: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None] | None:
    """Return weights (N,C) and biases (N,) of all the layers; None if they do not lie side by side."""
    places = [_ROWS.get(module) for module in modules]
    first, last = places[0], places[-1]
    if first is None or last is None or not _are_plain(modules):
        return None
    weight = first.weight[first.first : last.end]
    bias = None if first.bias is None else first.bias[first.first : last.end]
    follow = all(place is not None and place.weight is first.weight for place in places)
    if (
        follow
        and _are_rows(weight, [module.weight for module in modules])
        and (bias is None or _are_rows(bias, [module.bias for module in modules]))
    ):
        found = tuple(tuple(map(_place, module._parameters.values())) for module in modules)
        widths = [module.out_features for module in modules]
        _FOUND.setdefault(modules[0], {})[len(modules)] = _Joined(weight, bias, widths, found)
        return weight, bias
    if follow:
        # They were moved apart, and the memory would be kept for nothing.
        for module in modules:
            _ROWS.pop(module, None)
            _FOUND.pop(module, None)
    return None


def _place(parameter: Tensor | None) -> tuple[int, torch.Size] | None:
    return None if parameter is None else (parameter.data_ptr(), parameter.shape)


def _are_where_they_were(modules: Sequence[nn.Module], found: _Joined) -> bool:
    """Return whether the layers are still plain, frozen and side by side."""
    dtype = found.weight.dtype
    for module, places in zip(modules, found.places, strict=True):
        if not is_plain(module, nn.Linear):
            return False
        for parameter, place in zip(module._parameters.values(), places, strict=True):
            if parameter is None and place is None:
                continue
            if (
                parameter is None
                or place is None
                or type(parameter) is not nn.Parameter
                or parameter.requires_grad
                or parameter.data_ptr() != place[0]
                or parameter.shape != place[1]
                or parameter.dtype != dtype
                or not parameter.is_contiguous()
            ):
                return False
    return True


def _are_rows(whole: Tensor, parts: Sequence[Tensor | None]) -> bool:
    """Whether the parts are the rows of `whole`, one part after the other, in the memory of `whole`."""
    address, row = whole.data_ptr(), whole.stride(0) * whole.itemsize
    end = address + len(whole) * row
    for part in parts:
        if part is None or part.data_ptr() != address or part.dtype != whole.dtype or part.shape[1:] != whole.shape[1:]:
            return False
        if not part.is_contiguous():
            return False
        address += len(part) * row
    return address == end
