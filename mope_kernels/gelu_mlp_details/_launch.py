"""Launchers of the MLP's Triton kernels. The first call imports Triton."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mope_kernels import configs
from mope_kernels._checks import last_dim_contiguous
from mope_kernels._ops import not_needed, triton_kernel
from mope_kernels._triton import cdiv, launch
from mope_kernels.configs.gelu_mlp import Blocks

from .spec import GRADIENTS

# Rows and columns per program of the elementwise kernels.
ROWS, COLUMNS = 4, 1024


def chosen_way(x: Tensor, width: int) -> str:
    """Return the implementation that the table selects for x (or the output gradient) and an MLP input of `width` columns."""
    return configs.find_way("gelu_mlp", (configs.dtype_key(x.dtype), width), x.device)


def _launch_on_rows(kernel: Any, hidden: Tensor, out: Tensor) -> None:
    """Launch an elementwise kernel on two contiguous (rows, columns) tensors."""
    num_rows, num_columns = hidden.shape
    launch(
        kernel,
        cdiv(num_rows, ROWS) * cdiv(num_columns, COLUMNS),
        hidden,
        out,
        num_rows,
        num_columns,
        BR=ROWS,
        BC=COLUMNS,
        EVEN=num_columns % COLUMNS == 0,
        num_warps=4,
    )


def _launch_product(kernel: Any, a: Tensor, weight: Tensor, *tensors: Tensor | None, num_columns: int) -> None:
    """Launch `gelu_forward` or `gelu_gradient` on `a` (rows, depth), a weight, and the kernel's other tensors."""
    a = last_dim_contiguous(a)
    num_rows, depth = a.shape
    blocks: Blocks = configs.find("gelu_mlp", (configs.dtype_key(a.dtype),), a.device)
    limit = {"maxnreg": blocks.maxnreg} if blocks.maxnreg else {}
    launch(
        kernel,
        cdiv(num_rows, blocks.rows) * cdiv(num_columns, blocks.columns),
        a,
        weight,
        *tensors,
        num_rows,
        num_columns,
        depth,
        a.stride(0),
        weight.stride(),
        BM=blocks.rows,
        BN=blocks.columns,
        BK=blocks.depth,
        GROUP=blocks.group,
        EVEN_COLUMNS=num_columns % blocks.columns == 0,
        EVEN_DEPTH=depth % blocks.depth == 0,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        **limit,
    )


@triton_kernel("gelu_mlp")
def gelu_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, keep_hidden: bool, way: str = ""
) -> tuple[Tensor, Tensor]:
    from ._product import gelu_forward, gelu_of_rows

    hidden: Tensor | None
    with torch.autocast(x.device.type, enabled=False):
        if (way or chosen_way(x, weight1.shape[1])) == "cublas":
            product = F.linear(x, weight1, bias1)
            hidden, activated = (product, torch.empty_like(product)) if keep_hidden else (None, product)
            _launch_on_rows(gelu_of_rows, product, activated)
        else:
            activated = x.new_empty(x.shape[0], weight1.shape[0])
            hidden = torch.empty_like(activated) if keep_hidden else None
            bias = None if bias1 is None else bias1.contiguous()
            _launch_product(gelu_forward, x, weight1, bias, hidden, activated, num_columns=activated.shape[1])
        out = F.linear(activated, weight2, bias2)
    return out, not_needed(x) if hidden is None else hidden


@triton_kernel("gelu_mlp_backward")
def gelu_mlp_backward(
    grad_out: Tensor, hidden: Tensor, x: Tensor | None, weight1: Tensor, weight2: Tensor, needs: int, way: str = ""
) -> tuple[Tensor, ...]:
    from ._product import gelu_gradient, times_derivative_of_rows

    need = GRADIENTS.asked(needs)
    found = {}
    # The forward writes it contiguously, but a saved-tensor hook may have changed that.
    hidden = hidden.contiguous()
    with torch.autocast(grad_out.device.type, enabled=False):
        if not need.isdisjoint({"x", "weight1", "bias1"}):
            if (way or chosen_way(grad_out, weight1.shape[1])) == "cublas":
                grad_hidden = grad_out @ weight2
                _launch_on_rows(times_derivative_of_rows, hidden, grad_hidden)
            else:
                grad_hidden = torch.empty_like(hidden)
                _launch_product(gelu_gradient, grad_out, weight2, hidden, grad_hidden, num_columns=hidden.shape[1])
        if "x" in need:
            found["x"] = grad_hidden @ weight1
        if "weight1" in need and x is not None:
            found["weight1"] = grad_hidden.mT @ x
        if "bias1" in need:
            found["bias1"] = grad_hidden.sum(0)
        if "weight2" in need:
            found["weight2"] = grad_out.mT @ F.gelu(hidden)
        if "bias2" in need:
            found["bias2"] = grad_out.sum(0)
    return tuple(found[name] if name in need else not_needed(grad_out) for name in GRADIENTS.names)
