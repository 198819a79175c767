"""Launchers of the adapter's Triton kernels, with their configurations. The first call imports Triton."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mope_kernels._checks import last_dim_contiguous
from mope_kernels._ops import not_needed, triton_kernel
from mope_kernels._triton import cdiv, launch, next_power_of_2, on_amd, splits_in_one_wave

from .spec import GRADIENTS, PARAMETERS

# Smallest matrix size supported by tensor cores.
SMALLEST = 16
# Maximum number of programs that share the products of the parameter gradients: two per multiprocessor of an H100.
PROGRAMS = 264


class Blocks(NamedTuple):
    """Rows and columns per block, warps, software pipeline stages, and the register limit for NVIDIA's assembler.

    With None, the assembler may spill a few registers to run more warps at once.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    registers: int | None = None


# Maximum combined width of the bottlenecks in a group of experts, and hence of a single bottleneck.
SIDE_BY_SIDE = 64

# Blocks of the forward kernel, the backward kernel and the parameter gradients, for one group of experts and for several (MANY).
# With several groups the compiler would pipeline the partial products of all. Chosen so that nothing spills on sm_80, sm_90, sm_100
# and gfx942.
_HALF = (Blocks(32, 128, 4, 3), Blocks(32, 64, 4, 3), Blocks(64, 64, 4, 2))
_FLOAT = (Blocks(16, 64, 4, 2), Blocks(16, 32, 4, 1), Blocks(16, 32, 4, 1, 255))
_HALF_OF_MANY = (Blocks(32, 32, 4, 1), Blocks(16, 32, 4, 1, 255), Blocks(32, 32, 4, 1))
_FLOAT_OF_MANY = (Blocks(16, 32, 4, 1), Blocks(16, 16, 4, 1, 255), Blocks(16, 16, 4, 1))


class _Sizes(NamedTuple):
    """Constants of the kernels, except block sizes."""

    D: int
    R: int
    E: int
    BR: int
    BE: int
    BG: int
    GROUPS: int

    @classmethod
    def of(cls, up_weight: Tensor) -> _Sizes:
        num_experts, width, bottleneck = up_weight.shape
        experts, hidden = next_power_of_2(num_experts), max(next_power_of_2(bottleneck), SMALLEST)
        in_group = min(experts, SIDE_BY_SIDE // hidden)
        return cls(width, bottleneck, num_experts, hidden, in_group, max(experts, SMALLEST), experts // in_group)

    def blocks(self, x: Tensor) -> tuple[Blocks, Blocks, Blocks]:
        if x.dtype == torch.float32:
            return _FLOAT if self.GROUPS == 1 else _FLOAT_OF_MANY
        if self.GROUPS > 1:
            return _HALF_OF_MANY
        forward, backward, products = _HALF
        # Masking columns costs registers; without fewer rows Triton 3.6 would spill on sm_90.
        return forward, backward, products if self.D % products.columns == 0 else products._replace(rows=32)

    def constants(self, blocks: Blocks) -> dict[str, Any]:
        """Return these constants with those of a block and the compiler options."""
        limit = {} if blocks.registers is None or on_amd() else {"maxnreg": blocks.registers}
        return {
            **self._asdict(),
            **limit,
            "BM": blocks.rows,
            "BD": blocks.columns,
            "EVEN": self.D % blocks.columns == 0,
            "PRECISION": "ieee",
            "num_warps": blocks.num_warps,
            # AMD GPUs have less shared memory.
            "num_stages": min(blocks.num_stages, 2) if on_amd() else blocks.num_stages,
        }


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


@triton_kernel("expert_adapter")
def expert_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    seed: Tensor | None,
    temperature: float,
    is_gelu: bool,
    dropout_p: float,
    return_weights: bool,
) -> tuple[Tensor, Tensor]:
    from ._forward import adapter_forward

    x = last_dim_contiguous(x)
    num_rows, sizes = x.shape[0], _Sizes.of(up_weight)
    blocks, *_ = sizes.blocks(x)
    out = x.new_empty(x.shape)
    weights = x.new_empty(num_rows, sizes.E, dtype=torch.float32) if return_weights else None
    launch(
        adapter_forward,
        cdiv(num_rows, blocks.rows),
        x,
        *_contiguous(down_weight, down_bias, up_weight, up_bias, router_weight, router_bias),
        seed,
        out,
        weights,
        num_rows,
        x.stride(0),
        temperature,
        dropout_p,
        GELU=is_gelu,
        **sizes.constants(blocks),
    )
    return out, x.new_empty(0, dtype=torch.float32) if weights is None else weights


@triton_kernel("expert_adapter_backward")
def expert_adapter_backward(
    grad_out: Tensor,
    grad_weights: Tensor | None,
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    seed: Tensor | None,
    temperature: float,
    is_gelu: bool,
    dropout_p: float,
    needs: int,
) -> tuple[Tensor, ...]:
    from ._backward import adapter_backward, parameter_products, sum_parts

    x, grad_out = last_dim_contiguous(x), last_dim_contiguous(grad_out)
    parameters = (down_weight, down_bias, up_weight, up_bias, router_weight, router_bias)
    need = GRADIENTS.asked(needs)
    num_rows, sizes = x.shape[0], _Sizes.of(up_weight)
    _, blocks, product_blocks = sizes.blocks(x)

    def factor(width: int, *wanted_by: str) -> Tensor | None:
        return None if need.isdisjoint(wanted_by) else x.new_empty(num_rows, width)

    mixed, weights = factor(sizes.GROUPS * sizes.BE * sizes.BR, "up_weight"), factor(sizes.BG, "up_bias")
    grad_down = factor(sizes.BR, "down_weight", "down_bias")
    grad_logits = factor(sizes.BG, "router_weight", "router_bias")
    found: dict[str, Tensor | None] = {"x": x.new_empty(x.shape) if "x" in need else None}
    launch(
        adapter_backward,
        cdiv(num_rows, blocks.rows),
        grad_out,
        None if grad_weights is None else grad_weights.contiguous(),
        x,
        *_contiguous(*parameters),
        seed,
        found["x"],
        mixed,
        weights,
        grad_down,
        grad_logits,
        num_rows,
        grad_out.stride(0),
        x.stride(0),
        temperature,
        dropout_p,
        GELU=is_gelu,
        **sizes.constants(blocks),
    )
    # The order of the gradients within the parts.
    of_parameters = ("up_weight", "up_bias", "down_weight", "router_weight", "down_bias", "router_bias")
    by_name = dict(zip(PARAMETERS, parameters, strict=True))
    for name in of_parameters:
        like = by_name[name]
        found[name] = None if name not in need or like is None else like.new_empty(like.shape)
    gradients = [found[name] for name in of_parameters]
    *starts, total = accumulate((0 if t is None else t.numel() for t in gradients), initial=0)
    if total:
        column_blocks = cdiv(sizes.D, product_blocks.columns)
        row_blocks = cdiv(num_rows, product_blocks.rows)
        num_splits = splits_in_one_wave(column_blocks * sizes.GROUPS, row_blocks, PROGRAMS)
        blocks_per_split = cdiv(row_blocks, num_splits)
        parts = x.new_empty(num_splits, total, dtype=torch.float32)
        launch(
            parameter_products,
            column_blocks * sizes.GROUPS * num_splits,
            grad_out,
            x,
            mixed,
            weights,
            grad_down,
            grad_logits,
            parts,
            num_rows,
            blocks_per_split * product_blocks.rows,
            grad_out.stride(0),
            x.stride(0),
            tuple(starts),
            total,
            NEED_DOWN="down_weight" in need,
            NEED_DOWN_BIAS="down_bias" in need,
            NEED_ROUTER="router_weight" in need,
            NEED_ROUTER_BIAS="router_bias" in need,
            **sizes.constants(product_blocks),
        )
        launch(sum_parts, cdiv(total, 1024), parts, *gradients, num_splits, tuple(starts), total, BN=1024, num_warps=4)
    return tuple(not_needed(grad_out) if (t := found[name]) is None else t for name in GRADIENTS.names)
