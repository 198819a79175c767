"""Residual add, LayerNorm and MLP of a block, fused for plain modules.

Other modules (adapters, quantised weights, modules with hooks) are called instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

import mope_kernels

from .modules import is_plain
from .prepack import prepacked


def autocast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype that autocast uses for matrix products of `dtype` tensors; None if autocast does not apply."""
    if not torch._C._is_any_autocast_enabled():
        return None
    # The meta device does not support autocast.
    if device.type == "meta" or dtype == torch.float64 or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def norm_dtype(x: Tensor, update: Tensor | None, norm: nn.Module, behind: nn.Module | None) -> torch.dtype | None:
    """Return the dtype in which a fused LayerNorm of x + update may write its output.

    Under autocast this is the autocast dtype, provided that the next module, `behind`, casts its input to it anyway. Returns None
    if `norm` must be called: it is not a plain `nn.LayerNorm`, or autocast is on and `behind` is not a plain linear layer.
    """
    if not is_plain(norm, nn.LayerNorm):
        return None
    dtype = x.dtype
    if update is not None and update.dtype != dtype:
        dtype = torch.promote_types(dtype, update.dtype)
    under_autocast = autocast_dtype(x.device, dtype)
    if under_autocast is None:
        return dtype
    return under_autocast if is_plain(behind, nn.Linear) or prepacked(behind) else None


def add(x: Tensor, update: Tensor | None) -> Tensor:
    """Return x + update, or x if there is no update."""
    return x if update is None else x + update


def add_norm(
    x: Tensor, update: Tensor | None, norm: nn.Module, *, behind: nn.Module | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return x + update and its LayerNorm, which is the input of the module `behind`; see `mope_kernels.add_norm`."""
    dtype = norm_dtype(x, update, norm, behind)
    if dtype is None:
        total = add(x, update)
        return total, norm(total)
    of, plain = norm._parameters, cast(nn.LayerNorm, norm)
    return mope_kernels.add_norm(x, update, of["weight"], of["bias"], eps=plain.eps, norm_dtype=dtype, impl=impl)


def gelu_mlp(mlp: nn.Module, layers: Sequence[nn.Module], x: Tensor, *, impl: str = "auto") -> Tensor:
    """Return mlp(x), where `mlp` applies `layers` in sequence; see `mope_kernels.gelu_mlp`."""
    if len(layers) != 3 or not is_plain(layers[1], nn.GELU):
        return mlp(x)
    first, activation, last = cast(Any, layers)
    if activation.approximate != "none":
        return mlp(x)
    if in_order := prepacked(first):
        return last(in_order.gelu(x))
    if not is_plain(first, nn.Linear) or not is_plain(last, nn.Linear):
        return mlp(x)
    dtype = autocast_dtype(x.device, x.dtype) or x.dtype
    x = x if x.dtype == dtype else x.to(dtype)
    parameters = (*first._parameters.values(), *last._parameters.values())
    weights: Any = [t if t is None or t.dtype == dtype else t.to(dtype) for t in parameters]
    return mope_kernels.gelu_mlp(x, *weights, impl=impl)
