"""Launchers of the Triton kernels for residual add and LayerNorm. The first call imports Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mope_kernels._checks import last_dim_contiguous
from mope_kernels._ops import not_needed, triton_kernel
from mope_kernels._triton import cdiv, launch, next_power_of_2, on_amd

from .spec import GRADIENTS


class RowBlocks(NamedTuple):
    """Distribution of rows over programs: each item has `chunks` programs of `steps` * `rows` rows each."""

    rows: int
    columns: int
    steps: int
    chunks: int
    num_warps: int


def row_blocks(num_rows: int, width: int, *, steps: int = 2, most_chunks: int | None = None) -> RowBlocks:
    """Choose the blocks for the rows of an item. `most_chunks` limits the number of partial sums over rows.

    The choice does not depend on the number of items, because an item's result must not depend on it, even in the last bit.
    """
    columns = next_power_of_2(width)
    rows = max(1024 // columns, 1)
    if most_chunks is not None:
        steps = max(steps, cdiv(num_rows, most_chunks * rows))
    steps = min(steps, max(cdiv(num_rows, rows), 1))
    return RowBlocks(rows, columns, steps, cdiv(num_rows, steps * rows), min(max(columns // 256, 4), 16))


def add_norm_rows(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    total: Tensor | None,
    normed: Tensor,
    eps: float,
    blocks: RowBlocks,
    *,
    num_replaced: int = 0,
    first_out: int = 0,
    self_weight: Tensor | None = None,
    seen: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    """Compute total and normed (B,N',C), from row `first_out` on, for the rows of x (B,N,C) from `num_replaced` on."""
    from ._forward import add_norm_forward

    batch, num_rows, width = x.shape
    query = 0 if self_weight is None else len(self_weight)
    launch(
        add_norm_forward,
        batch * blocks.chunks,
        x,
        update,
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        self_weight,
        total,
        normed,
        sums,
        seen,
        x.stride()[:2],
        (0, 0) if update is None else update.stride()[:2],
        normed.stride(0),
        num_rows,
        num_replaced,
        first_out,
        blocks.chunks,
        blocks.steps,
        eps,
        C=width,
        QUERY=query,
        BR=blocks.rows,
        BC=blocks.columns,
        BQ=min(next_power_of_2(query), blocks.rows),
        num_warps=blocks.num_warps,
    )


def add_norm_rows_backward(
    grad_total: Tensor | None,
    grad_normed: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    grad_x: Tensor | None,
    grad_update: Tensor | None,
    eps: float,
    *,
    num_rows: int,
    num_replaced: int = 0,
    first_out: int = 0,
    grad_query: Tensor | None = None,
    self_weight: Tensor | None = None,
    need_weight: bool = False,
    need_bias: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Write the gradients of x and update (B,N,C) to those tensors given; return those of weight and bias (C,) if needed."""
    from ._backward import add_norm_backward

    batch, _, width = total.shape
    # Use longer chunks for sums over rows, because each chunk costs a row of float32.
    blocks = row_blocks(num_rows, width, steps=32 if need_weight or need_bias else 2)
    partial = [
        torch.empty(batch * blocks.chunks, width, dtype=torch.float32, device=total.device) if need else None
        for need in (need_weight, need_bias)
    ]
    grad_total, grad_normed = (None if g is None else last_dim_contiguous(g) for g in (grad_total, grad_normed))
    launch(
        add_norm_backward,
        batch * blocks.chunks,
        grad_total,
        grad_normed,
        total,
        None if weight is None else weight.contiguous(),
        grad_query,
        self_weight,
        grad_x,
        grad_update,
        *partial,
        (0, 0) if grad_total is None else grad_total.stride()[:2],
        (0, 0) if grad_normed is None else grad_normed.stride()[:2],
        total.stride()[:2],
        num_rows * width,
        num_rows,
        num_replaced,
        first_out,
        blocks.chunks,
        blocks.steps,
        eps,
        C=width,
        QUERY=0 if self_weight is None else len(self_weight),
        BR=blocks.rows,
        BC=blocks.columns,
        num_warps=blocks.num_warps,
        # Without this limit, NVIDIA's assembler spills on sm_100 long before registers run out.
        **({} if on_amd() else {"maxnreg": 255}),
    )
    grad_weight, grad_bias = (None if sums is None else sums.sum(0) for sums in partial)
    return grad_weight, grad_bias


def _as_one_item(rows: Tensor) -> Tensor:
    """Reshape (..., C) to (1, R, C), as a view if the rows are evenly spaced.

    With a single item, results do not depend on the leading axes.
    """
    return last_dim_contiguous(rows.reshape(1, -1, rows.shape[-1]))


@triton_kernel("add_norm")
def add_norm(
    x: Tensor, update: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, norm_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    rows = _as_one_item(x)
    total = not_needed(x)
    if update is not None:
        total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, update.dtype), device=x.device)
    normed = torch.empty(x.shape, dtype=norm_dtype, device=x.device)
    add_norm_rows(
        rows,
        None if update is None else _as_one_item(update),
        weight,
        bias,
        None if update is None else total,
        normed.view(rows.shape),
        eps,
        row_blocks(rows.shape[1], rows.shape[2]),
    )
    return total, normed


@triton_kernel("add_norm_backward")
def add_norm_backward(
    grad_total: Tensor | None,
    grad_normed: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    eps: float,
    x_dtype: torch.dtype,
    update_dtype: torch.dtype,
    needs: int,
) -> tuple[Tensor, ...]:
    rows = _as_one_item(total)
    asked = GRADIENTS.asked(needs)
    grad_x, grad_update = (
        torch.empty(total.shape, dtype=dtype, device=total.device) if name in asked else None
        for name, dtype in (("x", x_dtype), ("update", update_dtype))
    )
    grad_weight, grad_bias = add_norm_rows_backward(
        None if grad_total is None else _as_one_item(grad_total),
        None if grad_normed is None else _as_one_item(grad_normed),
        rows,
        weight,
        grad_x,
        grad_update,
        eps,
        num_rows=rows.shape[1],
        need_weight="weight" in asked,
        need_bias="bias" in asked,
    )
    found = (grad_x, grad_update, grad_weight, grad_bias)
    return tuple(torch.empty(0, dtype=torch.float32, device=total.device) if g is None else g for g in found)
