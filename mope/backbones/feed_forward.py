"""The residual add, LayerNorm and MLP after the attention of a block, fused if transformers' modules are unmodified."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

import mope_kernels
from mope.fused.modules import has_hooks, is_plain
from mope.fused.plain import add, add_norm, autocast_dtype, gelu_mlp

_GELU = nn.GELU()


def is_untouched(module: nn.Module) -> bool:
    """Return whether a module is of a class from transformers, without hooks or an overridden `forward`."""
    return type(module).__module__.startswith("transformers.models.") and not has_hooks(module) and "forward" not in module.__dict__


def norm_and_mlp(x: Tensor, update: Tensor, norm: nn.Module, mlp: nn.Module) -> tuple[Tensor, Tensor]:
    """Return x + update and the MLP of its LayerNorm, which the caller adds to it (pre-LN)."""
    # The attribute of DINOv2's MLP has another name in transformers 5.17.
    activation = "activation_fn" if hasattr(mlp, "activation_fn") else "activation"
    layers: list[Any] = [getattr(mlp, name, None) for name in ("fc1", activation, "fc2")]
    if None in layers or not is_untouched(mlp):
        x, normed = add_norm(x, update, norm)
        return x, mlp(normed)
    x, normed = add_norm(x, update, norm, behind=layers[0])
    return x, linear_gelu_linear(normed, *layers)


def linear_gelu_linear(x: Tensor, first: nn.Module, activation: nn.Module, last: nn.Module) -> Tensor:
    """Apply the three modules in sequence, fused if the activation is the exact GELU."""
    if is_plain(activation, GELUActivation) and activation.act is F.gelu:
        activation = _GELU
    return gelu_mlp(cast(Any, lambda x: last(activation(first(x)))), (first, activation, last), x)


def add_then_norm(x: Tensor, update: Tensor, norm: nn.Module) -> Tensor:
    """Return LayerNorm(x + update) (post-LN), in the dtype that torch would use."""
    if not is_plain(norm, nn.LayerNorm):
        return norm(add(x, update))
    of, plain = norm._parameters, cast(nn.LayerNorm, norm)
    dtype = x.dtype if x.dtype == update.dtype else torch.promote_types(x.dtype, update.dtype)
    if x.device.type == "cuda" and autocast_dtype(x.device, dtype) is not None:
        dtype = torch.float32
    return mope_kernels.add_norm(x, update, of["weight"], of["bias"], eps=plain.eps, norm_dtype=dtype)[1]
