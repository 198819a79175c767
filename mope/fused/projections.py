"""Frozen linear layers whose weights are adjacent in memory, so that one matrix product computes them all."""

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
    """Rows `first` to `end` of the joined weight (N,C) and bias (N,) are the parameters of one layer."""

    weight: Tensor
    bias: Tensor | None
    first: int
    end: int


class _Joined(NamedTuple):
    """Adjacent layers: their joined parameters, their output widths, and the address and shape of each parameter."""

    weight: Tensor
    bias: Tensor | None
    widths: list[int]
    places: tuple[tuple[tuple[int, torch.Size] | None, ...], ...]


# Not stored as attributes of the layers, because copies and files would then contain the weights twice.
_ROWS: WeakKeyDictionary[nn.Module, _Rows] = WeakKeyDictionary()
# Keyed by the first layer, then by the number of layers.
_FOUND: WeakKeyDictionary[nn.Module, dict[int, _Joined]] = WeakKeyDictionary()


def join_linear(modules: Sequence[nn.Module]) -> None:
    """Move the weights of frozen linear layers that have the same input into one tensor, and their biases into another.

    Each parameter becomes a range of rows of the joined tensor, with a storage of its own that starts at its first row. Modules,
    names and values stay the same, no memory is added, in-place changes affect both, and libraries that look for tensors with a
    shared storage (safetensors, accelerate) find none. Moving or copying the parameters (`to`, `deepcopy`) separates them;
    `call_linear` then calls each layer until they are joined again. Layers that `call_linear` would call one by one are left alone,
    as are weights that are part of another tensor or in memory shared between processes.
    """
    if not _are_plain(modules) or _joined(modules) is not None:
        return
    weights: list[Tensor] = [m.weight for m in modules]
    biases: list[Tensor] = [m.bias for m in modules if m.bias is not None]
    if len(biases) not in (0, len(modules)) or not (_can_move(weights) and _can_move(biases)):
        return
    # A parameter cannot become part of an inference tensor.
    with torch.inference_mode(False), torch.no_grad():
        whole = [torch.cat(parts) for parts in (weights, biases) if parts]
        for parts, tensor in zip((weights, biases), whole, strict=False):
            for part, rows in zip(parts, tensor.split([len(part) for part in parts]), strict=True):
                # The new storage covers this part only, and keeps the joined tensor alive.
                part.data = from_dlpack(rows)
    end = 0
    for module, weight in zip(modules, weights, strict=True):
        first, end = end, end + len(weight)
        _ROWS[module] = _Rows(whole[0], whole[1] if biases else None, first, end)


def separate_linear(modules: Sequence[nn.Module]) -> None:
    """Undo `join_linear` by giving each parameter its own memory."""
    with torch.inference_mode(False), torch.no_grad():
        for module in modules:
            _FOUND.pop(module, None)
            if _ROWS.pop(module, None) is not None:
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.clone()


def whole_of(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Return the joined weight (N,C) and bias (N,) that a layer is part of; None if it is not joined, or no longer is."""
    if module not in _ROWS or _joined([module]) is None:
        return None
    rows = _ROWS[module]
    return rows.weight, rows.bias


def call_linear(modules: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """Return the output of each module for x (..., C); for joined layers, views into one matrix product.

    The modules are called instead if they might do more than multiply: they are of another class, have hooks or an overridden
    `forward`, or their parameters train or are not plain tensors. They are also called while torch.compile or torch.export traces
    them, because memory addresses are not available then.
    """
    if not torch.compiler.is_compiling():
        found = _FOUND.get(modules[0], {}).get(len(modules))
        if found is not None and _are_where_they_were(modules, found):
            return F.linear(x, found.weight, found.bias).split_with_sizes(found.widths, -1)
        if modules[0] in _ROWS and (joined := _joined(modules)) is not None:
            widths = [layer.out_features for layer in cast(Sequence[nn.Linear], modules)]
            return F.linear(x, *joined).split_with_sizes(widths, -1)
    if all(prepacked(module) for module in modules):
        # Cast once, because each module would cast x.
        x = x.to(autocast_dtype(x.device, x.dtype) or x.dtype)
    return [module(x) for module in modules]


def _are_plain(modules: Sequence[nn.Module]) -> TypeGuard[Sequence[nn.Linear]]:
    """Return whether each `module(x)` is certain to equal F.linear(x, weight, bias) with frozen parameters."""
    return all(
        is_plain(module, nn.Linear)
        # The exact type excludes tensor subclasses and the replacements that torch.func makes.
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
    """Return the joined weight (N,C) and bias (N,) of the layers; None if they are not adjacent in memory."""
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
        # They have been separated, so the joined tensor would be kept in memory for nothing.
        for module in modules:
            _ROWS.pop(module, None)
            _FOUND.pop(module, None)
    return None


def _place(parameter: Tensor | None) -> tuple[int, torch.Size] | None:
    return None if parameter is None else (parameter.data_ptr(), parameter.shape)


def _are_where_they_were(modules: Sequence[nn.Module], found: _Joined) -> bool:
    """Return whether the layers are still plain, frozen and adjacent in memory."""
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
    """Return whether the parts, in order, are exactly the rows of `whole`, in the memory of `whole`."""
    address, row = whole.data_ptr(), whole.stride(0) * whole.itemsize
    end = address + len(whole) * row
    for part in parts:
        if part is None or part.data_ptr() != address or part.dtype != whole.dtype or part.shape[1:] != whole.shape[1:]:
            return False
        if not part.is_contiguous():
            return False
        address += len(part) * row
    return address == end
