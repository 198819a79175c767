"""Launchers of the window attention kernels, with their configurations. The first call imports Triton."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mope_kernels import configs
from mope_kernels._ops import not_needed, triton_kernel
from mope_kernels._triton import cdiv, launch, next_power_of_2, on_amd, splits_in_one_wave
from mope_kernels.configs.window_prompt_attention import MORE, Blocks
from mope_kernels.prompt_attention_details._launch import aligned_rows, dot_precision

from .spec import GRADIENTS

# Assumed number of multiprocessors if it is unknown: that of an H100.
MULTIPROCESSORS = 132


def _options(blocks: Blocks) -> dict[str, int]:
    """Return the compiler options."""
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    # Without a limit, NVIDIA's assembler uses so many registers that one program fewer fits, or spills a few to fit one more.
    return options if on_amd() else options | {"maxnreg": blocks.registers}


def blocks_for(kernel: str, qkv: Tensor, head_dim: int, num_rows: int) -> Blocks:
    """Return the configuration of "forward" or "gradient" for a dtype, head_dim and number of rows."""
    # Tensor cores need at least 16 rows.
    rows = max(next_power_of_2(num_rows), 16)
    key = (configs.dtype_key(qkv.dtype), head_dim, kernel, rows)
    blocks: Blocks = configs.find("window_prompt_attention", key, qkv.device)
    return blocks._replace(queries=min(blocks.queries, rows), keys=min(blocks.keys, rows))


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _splits(programs: int, windows: int, resident: int, device: torch.device) -> int:
    """Return into how many programs to split each of `programs`, at `resident` programs per multiprocessor."""
    count = _multiprocessors(device.index) if device.type == "cuda" and device.index is not None else MULTIPROCESSORS
    return splits_in_one_wave(programs, windows, resident * count)


class _Sizes(NamedTuple):
    """Constants of the kernels."""

    OWNER_IS_INSTANCE: bool
    H: int
    D: int
    BD: int
    P: int
    R: int
    W: int
    SHIFT: int

    @property
    def num_windows(self) -> int:
        return (self.R // self.W) ** 2

    @property
    def num_rows(self) -> int:
        """Number of rows of [prompts; tokens of a window]."""
        return self.P + self.W**2


def _sizes(qkv: Tensor, num_prompts: int, num_heads: int, resolution: int, window_size: int, shift: int, owner: bool) -> _Sizes:
    head_dim = qkv.shape[2] // (3 * num_heads)
    return _Sizes(owner, num_heads, head_dim, next_power_of_2(head_dim), num_prompts, resolution, window_size, shift)


def _sum_partials(partial: Tensor | None, out: Tensor, scale: float) -> None:
    """Store scale * the sum over splits of partial (splits, B, P, C) to the first P rows of out (B, ..., C)."""
    from ._forward import sum_partials

    if partial is None or len(partial) == 0:
        return
    splits, batch, num_prompts, width = partial.shape
    launch(
        sum_partials,
        batch * num_prompts,
        partial,
        out,
        batch,
        splits,
        out.shape[1],
        num_prompts,
        width,
        scale,
        BC=256,
        num_warps=2,
    )


def _partial(splits: int, like: Tensor, num_prompts: int) -> Tensor | None:
    """Allocate the partial sums, one per split. With one split the tensor is empty; without prompts it is None.

    It is not None with one split, because the number of splits depends on the batch and None would compile other kernels.
    """
    if num_prompts == 0:
        return None
    return like.new_empty(splits if splits > 1 else 0, like.shape[0], num_prompts, like.shape[2], dtype=torch.float32)


@triton_kernel("window_prompt_attention")
def window_prompt_attention(
    qkv: Tensor,
    position_bias: Tensor,
    num_prompts: int,
    num_heads: int,
    resolution: int,
    window_size: int,
    shift: int,
    owner_is_instance: bool,
) -> Tensor:
    from ._forward import window_forward

    qkv = aligned_rows(qkv)
    sizes = _sizes(qkv, num_prompts, num_heads, resolution, window_size, shift, owner_is_instance)
    batch, rows, width = qkv.shape
    blocks = blocks_for("forward", qkv, sizes.D, sizes.num_rows)
    programs = batch * num_heads * cdiv(sizes.num_rows, blocks.queries)
    splits = _splits(programs, sizes.num_windows, blocks.resident, qkv.device)
    out = qkv.new_empty(batch, rows, width // 3)
    partial = _partial(splits, out, num_prompts)
    launch(
        window_forward,
        programs * splits,
        qkv,
        position_bias.contiguous(),
        out,
        partial,
        qkv.stride()[:2],
        batch,
        splits,
        sizes.D**-0.5 * math.log2(math.e),
        **sizes._asdict(),
        BM=blocks.queries,
        BN=blocks.keys,
        PRECISION=dot_precision(qkv),
        **_options(blocks),
    )
    _sum_partials(partial, out, 1 / sizes.num_windows)
    return out


@triton_kernel("window_prompt_attention_backward")
def window_prompt_attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    position_bias: Tensor,
    num_prompts: int,
    num_heads: int,
    resolution: int,
    window_size: int,
    shift: int,
    owner_is_instance: bool,
    needs: int,
) -> tuple[Tensor, Tensor]:
    from ._backward import bias_gradient, key_gradient, query_gradient, window_gradient

    asked = GRADIENTS.asked(needs)
    need_qkv, need_bias = "qkv" in asked, "position_bias" in asked
    qkv, grad_out, position_bias = aligned_rows(qkv), aligned_rows(grad_out), position_bias.contiguous()
    sizes = _sizes(qkv, num_prompts, num_heads, resolution, window_size, shift, owner_is_instance)
    batch, rows, width = qkv.shape
    # The bias gradient occupies registers that large blocks cannot spare.
    blocks = blocks_for("gradient", qkv, sizes.D, MORE if need_bias else sizes.num_rows)
    query_blocks, key_blocks = cdiv(sizes.num_rows, blocks.queries), cdiv(sizes.num_rows, blocks.keys)
    grad = qkv.new_empty(batch, rows, width) if need_qkv else None
    strides = (qkv.stride()[:2], grad_out.stride()[:2])
    scale = sizes.D**-0.5
    scales = (scale, scale * math.log2(math.e))
    constants: dict[str, Any] = {**sizes._asdict(), "PRECISION": dot_precision(qkv), **_options(blocks)}

    if query_blocks == key_blocks == 1 and not need_bias and blocks.queries == blocks.keys:
        splits = _splits(batch * num_heads, sizes.num_windows, blocks.resident, qkv.device)
        partial = None if grad is None else _partial(splits, grad, num_prompts)
        launch(
            window_gradient,
            batch * num_heads * splits,
            qkv,
            position_bias,
            grad_out,
            grad,
            partial,
            *strides,
            batch,
            splits,
            *scales,
            **constants,
            BM=blocks.queries,
        )
    else:
        programs = batch * num_heads * max(query_blocks, key_blocks)
        splits = _splits(programs, sizes.num_windows, blocks.resident, qkv.device)
        partial = None if grad is None else _partial(splits, grad, num_prompts)
        softmax = torch.empty(batch, sizes.num_windows, num_heads, 3, sizes.num_rows, dtype=torch.float32, device=qkv.device)
        constants |= {"BM": blocks.queries, "BN": blocks.keys}
        arguments = (qkv, position_bias, grad_out, grad, partial, softmax, *strides, batch, splits, *scales)
        launch(query_gradient, batch * num_heads * query_blocks * splits, *arguments, **constants)
        if grad is not None:
            launch(key_gradient, batch * num_heads * key_blocks * splits, *arguments, **constants)
    if grad is not None:
        _sum_partials(partial, grad, 1.0)
    if not need_bias:
        return not_needed(qkv) if grad is None else grad, not_needed(position_bias)

    del constants["OWNER_IS_INSTANCE"]
    tiles = num_heads * cdiv(window_size**2, blocks.queries) * cdiv(window_size**2, blocks.keys)
    parts = _splits(tiles, batch * sizes.num_windows, blocks.resident, qkv.device)
    of_parts = torch.empty(parts, *position_bias.shape, dtype=torch.float32, device=qkv.device)
    launch(
        bias_gradient,
        tiles * parts,
        qkv,
        position_bias,
        grad_out,
        of_parts,
        softmax,
        *strides,
        batch,
        parts,
        scales[1],
        **constants,
    )
    return not_needed(qkv) if grad is None else grad, of_parts.sum(0).to(position_bias.dtype)
