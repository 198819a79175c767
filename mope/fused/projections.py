"""Frozen linear layers whose weights lie side by side in memory, so that one product computes them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modules import is_plain
from .plain import autocast_dtype
from .prepack import prepacked


def join_linear(modules: Sequence[nn.Module]) -> None:
    """Move the weights of frozen linear layers that read the same input into one tensor, and their biases into another.

    The parameters become views of it: modules, names and values stay, no memory is added, and a change in place is a change of
    both. What moves parameters (`to`, a copy) takes them apart, and `call_linear` then calls each layer: join them again.
    Layers that `call_linear` would call one by one are left alone, and so are weights that are a part of somebody else's tensor
    or lie in memory that processes share.
    """
    if not _are_plain(modules) or _joined(modules) is not None:
        return
    weights: list[Tensor] = [m.weight for m in modules]
    biases: list[Tensor] = [m.bias for m in modules if m.bias is not None]
    if len(biases) not in (0, len(modules)) or not (_can_move(weights) and _can_move(biases)):
        return
    # A parameter cannot become a view of an inference tensor.
    with torch.inference_mode(False), torch.no_grad():
        for parts in (weights, biases) if biases else (weights,):
            views = torch.cat(parts).split([len(part) for part in parts])
            for part, view in zip(parts, views, strict=True):
                part.data = view


def call_linear(modules: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """What each of the modules makes of x (..., C): of layers that were joined, views into one product.

    Modules are called where somebody may want to see or to change what they do: where they are of another class, have hooks or a
    `forward` of their own, or parameters that train or are no plain tensors; and while torch.compile or torch.export traces
    them, which know no addresses.
    """
    if not torch.compiler.is_compiling() and _are_plain(modules) and (joined := _joined(modules)) is not None:
        return F.linear(x, *joined).split([module.out_features for module in modules], dim=-1)
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


def _joined(modules: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None] | None:
    """Weights (N,C) and biases (N,) of all the layers; None if they do not lie side by side."""
    weight = _side_by_side([module.weight for module in modules])
    if weight is None or all(module.bias is None for module in modules):
        return None if weight is None else (weight, None)
    bias = _side_by_side([module.bias for module in modules])
    return None if bias is None else (weight, bias)


def _side_by_side(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The parts as one tensor, if they follow each other in one storage."""
    if any(part is None or part.is_meta for part in parts):
        return None
    first, *others = cast(Sequence[Tensor], parts)
    storage, end, rows = first.untyped_storage().data_ptr(), first.storage_offset() + first.numel(), len(first)
    for part in others:
        if part.untyped_storage().data_ptr() != storage or part.storage_offset() != end or part.shape[1:] != first.shape[1:]:
            return None
        end, rows = end + part.numel(), rows + len(part)
    is_whole = first.is_contiguous() and all(part.is_contiguous() and part.dtype == first.dtype for part in others)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset()) if is_whole else None
